"""`tensorboard`: the real command."""

from __future__ import annotations

import json
import os
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


def read_tags(port: int) -> dict[str, dict[str, object]]:
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
    with urllib.request.urlopen(url) as response:
        tags: dict[str, dict[str, object]] = json.load(response)
    return tags


def test_runs_are_served_side_by_side(runs: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tags: dict[str, dict[str, object]] = {}
    server = start(tmp_path, *runs, "--port", str(port))
    try:
        for _ in range(240):
            time.sleep(0.25)
            try:
                tags = read_tags(port)
            except OSError:
                assert server.poll() is None
            if len(tags) == 4:
                break
        prefix = str(tmp_path).strip("/").replace("/", " ")
        directories = [f"{prefix} {name.replace('/', ' ')}" for name in runs]
        kinds = ("train", "eval")
        assert set(tags) == {f"{name}/m/{kind}" for name in directories for kind in kinds}
        assert all(set(names) == {"loss/total"} for names in tags.values())
    finally:
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=60)
    # Nothing of TensorFlow.
    lines = output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("TensorBoard") and str(port) in lines[0]


@pytest.mark.parametrize("seconds", [0.2, 1, 3])
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
