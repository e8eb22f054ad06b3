"""Short versions of benchmarks/bad_inputs.py and benchmarks/campaign.py."""

import subprocess
import sys

import pytest
from conftest import TESTS

BENCHMARKS = TESTS.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    argv = [sys.executable, BENCHMARKS / script, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_bad_inputs_are_refused_in_one_line() -> None:
    output = run("bad_inputs.py", "--inputs=30", "--until=vocab")
    assert output.count("exit code 2") == 6 and output.endswith("0 distinct failures\n")


@pytest.mark.slow
def test_run_with_faults_gives_the_undisturbed_result() -> None:
    kinds = "kill all processes,damage a checkpoint,SIGTERM"
    output = run("campaign.py", "--engine=native", "--faults=3", "--seed=1", f"--kinds={kinds}")
    assert "the same result" in output and output.splitlines()[-1].startswith("native     all")
