"""The metrics of both networks."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import child

from electra_wrap import metrics


def test_metrics_equal_those_of_tensorflow(tmp_path: Path) -> None:
    """Over batches in two parts that are summed, with extreme and zero logits and with padding."""
    random = np.random.default_rng(0)
    batches = {
        "logits": random.normal(0, 4, (5, 8, 32)).astype(np.float32),
        "inside": np.arange(32) < random.integers(4, 33, (5, 8, 1)),
        "weights": (random.random((5, 8, 6)) < 0.8).astype(np.float32),
        "losses": random.exponential(3, (5, 8, 6)).astype(np.float32),
        "right": (random.random((5, 8, 6)) < 0.3).astype(np.float32),
        "sampled": (random.random((5, 8, 6)) < 0.3).astype(np.float32),
    }
    batches["replaced"] = (random.random((5, 8, 32)) < 0.15) & batches["inside"]
    batches["logits"][batches["replaced"]] += 2  # better than chance
    batches["logits"][:, :, 1], batches["logits"][:, :, 2] = 0, 90
    np.savez(tmp_path / "batches.npz", **batches)
    expected = json.loads(child("tf_metrics.py", tmp_path / "batches.npz"))
    tallies = [metrics.Tally(), metrics.Tally()]
    for i in range(5):
        batch = {name: values[i] for name, values in batches.items()}
        for tally, rows in zip(tallies, (slice(0, 3), slice(3, 8)), strict=True):
            masked = [batch[name][rows] for name in ("right", "sampled", "losses", "weights")]
            tally.add_generator(*masked)
            tally.add_discriminator(
                batch["logits"][rows], batch["replaced"][rows], batch["inside"][rows]
            )
    tallies[0].sums += tallies[1].sums
    assert tallies[0].values() == pytest.approx(expected, rel=1e-5)
    assert set(metrics.UPSTREAM.values()) - {"loss/total"} < set(expected)


@pytest.mark.parametrize("padding", [0, 20])
def test_auc_does_not_depend_on_padding(padding: int) -> None:
    """Upstream's AUC does: a random discriminator looks better, the shorter the documents are."""
    random, tally = np.random.default_rng(0), metrics.Tally()
    inside = np.arange(10 + padding) < np.full((200, 1), 10)
    replaced = (random.random(inside.shape) < 0.15) & inside
    tally.add_generator(*np.ones((4, 1, 1)))
    tally.add_discriminator(random.normal(size=inside.shape), replaced, inside)
    values = tally.values()
    assert values["discriminator/auc"] == pytest.approx(0.5, abs=0.03)
    with_padding = values["discriminator/auc_with_padding"]
    assert with_padding > 0.8 if padding else with_padding == values["discriminator/auc"]


def test_metrics_are_finite_if_the_discriminator_finds_nothing() -> None:
    tally = metrics.Tally()
    tally.add_generator(*np.zeros((3, 2, 4)), np.ones((2, 4)))
    tally.add_discriminator(np.full((2, 9), -1.0), np.zeros((2, 9)), np.ones((2, 9)))
    values = tally.values()
    assert values["discriminator/precision"] == values["discriminator/recall"] == 0
    assert values["discriminator/replaced"] == 0 and values["discriminator/accuracy"] == 1
    assert all(np.isfinite(list(values.values())))
