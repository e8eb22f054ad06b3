"""The `tf` of the patched scripts: TensorFlow 2's v1 API, and what it lacks of TensorFlow 1.15.

The patches bind this module's `tf` over the scripts' own `import tensorflow.compat.v1 as tf`. It
adds `tf.estimator` (estimator.py), `tf.layers.dense`, and contrib's `layer_norm`. Variable names
and initial distributions are those of TensorFlow 1.15, because checkpoints are read by name.
"""

from __future__ import annotations

from typing import Any

import tensorflow.compat.v1 as tf1

from electra_wrap.upstream import estimator

tf1.disable_v2_behavior()
# disable_v2_behavior() restores reference variables, which XLA cannot compile. Both kinds have the
# same names and values in a checkpoint.
tf1.enable_resource_variables()


class Layers:
    """The part of `tf.layers` that the scripts use. Keras 3 has none of it."""

    @staticmethod
    def dense(
        inputs: Any,
        units: int,
        activation: Any = None,
        kernel_initializer: Any = None,
        name: str | None = None,
    ) -> Any:
        """Return `activation(inputs @ kernel + bias)` over the last axis: [..., n] to [..., units].

        Unnamed layers are `dense`, `dense_1`, … within their variable scope. Without an initializer
        the kernel is Glorot-uniform. The bias starts at zero.
        """
        width = int(inputs.shape[-1])
        with tf1.variable_scope(name, default_name="dense"):
            kernel = tf1.get_variable("kernel", [width, units], initializer=kernel_initializer)
            bias = tf1.get_variable("bias", [units], initializer=tf1.zeros_initializer())
            # A single matrix product. A batched one of rank 3 is slower and rounds differently.
            outputs = tf1.nn.bias_add(tf1.tensordot(inputs, kernel, 1), bias)
            return outputs if activation is None else activation(outputs)

    @staticmethod
    def layer_norm(
        inputs: Any, begin_norm_axis: int, begin_params_axis: int, scope: str | None
    ) -> Any:
        """Normalize the last axis as tf.contrib.layers.layer_norm does, with epsilon 1e-12.

        The variables are `beta` and `gamma`.
        """
        width = [int(inputs.shape[-1])]
        with tf1.variable_scope(scope, default_name="LayerNorm"):
            beta = tf1.get_variable("beta", width, initializer=tf1.zeros_initializer())
            gamma = tf1.get_variable("gamma", width, initializer=tf1.ones_initializer())
        mean, variance = tf1.nn.moments(inputs, [-1], keep_dims=True)
        return tf1.nn.batch_normalization(inputs, mean, variance, beta, gamma, 1e-12)


class TensorFlow1:
    """`tensorflow.compat.v1` with `estimator` and `layers` replaced."""

    estimator = estimator
    layers = Layers

    def __getattr__(self, name: str) -> Any:
        return getattr(tf1, name)


tf = TensorFlow1()
