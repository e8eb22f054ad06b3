"""The native engine's checkpoints: directories `step-N` of a model's directory, written under another name first."""

from __future__ import annotations

import re
from pathlib import Path


def path(model_dir: Path, step: int) -> Path:
    return model_dir / f"step-{step}"


def steps(model_dir: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    return sorted(int(m[1]) for p in model_dir.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)))
