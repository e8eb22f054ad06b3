"""A checkpoint's weights and Adam's slots as weights.py reads and writes them, between the engines and for export.

A directory has `discriminator/` and `generator/`, each with model.safetensors under transformers' names and, if slots
are wanted, adam_m.safetensors and adam_v.safetensors under the same names. Run as a module to write one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file

from electra_wrap import process, weights
from electra_wrap.native import model
from electra_wrap.profile import NETWORKS, Network

#: PyTorch's names of Adam's slots, in the order of weights.SLOTS.
ADAM = ("exp_avg", "exp_avg_sq")


def _parameters(network: model.Electra) -> Iterator[tuple[str, dict[str, torch.nn.Parameter]]]:
    for name in NETWORKS:
        # A parameter that a network has twice, its word embeddings, comes under its first name only.
        yield name, dict(getattr(network, name).named_parameters())


def is_exchanged(checkpoint: Path) -> bool:
    return (checkpoint / "discriminator").is_dir()


def load(checkpoint: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Put an exchanged checkpoint's weights into a model, and its slots into the optimizer if that is given."""
    for name, parameters in _parameters(network):
        values = load_file(checkpoint / name / "model.safetensors")
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(values[key])
        if adam is not None:
            for slot, state in zip(weights.SLOTS, ADAM, strict=True):
                values = load_file(checkpoint / name / f"{slot}.safetensors")
                for key, parameter in parameters.items():
                    adam.state[parameter][state].copy_(values[key])


def restore(checkpoint: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Put a checkpoint, exchanged or of this engine, into a model, and into the optimizer if that is given."""
    if is_exchanged(checkpoint):
        return load(checkpoint, network, adam)
    load_model(network, checkpoint / "model.safetensors")
    if adam is not None:
        adam.load_state_dict(torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True))


def save(out: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Write the exchange directory `out` of a model, with its optimizer's slots if that is given."""
    for name, parameters in _parameters(network):
        files = {"model": {key: parameter.detach() for key, parameter in parameters.items()}}
        if adam is not None:
            for slot, state in zip(weights.SLOTS, ADAM, strict=True):
                files[slot] = {key: adam.state[parameter][state] for key, parameter in parameters.items()}
        (out / name).mkdir(parents=True)
        for file, tensors in files.items():
            save_file(tensors, out / name / f"{file}.safetensors", {"format": "pt"})


def export(checkpoint: str, configs: dict[Network, dict[str, Any]], out: str, slots: bool) -> None:
    """Write the exchange directory `out` from a native checkpoint of networks of these configurations."""
    network = model.Electra(configs)
    adam = model.optimizer(network, 0.0) if slots else None
    restore(Path(checkpoint), network, adam)
    save(Path(out), network, adam)


if __name__ == "__main__":
    process.serve(export)
