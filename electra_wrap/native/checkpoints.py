"""Checkpoints of the native engine: directories `step-N` in a model's directory."""

from __future__ import annotations

import re
from pathlib import Path

from electra_wrap import files

CHECKSUMS = "SHA256SUMS"


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the directory of a step's checkpoint in a model's directory."""
    return directory / f"step-{step}"


def checkpoint_steps(directory: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in directory.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def finish_checkpoint(temporary: Path, directory: Path, step: int) -> None:
    """Add checksums to a checkpoint that was written to `temporary`, and rename it."""
    written = [file for file in temporary.rglob("*") if file.is_file()]
    files.write_checksums(temporary / CHECKSUMS, written)
    files.move_into_place(temporary, checkpoint_path(directory, step))
