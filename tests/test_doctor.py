"""`doctor`: what a profile needs and this machine lacks."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from electra_wrap import paths, profiles
from electra_wrap.run import Run
from electra_wrap.tools import doctor


def test_what_a_named_profile_lacks_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'extends = "spanish-tiny"\n[train]\ndevice = "gpu"\n', encoding="utf-8"
    )
    arguments = ("--profile", "mine.toml", "--set", "corpus.source=nowhere.txt", "--json")
    done = cli("doctor", *arguments, env={"CUDA_VISIBLE_DEVICES": "-1"})
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    missing = [name for name, finding in findings.items() if finding["status"] == "missing"]
    assert missing == ["GPUs, native engine", "corpus"]
    assert all(name in done.stderr for name in missing) and "disk" not in done.stderr
    assert findings["GPUs, upstream engine"]["status"] == "warning"  # the profile does not use it
    assert "PyTorch's CUDA wheels" in findings["GPUs, native engine"]["fix"]
    assert "vendor --device gpu" in findings["GPUs, upstream engine"]["fix"]
    assert all(findings[name]["status"] == "ok" for name in ("packages", "disk"))
    assert "GB free" in findings["disk"]["result"]


def test_without_a_named_profile_nothing_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda engine: "[1] × GPU")  # asking takes seconds
    overrides = ["tokenizer.source=hf://no/such", "corpus.source=nowhere.txt", "engine=upstream"]
    profile = profiles.load("spanish-demo", overrides)
    monkeypatch.setattr(doctor, "_hub", lambda run: "yes")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(paths, "vendor_directory", lambda: tmp_path)
    run = Run(profile, tmp_path / "run", upstream=str(tmp_path / "nothing"))
    findings = list(doctor.examine(run, named=False))
    statuses = {finding.name: finding.status for finding in findings}
    results = {finding.name: finding.result for finding in findings}
    assert statuses["upstream"] in ("ok", "warning") and statuses["corpus"] == "warning"
    version, _, python = results["upstream's TensorFlow"].partition(", with ")
    assert version == importlib.metadata.version("tensorflow") and python == sys.executable
    assert "missing" not in statuses.values() and statuses["hub"] == "ok"
    assert statuses["compiler"] == "warning" and results["compiler"] == "there is no C compiler"
    doctor.show(findings)
    printed = capsys.readouterr().out
    assert "[1] × GPU" in printed and "→" in printed


def test_packages_are_compared_with_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["numpy>=99", "no-package", "pydantic>=2", "datasets>=99; extra == 'datasets'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    finding = doctor._check("packages", doctor._packages, needed=True)
    assert finding.status == "missing"
    assert finding.result == "not installed: numpy>=99, no-package" and finding.fix
    assert doctor._is_satisfied(Requirement("pydantic>=2"))
