"""`measure_gpu.py`: the whole of it on a CPU, and parts that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure_gpu
import pytest
from conftest import TESTS
from measure_gpu import Options, Row

from electra_wrap import subprocesses
from electra_wrap.errors import EnvironmentProblem, StageFailed


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(True, tmp_path / "run", tmp_path, "0,1")


def cells(out: Path) -> list[list[str]]:
    """Return the table in `out` as lists of part, measurement and value."""
    lines = (out / "measure.md").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["| part | measurement | value |", "| --- | --- | --- |"]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[2:]]


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TESTS / "measure_gpu.py", "--cpu", "--out", tmp_path],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = {(part[0], name): value for part, name, value in cells(tmp_path)}
    outcomes = json.loads((tmp_path / "measure.json").read_text(encoding="utf-8"))
    values: dict[tuple[str, str], Any] = {
        (outcome["part"][0], row["name"]): row["value"]
        for outcome in outcomes
        for row in outcome["rows"]
    }
    assert values.keys() == {key for key in table if key[1] != "seconds"}
    assert [outcome["part"][0] for outcome in outcomes] == ["m", "e", "a", "b", "c", "d", "e"]
    assert "torch 2" in table["m", "versions"] and table["m", "date"].startswith("20")
    losses = values["a", "loss, bfloat16"]
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0] != values["a", "loss, float32"][0]
    assert table["a", "loss, bfloat16"] == f"{losses[0]:.4f} … {losses[-1]:.4f}"
    assert (
        1 < values["b", "first step after resuming"] <= values["b", "last step before SIGKILL"] < 40
    )
    same = [value for (part, name), value in values.items() if part == "b" and "difference" in name]
    assert same == [0, 0, 0]
    assert values["c", "steps per second"] > 0 and table["c", "vocab size"] == "30,522"
    assert values["d", "busy milliseconds a step"] > 0 and 0 <= values["d", "idle share"] < 1
    assert sum(name.startswith("milliseconds a step in ") for _, name in table) == 10
    assert 0 < values["e", "largest difference of two processes from one"] < 1e-5
    assert (tmp_path / "logs" / "train.log").stat().st_size and (
        tmp_path / "trace.json.gz"
    ).exists()


def test_failed_parts_are_lines_of_the_table(
    options: Options, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def stops(options: Options) -> Iterator[Row]:
        yield Row("before | after", 0.5)
        raise StageFailed(f"it failed; see {options.directory}/logs/train.log", "last lines")

    def breaks(options: Options) -> Iterator[Row]:
        yield Row("number", 1 / len(options.two_gpus[3:]))

    def ends(options: Options) -> Iterator[Row]:
        yield Row("size", 12_345)
        os._exit(3)

    def lasts(options: Options) -> Iterator[Row]:
        yield Row("start", "now")
        time.sleep(600)

    def differs(options: Options) -> Iterator[Row]:
        yield Row("difference", 0.2, 0.1)
        yield Row("other difference", float("nan"), 0.1)

    parts = (stops, breaks, ends, lasts, differs)
    outcomes = [measure_gpu.measure(part.__name__, part, options, 2) for part in parts]
    assert outcomes[3].seconds < 15
    measure_gpu.write(outcomes, tmp_path)
    table = [row for row in cells(tmp_path) if row[1] != "seconds"]
    assert table == [
        ["stops", r"before \| after", "0.5"],
        ["stops", "failed", f"it failed; see {tmp_path}/logs/train.log"],
        ["breaks", "failed", "ZeroDivisionError: division by zero"],
        ["ends", "size", "12,345"],
        ["ends", "failed", "its process ended with code 3"],
        ["lasts", "start", "now"],
        ["lasts", "failed", "it took longer than 2 s"],
        ["differs", "difference", "0.2"],
        ["differs", "other difference", "nan"],
        [
            *("differs", "failed"),
            "difference: 0.2 is above 0.1; other difference: nan is above 0.1",
        ],
    ]
    assert "last lines" in capfd.readouterr().err


def test_kernels_of_a_trace_are_summarized() -> None:
    def event(category: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": ts, "dur": dur}

    trace = [
        event("kernel", "gemm", 1000, 2000),
        event("kernel", "add", 2000, 2000),  # at the same time, on another stream
        event("gpu_memcpy", "Memcpy HtoD", 5000, 1000),
        event("cuda_runtime", "cudaGraphLaunch", 0, 10),
        event("gpu_user_annotation", "Optimizer.step", 0, 9000),
    ]
    rows = {row.name: row.value for row in measure_gpu.summarize(trace, 2, 4.0, gpu=True)}
    assert rows == {
        "CUDA graph launches a step": 0.5,
        "kernels a step": 1.0,
        "busy milliseconds a step": 2.0,
        "idle share": 0.5,
        "milliseconds a step in gemm": 1.0,
        "milliseconds a step in add": 1.0,
        "milliseconds a step in Memcpy HtoD": 0.5,
    }
    with pytest.raises(StageFailed, match="no CUDA graph was launched"):
        list(measure_gpu.summarize(trace[:3], 2, 4.0, gpu=True))


def test_profiles_for_a_gpu_are_valid(options: Options) -> None:
    run = measure_gpu.make_run(options, "one", steps=20, compile=False)
    assert run.profile.train.device == "gpu" and run.profile.train.compile is False
    assert run.profile.engine == "native" and run.profile.model.shape("generator").hidden_size == 64
    base = measure_gpu.load_profile(options, "spanish-base-128")
    assert base.model.max_seq_length == 128 and base.train.compile is True


def test_wheels_are_importable_in_children(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocesses, "child_environment", subprocesses.child_environment)
    monkeypatch.setattr(measure_gpu, "PACKAGES", ("numpy", "carried.package"))
    with pytest.raises(EnvironmentProblem, match=r"^missing: carried\.package; .*--wheels$"):
        measure_gpu.bring_packages(None, tmp_path / "none")
    with zipfile.ZipFile(tmp_path / "carried_package-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "print('carried')")
        wheel.writestr("carried_package-1.dist-info/METADATA", "Name: carried-package\nVersion: 1")
    measure_gpu.bring_packages(tmp_path, tmp_path / "packages")
    argv = [sys.executable, "-s", "-c", "import carried"]
    environment = subprocesses.child_environment({})
    assert subprocess.check_output(argv, env=environment, cwd="/", text=True) == "carried\n"
