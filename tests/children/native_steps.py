"""Train a run directory's model with the native engine without dropout; write what another engine needs to follow.

OUT gets end/ (an exchange directory, with slots), gradients.npz of the first step, and steps.npz: batches, masks,
samples and losses of every step. With a third argument, an .npy, samples are those instead of the generator's.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from electra_wrap import profile
from electra_wrap.native import exchange, train

directory, out = map(Path, sys.argv[1:3])
given = iter(np.load(sys.argv[3])) if sys.argv[3:] else None
found: dict[str, list[np.ndarray]] = {}
networks = []


def record(**arrays):
    for name, value in arrays.items():
        found.setdefault(name, []).append(np.asarray(value))


with_dropout = profile.hf_config
off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
profile.hf_config = lambda *arguments: {**with_dropout(*arguments), **off}

optimizer, masked_lm, forward = train.model.optimizer, train.model.masked_lm, train.model.Electra.forward


def recorded_optimizer(network, *arguments):
    adam = optimizer(network, *arguments)
    networks.append((network, adam))
    return adam


def recorded_masked_lm(*arguments):
    loss, sampled, *rest = masked_lm(*arguments)
    if given is not None:
        sampled = torch.from_numpy(next(given))
    record(sampled=sampled)
    return loss, sampled, *rest


def recorded_forward(self, batch):
    record(**batch)
    losses = forward(self, batch)
    record(**{f"{name}_loss": value.detach() for name, value in losses.items()})
    return losses


clip = train.Accelerator.clip_grad_norm_


def recorded_clip(self, *arguments):
    if "gradients" not in found:
        network = networks[0][0]
        names = {f"{n}.{k}": p.grad for n in profile.NETWORKS for k, p in getattr(network, n).named_parameters()}
        np.savez(out / "gradients.npz", **names)
        found["gradients"] = []
    return clip(self, *arguments)


train.model.optimizer, train.model.masked_lm = recorded_optimizer, recorded_masked_lm
train.model.Electra.forward, train.Accelerator.clip_grad_norm_ = recorded_forward, recorded_clip
assert train.train(directory)
del found["gradients"]
exchange.save(out / "end", *networks[0])
np.savez(out / "steps.npz", **{name: np.stack(values) for name, values in found.items()})
