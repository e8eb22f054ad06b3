"""A checkpoint's weights and Adam's slots in the format that weights.py reads and writes.

The directory has `discriminator/` and `generator/`, each with model.safetensors under transformers'
names and, with the optimizer, adam_m.safetensors and adam_v.safetensors under the same names.
Runs as a child process: it imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file

from electra_wrap import subprocesses, weights
from electra_wrap.errors import UsageError
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
def load(
    directories: Mapping[Network, Path], network: model.Electra, adam: torch.optim.Optimizer | None
) -> None:
    """Load two models of this format, and the optimizer's slots if it is given and has some.

    UsageError unless they are complete and finite, and have the same embeddings.
    """
    for name, parameters in _parameters(network):
        embeddings = {
            k: p.clone() for k, p in parameters.items() if k.startswith("electra.embeddings.")
        }
        directory = directories[name]
        _copy(directory / "model.safetensors", parameters)
        if name == "generator":
            for key, value in embeddings.items():
                if not torch.equal(value, parameters[key]):
                    problem = f"{directory}: the discriminator has another {key}"
                    raise UsageError(f"{problem}; give two networks that share their embeddings")
        for slot, state in ADAM.items():
            file = directory / f"{slot}.safetensors"
            if adam is not None and file.is_file():
                _copy(file, {key: adam.state[p][state] for key, p in parameters.items()})


def _copy(file: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of a file to `targets`.

    UsageError unless it has exactly these, of these shapes and with finite values.
    """
    try:
        values = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({error}); replace it") from None
    for key in ("generator_lm_head.weight", "electra.embeddings.position_ids"):
        values.pop(key, None)  # the word embeddings again, and a constant
    if difference := sorted(values.keys() ^ targets.keys()):
        problem = f"{file}: {', '.join(difference[:3])}: missing in or foreign to an ELECTRA"
        raise UsageError(f"{problem}; give a complete pre-trained model")
    for key, target in targets.items():
        if values[key].shape != target.shape or not values[key].isfinite().all():
            shape = f"{key} has the shape {list(values[key].shape)} for {list(target.shape)}"
            raise UsageError(f"{file}: {shape}, or values that are not finite; give another model")
        target.copy_(values[key])


def restore(checkpoint: Path, network: model.Electra, adam: torch.optim.Optimizer | None) -> None:
    """Load a checkpoint of either format into a model, and into the optimizer if it is given."""
    if is_exchanged(checkpoint):
        load({name: checkpoint / name for name in NETWORKS}, network, adam)
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


def collect(
    models: dict[Network, str], configs: dict[Network, dict[str, Any]], out: str, *, optimizer: bool
) -> None:
    """Write two directories of transformers' models to the directory `out`, in this format.

    With `optimizer`, Adam's slots are written, too. UsageError unless the models are those that
    `load` takes, of the sizes in `configs`.
    """
    network = model.Electra(configs)
    adam = model.optimizer(network, weight_decay=0.0) if optimizer else None
    load({name: Path(directory) for name, directory in models.items()}, network, adam)
    save(Path(out), network, adam)


if __name__ == "__main__":
    subprocesses.serve(export, collect)
