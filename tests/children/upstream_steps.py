"""Repeat the steps of native_steps.py in upstream's graph, with its optimizer, from a checkpoint.

Data, masks and samples are those of steps.npz; dropout is off. OUT, an .npz file, gets the first
gradients, and the model's directory a checkpoint of the last step.
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
gradients = []
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


optimization.tf.clip_by_global_norm = recording_clip
estimator._scalars = recording_scalars
run_pretraining.train_or_eval(config)
np.savez(out, **gradients[0])
