"""Repeat the steps of native_steps.py in upstream's graph, with its optimizer, from a checkpoint.

Data, masks and samples are those of steps.npz; dropout is off. Writes losses.npz and gradients.npz
into OUT, and a checkpoint of the last step into the model's directory.
"""

import json
import os
import sys
from pathlib import Path

checkout, data_dir, model_name, hparams, steps, out = sys.argv[1:]
sys.path.insert(0, checkout)
os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'

import configure_pretraining  # noqa: E402
import given  # noqa: E402
import numpy as np  # noqa: E402
import run_pretraining  # noqa: E402
from model import modeling, optimization  # noqa: E402
from pretrain import pretrain_data, pretrain_helpers  # noqa: E402

tf = run_pretraining.tf
config = configure_pretraining.PretrainingConfig(
    model_name, data_dir, **json.loads(Path(hparams).read_text())
)
recorded = dict(np.load(steps))
arrays = given.features(recorded)

tensors: dict[str, object] = {}
features: dict[str, object] = {}
losses: list[list[float]] = []
modeling.dropout = lambda tensor, probability: tensor
pretrain_helpers.mask = lambda config, inputs, *rest: pretrain_data.get_updated_inputs(
    inputs, input_ids=features["masked"]
)
pretrain_helpers.sample_from_softmax = lambda logits, disallow=None: tf.one_hot(
    features["sampled"], config.vocab_size, dtype=tf.float32
)

clip = optimization.tf.clip_by_global_norm


def recorded_clip(gradients, **keys):
    names = (variable.name.removesuffix(":0") for variable in tf.trainable_variables())
    tensors["gradients"] = dict(zip(names, gradients, strict=True))
    return clip(gradients, **keys)


optimization.tf.clip_by_global_norm = recorded_clip


def record_loss(name, method):
    def recorded(*arguments):
        output = method(*arguments)
        tensors[name] = output.loss
        return output

    return recorded


graph = run_pretraining.PretrainingModel
graph._get_masked_lm_output = record_loss("generator", graph._get_masked_lm_output)
graph._get_discriminator_output = record_loss("discriminator", graph._get_discriminator_output)


class Record(tf.estimator.SessionRunHook):
    def before_run(self, context):
        names = ["loss", "generator", "discriminator"]
        if not losses:  # the first step
            names.append("gradients")
        return tf.estimator.SessionRunArgs({name: tensors[name] for name in names})

    def after_run(self, context, values):
        results = values.results
        if not losses:
            np.savez(Path(out) / "gradients.npz", **results["gradients"])
        losses.append([float(results[name]) for name in ("loss", "generator", "discriminator")])


build = run_pretraining.model_fn_builder(config)


def model_fn(batch, labels, mode, params):
    features.update(batch)
    spec = build(batch, labels, mode, params)
    tensors["loss"] = spec.loss
    spec.training_hooks = [Record()]
    return spec


tpu = tf.estimator.tpu
estimator = tpu.TPUEstimator(
    model_fn,
    tpu.RunConfig(
        cluster=None,
        model_dir=config.model_dir,
        save_checkpoints_steps=1000,
        keep_checkpoint_max=5,
        tpu_config=tpu.TPUConfig(iterations_per_loop=1000),
    ),
    train_batch_size=config.train_batch_size,
    eval_batch_size=1,
)
estimator.train(
    lambda params: tf.data.Dataset.from_tensor_slices(arrays), max_steps=config.num_train_steps
)
np.savez(Path(out) / "losses.npz", losses=np.array(losses))
