"""Record what the native engine does without dropout: RUN_DIR OUT [SAMPLES | STEP].

It trains the run, or evaluates the checkpoint of STEP. OUT gets steps.npz, the batches, masks,
samples and losses of each step, and gradients.npz of the first. SAMPLES, an .npy file, replace the
generator's samples.
"""

import sys
from pathlib import Path

import native_no_dropout  # noqa: F401 - turns dropout off
import numpy as np
import torch
from accelerate import Accelerator

from electra_wrap.native import evaluate, model, train

directory, out = map(Path, sys.argv[1:3])
option = "".join(sys.argv[3:])
samples = iter(np.load(option)) if option.endswith(".npy") else None
recorded: dict[str, list[np.ndarray]] = {}
networks = []


def record(values):
    for name, value in values.items():
        recorded.setdefault(name, []).append(value.detach().numpy())


masked_lm, forward, clip = model.masked_lm, model.Electra.forward, Accelerator.clip_grad_norm_


def recording_masked_lm(*arguments):
    loss, sampled, *rest = masked_lm(*arguments)
    if samples is not None:
        sampled = torch.from_numpy(next(samples))
    record({"sampled": sampled})
    return loss, sampled, *rest


def recording_forward(self, batch):
    networks.append(self)
    outputs = forward(self, batch)
    record(batch | {tag: outputs[name] for name, tag in evaluate.LOSSES.items()})
    return outputs


def recording_clip(self, *arguments):
    if len(networks) == 1:
        parameters = networks[0].named_parameters(remove_duplicate=False)
        gradients = {name: parameter.grad for name, parameter in parameters}
        np.savez(out / "gradients.npz", **gradients)
    return clip(self, *arguments)


model.masked_lm, model.Electra.forward = recording_masked_lm, recording_forward
Accelerator.clip_grad_norm_ = recording_clip
if option.isdecimal():
    evaluate.evaluate_checkpoint(directory, int(option))
else:
    train.evaluate = lambda *arguments: None  # its batches and samples are not recorded
    assert train.train(directory)
np.savez(out / "steps.npz", **{name: np.stack(values) for name, values in recorded.items()})
