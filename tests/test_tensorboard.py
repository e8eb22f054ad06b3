"""`tensorboard`: the real command."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from electra_wrap import paths
from electra_wrap.monitor import scalars


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two run directories with a model each. Their names are the same."""
    names = ["a/run", "b, c:d/run"]
    for name in names:
        for kind in ("train", "eval"):
            (tmp_path / name / "models" / "m").mkdir(parents=True, exist_ok=True)
            with scalars.Writer(tmp_path / name / "models" / "m" / kind) as writer:
                writer.write_scalars(1, {"loss/total": 50.0})
    return names


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "electra_wrap", "tensorboard", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_runs_are_served_side_by_side(runs: list[str], tmp_path: Path) -> None:
    server = start(tmp_path, *runs, "--port", "0")
    assert server.stdout
    try:
        line = server.stdout.readline()  # nothing of TensorFlow before it
        assert line.startswith("TensorBoard")
        url = re.findall(r"http://127\.0\.0\.1:\d+/", line)[0] + "data/plugin/scalars/tags"
        tags: dict[str, dict[str, object]] = {}
        for _ in range(240):
            with urllib.request.urlopen(url) as response:
                tags = json.load(response)
            if len(tags) == 4:
                break
            time.sleep(0.25)
    finally:
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=60)
    prefix = str(tmp_path).strip("/").replace("/", " ")
    directories = [f"{prefix} {name.replace('/', ' ')}" for name in runs]
    assert set(tags) == {f"{name}/m/{kind}" for name in directories for kind in ("train", "eval")}
    assert all(set(names) == {"loss/total"} for names in tags.values())
    assert output == "" and server.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_server_that_has_just_started(
    runs: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """A signal may arrive while the line is printed."""
    for _ in range(3):
        server = start(tmp_path, *runs, "--port", "0")
        assert server.stdout and server.stdout.readline().startswith("TensorBoard")
        server.send_signal(number)
        output, _ = server.communicate(timeout=60)
        assert output == "" and server.returncode == 0


@pytest.mark.parametrize("seconds", [1, 3])
def test_interrupt_ends_quietly(runs: list[str], tmp_path: Path, seconds: float) -> None:
    server = start(tmp_path, *runs)
    time.sleep(seconds)
    server.send_signal(signal.SIGINT)
    output, _ = server.communicate(timeout=60)
    assert server.returncode in (0, 130)
    assert "Traceback" not in output and output.count("\n") <= 1


def test_port_in_use_is_an_error(runs: list[str], tmp_path: Path) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        server = start(tmp_path, runs[0], "--port", str(used.getsockname()[1]))
        output, _ = server.communicate(timeout=60)
    assert server.returncode == 3
    assert "choose another --port" in output and output.count("\n") == 1
