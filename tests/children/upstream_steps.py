"""Repeat the steps of native_steps.py in upstream's graph, with its optimizer, from a checkpoint.

Data, masks and samples are those of steps.npz; dropout is off. Writes losses.npz and gradients.npz
into OUT, and a checkpoint of the last step into the model's directory.
"""

import json
import sys
from pathlib import Path

import given  # isort: split

import configure_pretraining
import numpy as np
import run_pretraining
from model import modeling, optimization

from electra_wrap.upstream import estimator

data_dir, model_name, hparams, steps, out = sys.argv[1:]
values = json.loads(Path(hparams).read_text()) | {"iterations_per_loop": 1}  # logs every step
config = configure_pretraining.PretrainingConfig(model_name, data_dir, **values)
given.install(given.features(dict(np.load(steps))))
modeling.dropout = lambda tensor, probability: tensor
gradients, losses = [], []
clip, scalars = optimization.tf.clip_by_global_norm, estimator._scalars


def recording_clip(values, **keys):
    names = [
        variable.name.removesuffix(":0") for variable in run_pretraining.tf.trainable_variables()
    ]
    estimator.watch(gradients=dict(zip(names, values, strict=True)))
    return clip(values, **keys)


def recording_scalars(values):
    gradients.append(values["gradients"])
    return scalars(values)


def record(step):
    losses.append(
        [step.scalars[f"loss/{name}"] for name in ("total", "generator", "discriminator")]
    )


optimization.tf.clip_by_global_norm = recording_clip
estimator._scalars, estimator.events.emit = recording_scalars, record
run_pretraining.train_or_eval(config)
np.savez(Path(out) / "losses.npz", losses=np.array(losses))
np.savez(Path(out) / "gradients.npz", **gradients[0])
