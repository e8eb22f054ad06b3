"""Evaluate a checkpoint with the native engine, and record its batches: RUN_DIR CHECKPOINT OUT.

OUT, an .npz file, gets the batches, masks and samples.
"""

import sys
from pathlib import Path

import numpy as np

from electra_wrap.native import evaluate, model

directory, checkpoint, out = sys.argv[1:]
recorded: dict[str, list[np.ndarray]] = {}
masked_lm, forward = model.masked_lm, model.Electra.forward


def recording_masked_lm(*arguments):
    outputs = masked_lm(*arguments)
    recorded.setdefault("sampled", []).append(outputs[1].numpy())
    return outputs


def recording_forward(self, batch):
    for name, value in batch.items():
        recorded.setdefault(name, []).append(value.numpy())
    return forward(self, batch)


model.masked_lm, model.Electra.forward = recording_masked_lm, recording_forward
evaluate.evaluate_checkpoint(Path(directory), Path(checkpoint))
np.savez(out, **{name: np.stack(values) for name, values in recorded.items()})
