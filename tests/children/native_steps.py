"""Train a run with the native engine without dropout, and record its steps: RUN_DIR OUT [SAMPLES].

OUT gets end/, the last weights and slots in the exchange format; gradients.npz of the first step;
and steps.npz, the batches, masks, samples and losses of every step. With SAMPLES, an .npy file,
these replace the generator's samples.
"""

import sys
from pathlib import Path

import native_no_dropout  # noqa: F401 - turns dropout off
import numpy as np
import torch
from accelerate import Accelerator

from electra_wrap.native import exchange, model, train
from electra_wrap.profile import NETWORKS

directory, out = map(Path, sys.argv[1:3])
samples = iter(np.load(sys.argv[3])) if sys.argv[3:] else None
recorded: dict[str, list[np.ndarray]] = {}
trained = []


def record(**arrays):
    for name, value in arrays.items():
        recorded.setdefault(name, []).append(np.asarray(value))


optimizer, masked_lm, forward = model.optimizer, model.masked_lm, model.Electra.forward
clip = Accelerator.clip_grad_norm_


def recording_optimizer(network, *arguments):
    adam = optimizer(network, *arguments)
    trained.append((network, adam))
    return adam


def recording_masked_lm(*arguments):
    loss, sampled, *rest = masked_lm(*arguments)
    if samples is not None:
        sampled = torch.from_numpy(next(samples))
    record(sampled=sampled)
    return loss, sampled, *rest


def recording_forward(self, batch):
    record(**batch)
    outputs = forward(self, batch)
    record(**{f"{name}_loss": outputs[name].detach() for name in ("loss", *NETWORKS)})
    return outputs


def recording_clip(self, *arguments):
    path = out / "gradients.npz"
    if not path.exists():
        gradients = {
            f"{name}.{key}": parameter.grad
            for name in NETWORKS
            for key, parameter in getattr(trained[0][0], name).named_parameters()
        }
        np.savez(path, **gradients)
    return clip(self, *arguments)


model.optimizer, model.masked_lm = recording_optimizer, recording_masked_lm
model.Electra.forward, Accelerator.clip_grad_norm_ = recording_forward, recording_clip
train.evaluate = lambda *arguments: None  # its batches and samples are not recorded
assert train.train(directory)
exchange.save(out / "end", *trained[0])
np.savez(out / "steps.npz", **{name: np.stack(values) for name, values in recorded.items()})
