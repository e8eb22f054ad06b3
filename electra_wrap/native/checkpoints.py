"""The native engine's checkpoints: directories `step-N` of a model's directory, written under another name first."""

from __future__ import annotations

import re
from pathlib import Path

from electra_wrap import rundir


def path(model_dir: Path, step: int) -> Path:
    return model_dir / f"step-{step}"


def sums(model_dir: Path, step: int) -> Path:
    """The file that has the digests of a checkpoint's files."""
    return path(model_dir, step) / "SHA256SUMS"


def finish(made: Path, model_dir: Path, step: int) -> None:
    """Give a directory with a checkpoint its name, when it is on disk."""
    rundir.write_sums(made / "SHA256SUMS", [file for file in made.rglob("*") if file.is_file()])
    rundir.finish(made, path(model_dir, step))


def steps(model_dir: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    return sorted(int(m[1]) for p in model_dir.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)))
