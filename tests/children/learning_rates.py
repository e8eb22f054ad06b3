"""Print the learning rates that upstream's optimizer uses in steps 0 to 4 of 10, as JSON.

There are four steps of warm-up, at rate 1. A weight with gradient 1, no weight decay, and slots
that make Adam's update 1 moves by the learning rate.
"""

import json
import os
import sys
import tempfile

sys.path.insert(0, sys.argv[1])
os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'

import numpy as np
import tensorflow.compat.v1 as tf1
from model import optimization

from electra_wrap.upstream.tf1 import tf

weights: list[float] = []


def model_fn(features, labels, mode, params):
    weight = tf.get_variable("w", [], initializer=tf.zeros_initializer())
    loss = weight + 0.0 * tf.cast(features, tf.float32)
    train_op = optimization.create_optimizer(loss, 1.0, 10, warmup_steps=4)
    for slot in ("w/adam_m", "w/adam_v"):  # of a gradient that was always 1
        variable = next(v for v in tf.global_variables() if v.name == f"{slot}:0")
        variable._initializer_op = variable.assign(1.0).op
    tf.estimator.watch(disc_probs=tf.sigmoid(loss), sampled_tokids=loss)
    record = tf.py_func(lambda w: weights.append(float(w)) or np.int32(0), [weight], tf.int32)

    class Hook(tf.estimator.SessionRunHook):
        def after_run(self, context, values):
            context.session.run(record)

    return tf.estimator.tpu.TPUEstimatorSpec(
        mode=mode, loss=loss, train_op=train_op, training_hooks=[Hook()]
    )


with tempfile.TemporaryDirectory() as directory:
    config = tf.estimator.tpu.RunConfig(
        cluster=None,
        model_dir=directory,
        save_checkpoints_steps=100,
        keep_checkpoint_max=1,
        tpu_config=tf.estimator.tpu.TPUConfig(iterations_per_loop=100),
    )
    estimator = tf.estimator.tpu.TPUEstimator(
        model_fn, config, train_batch_size=1, eval_batch_size=1
    )
    estimator.train(lambda params: tf1.data.Dataset.range(10), max_steps=5)
# Adam's update is m / (sqrt(v) + 1e-6) with m = v = 1, as long as the gradient is 1.
print(json.dumps([before - after for before, after in zip([0.0, *weights], weights, strict=False)]))
