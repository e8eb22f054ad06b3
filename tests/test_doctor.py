"""`doctor`: what a profile needs and this machine lacks."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from electra_wrap import doctor, paths, profiles
from electra_wrap.run import Run


def statuses(printed: str) -> dict[str, str]:
    lines = [line for line in printed.splitlines() if not line.startswith(" ")]
    return {line[9:33].strip(): line[:8].strip() for line in lines}


def test_what_a_profile_lacks_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    text = 'extends = "spanish-tiny"\n[train]\ndevice = "gpu"\n'
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    arguments = ("--profile", "mine.toml", "--set", "corpus.source=nowhere.txt")
    done = cli("doctor", *arguments, env={"CUDA_VISIBLE_DEVICES": "-1"})
    found = statuses(done.stdout)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    missing = [name for name, status in found.items() if status == "missing"]
    assert missing == ["GPUs, native engine", "corpus"]
    assert "needs: GPUs, native engine, corpus; fix that" in done.stderr
    assert found["GPUs, upstream engine"] == "warning"  # the profile does not use it
    assert found["packages"] == found["disk"] == "ok"
    assert "→ install the NVIDIA driver and PyTorch's CUDA wheels" in done.stdout
    assert "GB free" in done.stdout


def test_upstream_is_needed_by_its_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "list_devices", lambda engine: ["GPU", "GPU"])
    monkeypatch.setattr(doctor, "find_compiler_problem", lambda: "there is no C compiler; install")
    monkeypatch.setattr(paths, "vendor_directory", lambda: tmp_path)
    for engine, expected in (("native", []), ("upstream", ["upstream"])):
        profile = profiles.load("spanish-tiny", [f"engine={engine}"])
        run = Run(profile, tmp_path / "run", upstream=str(tmp_path / "nothing"))
        assert doctor.examine(run) == expected
    found = statuses(printed := capsys.readouterr().out)
    assert found["compiler"] == "warning" and "2 × GPU" in printed


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "packages" in doctor.examine(Run(profiles.load("spanish-tiny"), tmp_path / "run"))
    assert "electra-wrap is not installed" in capsys.readouterr().out
