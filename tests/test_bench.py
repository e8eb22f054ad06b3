"""`bench`: a valid profile from every profile that ships, and real measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROFILES

from electra_wrap import profile, profiles
from electra_wrap.profile import ENGINE_NAMES, EngineName
from electra_wrap.tools import bench

SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=1",
    "model.max_seq_length=32",
    "train.batch_size=4",
    "train.device=cpu",
]


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("name", PROFILES)
def test_profile_for_bench_is_valid(name: str, engine: EngineName, tmp_path: Path) -> None:
    shipped = profiles.load(name)
    derived = bench.bench_profile(shipped, engine, 120, tmp_path)
    assert derived.engine == engine and derived.train.steps == 120
    assert derived.model == shipped.model
    assert derived.train.batch_size == shipped.train.batch_size


def test_profile_for_bench_drops_what_upstream_does_not_support(tmp_path: Path) -> None:
    native = profiles.load("spanish-tiny", ["train.micro_batches=2", "train.precision=bfloat16"])
    derived = bench.bench_profile(native, "upstream", 12, tmp_path)
    assert derived.train.micro_batches == 1 and derived.train.precision == "auto"
    assert bench.bench_profile(native, "native", 12, tmp_path).train.micro_batches == 2


def run_bench(cli: Callable[..., Any], name: str, engine: str) -> dict[str, Any]:
    overrides = [part for override in SMALL for part in ("--set", override)]
    done = cli(
        *("bench", "--profile", name, "--engine", engine, "--steps", "12"),
        *("--vocab-size", "200", "--json", *overrides),
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spanish-tiny", "spanish-demo"])
def test_bench_measures_native_engine(
    cli: Callable[..., Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_bench(cli, name, "native")
    assert result["engine"] == "native" and result["device"] == "cpu"
    assert result["precision"] in ("float32", "bfloat16") and result["vocab_size"] == 200
    speed = result["steps_per_second"]
    assert result["sequences_per_second"] == pytest.approx(4 * speed)
    assert result["tokens_per_second"] == pytest.approx(4 * 32 * speed)
    assert 0 < result["share_of_peak"] < 1
    bench.show([result, {**result, "engine": "upstream"}])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["engine", "native", "upstream"] in rows and ["batch", "size", "4", "4"] in rows


@pytest.mark.upstream
def test_bench_measures_upstream_engine(cli: Callable[..., Any], upstream: Path) -> None:
    result = run_bench(cli, "spanish-demo", "upstream")
    assert result["engine"] == "upstream" and result["steps_per_second"] > 0


def test_flops_are_close_to_six_times_weights_and_tokens() -> None:
    """Attention and the generator's output layer come on top: little, at this length."""
    loaded = profiles.load("spanish-base-128", ["model.max_seq_length=32"])
    tokens = loaded.train.batch_size * 32
    shapes = [loaded.model.shape(network) for network in profile.NETWORKS]
    matrices = 6 * tokens * sum(shape.matrix_parameters for shape in shapes)
    assert matrices < bench.flops_per_step(loaded, 1000) < 1.05 * matrices
