"""benchmarks/bench.py: a valid profile from every profile that ships, and real measurements."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROFILES, TESTS

from electra_wrap import profiles
from electra_wrap.architecture import NETWORKS

SCRIPT = TESTS.parent / "benchmarks" / "bench.py"
SMALL = "model.hidden_size=64 model.num_hidden_layers=1 model.max_seq_length=32 train.batch_size=4"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("engine", ["native", "upstream"])
@pytest.mark.parametrize("name", PROFILES)
def test_profile_for_bench_is_valid(bench: Any, name: str, engine: str, tmp_path: Path) -> None:
    given = profiles.load(name, ["engine=native", "train.micro_batches=2", "train.compile=true"])
    derived = bench.bench_profile(given, engine, 120, tmp_path)
    assert (derived.engine, derived.train.steps, derived.model) == (engine, 120, given.model)
    assert derived.train.batch_size == given.train.batch_size
    assert derived.train.micro_batches == (2 if engine == "native" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", pytest.param("upstream", marks=pytest.mark.upstream)])
def test_engine_is_measured(engine: str, request: pytest.FixtureRequest) -> None:
    if engine == "upstream":
        request.getfixturevalue("upstream")
    settings = [f"--set={setting}" for setting in (*SMALL.split(), "train.device=cpu")]
    argv = [f"--engine={engine}", "--steps=12", "--vocab-size=200", "--json", *settings]
    argv = [sys.executable, str(SCRIPT), *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["engine"] == engine and result["vocab_size"] == 200
    assert result["precision"] == "float32" and 0 < result["share_of_peak"] < 1
    speed, tokens = result["steps_per_second"], 4 * 32
    assert result["tokens_per_second"] == pytest.approx(tokens * speed)
    # Attention and the generator's output layer come on top of the matrices.
    model = profiles.load("spanish-tiny", SMALL.split()).model
    matrices = 6 * tokens * sum(model.shape(name).matrix_parameters for name in NETWORKS)
    assert matrices < result["model_flops_per_second"] / speed < 1.3 * matrices
