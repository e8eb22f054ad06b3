"""Bad inputs are refused in one line, as tests/bad_inputs.py checks: here a few of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import bad_inputs
import pytest


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bad_inputs.Campaign]:
    directory = tmp_path_factory.mktemp("bad")
    with contextlib.closing(bad_inputs.Campaign(directory, seed=0, until="vocab")) as campaign:
        yield campaign


@pytest.mark.parametrize("kind", bad_inputs.KINDS)
def test_bad_inputs_are_refused_in_one_line(campaign: bad_inputs.Campaign, kind: str) -> None:
    outcomes = [campaign.try_input(kind, number) for number in range(30)]
    assert not (failures := bad_inputs.describe_failures(outcomes)), "\n".join(failures)
