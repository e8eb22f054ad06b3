"""Evaluate a run's checkpoint with the native engine: RUN_DIR STEP OUT. OUT gets the batches, masks and samples."""

import sys
from pathlib import Path

import numpy as np

from electra_wrap.native import train

directory, step, out = sys.argv[1:]
found: dict[str, list[np.ndarray]] = {}
masked_lm, forward = train.model.masked_lm, train.model.Electra.forward


def recorded_masked_lm(*arguments):
    given = masked_lm(*arguments)
    found.setdefault("sampled", []).append(given[1].numpy())
    return given


def recorded_forward(self, batch):
    for name, value in batch.items():
        found.setdefault(name, []).append(value.numpy())
    return forward(self, batch)


train.model.masked_lm, train.model.Electra.forward = recorded_masked_lm, recorded_forward
train.evaluate(Path(directory), int(step), Path(directory) / "profile.json")
np.savez(out, **{name: np.stack(values) for name, values in found.items()})
