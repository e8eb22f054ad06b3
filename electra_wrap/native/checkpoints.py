"""Checkpoints of the native engine: directories `step-N` in a model's directory."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.numpy import load_file, save_file

from electra_wrap import files
from electra_wrap.profile import NETWORKS

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


def is_exchanged(checkpoint: Path) -> bool:
    """Whether a checkpoint has the format of exchange.py: another engine wrote it."""
    return (checkpoint / "discriminator").is_dir()


def export_weights(checkpoint: Path, out: Path) -> None:
    """Write `out`/NETWORK/model.safetensors under transformers' names, without PyTorch."""
    networks = {}
    if is_exchanged(checkpoint):
        networks = {name: load_file(checkpoint / name / "model.safetensors") for name in NETWORKS}
    else:
        tensors = load_file(checkpoint / "model.safetensors")
        for name in NETWORKS:
            # The networks share the embeddings, which the file has once.
            networks[name] = {
                key.partition(".")[2]: tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.") or ".electra.embeddings." in key
            }
    for name, weights in networks.items():
        (out / name).mkdir(parents=True)
        save_file(weights, out / name / "model.safetensors", {"format": "pt"})
