"""Print TensorFlow's streaming metrics of batches.npz, combined as in upstream's metric_fn."""

import json
import sys

import numpy as np
import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()
batches = dict(np.load(sys.argv[1]))
data = tf.data.Dataset.from_tensor_slices(batches)
d = tf.data.make_one_shot_iterator(data).get_next()
inside = tf.cast(d["inside"], tf.float32)
replaced = tf.cast(d["replaced"] & d["inside"], tf.int32)
predicted = tf.cast(d["logits"] > 0, tf.int32)
losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(replaced, tf.float32), d["logits"])
losses *= inside


def accuracy(weights):
    return tf.metrics.accuracy(labels=replaced, predictions=predicted, weights=weights)


metrics = {
    "loss/generator": tf.metrics.mean(d["losses"], d["weights"]),
    "loss/discriminator": tf.metrics.mean(
        tf.reduce_sum(losses, -1) / (1e-6 + tf.reduce_sum(inside, -1))
    ),
    "generator/accuracy": tf.metrics.mean(d["right"], d["weights"]),
    "generator/sampled_accuracy": tf.metrics.mean(d["sampled"], d["weights"]),
    "discriminator/accuracy": accuracy(inside),
    "discriminator/precision": accuracy(inside * tf.cast(predicted, tf.float32)),
    "discriminator/recall": accuracy(inside * tf.cast(replaced, tf.float32)),
    "discriminator/auc": tf.metrics.auc(replaced, tf.sigmoid(d["logits"]), inside),
    "discriminator/auc_with_padding": tf.metrics.auc(replaced, tf.sigmoid(d["logits"]) * inside),
    "discriminator/replaced": tf.metrics.mean(tf.cast(replaced, tf.float32), inside),
}
with tf.Session() as session:
    session.run(tf.local_variables_initializer())
    for _ in range(len(batches["logits"])):
        session.run([update for _, update in metrics.values()])
    print(json.dumps({name: float(session.run(value)) for name, (value, _) in metrics.items()}))
