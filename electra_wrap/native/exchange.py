"""A checkpoint's weights and Adam's slots in the format that weights.py reads and writes.

The directory has `discriminator/` and `generator/`, each with model.safetensors under transformers'
names and, with the optimizer, adam_m.safetensors and adam_v.safetensors under the same names.
Runs as a child process: it imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file

from electra_wrap import subprocesses, weights
from electra_wrap.native import model
from electra_wrap.native.checkpoints import is_exchanged
from electra_wrap.profile import NETWORKS, Network

#: PyTorch's name of each of Adam's slots.
ADAM = dict(zip(weights.SLOTS, ("exp_avg", "exp_avg_sq"), strict=True))


def _parameters(network: model.Electra) -> Iterator[tuple[Network, dict[str, torch.nn.Parameter]]]:
    for name in NETWORKS:
        # The word embeddings, which a network has twice, come under their first name only.
        yield name, dict(getattr(network, name).named_parameters())


@torch.no_grad()
def load(checkpoint: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Load a checkpoint of this format into a model, and into the optimizer if it is given."""
    for name, parameters in _parameters(network):
        values = load_file(checkpoint / name / "model.safetensors")
        for key, parameter in parameters.items():
            parameter.copy_(values[key])
        if adam is None:
            continue
        for slot, state in ADAM.items():
            values = load_file(checkpoint / name / f"{slot}.safetensors")
            for key, parameter in parameters.items():
                adam.state[parameter][state].copy_(values[key])


def restore(checkpoint: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Load a checkpoint of either format into a model, and into the optimizer if it is given."""
    if is_exchanged(checkpoint):
        load(checkpoint, network, adam)
        return
    load_model(network, checkpoint / "model.safetensors")
    if adam is not None:
        state = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True)
        adam.load_state_dict(state)


def save(out: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Write a model, and the optimizer's slots if it is given, to the directory `out`."""
    for name, parameters in _parameters(network):
        contents = {"model": {key: parameter.detach() for key, parameter in parameters.items()}}
        if adam is not None:
            for slot, state in ADAM.items():
                contents[slot] = {
                    key: adam.state[parameter][state] for key, parameter in parameters.items()
                }
        (out / name).mkdir(parents=True)
        for file, tensors in contents.items():
            save_file(tensors, out / name / f"{file}.safetensors", {"format": "pt"})


def export(checkpoint: str, configs: dict[Network, dict[str, Any]], out: str) -> None:
    """Write a checkpoint, of networks with these config.json contents, to the directory `out`."""
    network = model.Electra(configs)
    adam = model.optimizer(network, weight_decay=0.0)
    restore(Path(checkpoint), network, adam)
    save(Path(out), network, adam)


if __name__ == "__main__":
    subprocesses.serve(export)
