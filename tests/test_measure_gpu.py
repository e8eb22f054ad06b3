"""benchmarks/measure_gpu.py, on a CPU: training is killed and resumed, and a part may fail."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS

BENCHMARKS = TESTS.parent / "benchmarks"


@pytest.fixture
def measure_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import measure_gpu

    return measure_gpu


@pytest.mark.slow
def test_training_is_killed_and_resumed_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [sys.executable, BENCHMARKS / "measure_gpu.py", "--cpu", "--parts=b", "--out", out]
    done = subprocess.run(argv, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = (out / "measure.md").read_text(encoding="utf-8").splitlines()
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines[2:]]
    values = {name: value for part, name, value in cells if part.startswith("b")}
    first, last = values["first step after resuming"], values["last step before SIGKILL"]
    assert 1 < int(first) <= int(last) < 40
    assert [value for name, value in values.items() if "difference" in name] == ["0", "0", "0"]


def test_parts_that_fail_say_why(measure_gpu: Any, tmp_path: Path) -> None:
    def breaks(options: Any) -> Iterator[Any]:
        yield measure_gpu.Row("number", 1 / len(options.two_gpus[3:]))

    def ends(options: Any) -> Iterator[Any]:
        yield measure_gpu.Row("difference", 0.2, 0.1)
        os._exit(3)

    def lasts(options: Any) -> Iterator[Any]:
        yield from iter(lambda: time.sleep(600), 0)

    def differs(options: Any) -> Iterator[Any]:
        yield from [measure_gpu.Row("difference", value, 0.1) for value in (0.2, float("nan"))]

    options = measure_gpu.Options(True, tmp_path, "0,1")
    problems = [measure_gpu.measure(p, options, 2)[-1] for p in (breaks, ends, lasts, differs)]
    assert [(problem.name, problem.value) for problem in problems] == [
        ("failed", "ZeroDivisionError: division by zero"),
        ("failed", "its process ended with code 3"),
        ("failed", "it took longer than 2 s"),
        ("failed", "difference: 0.2 is above 0.1; difference: nan is above 0.1"),
    ]
