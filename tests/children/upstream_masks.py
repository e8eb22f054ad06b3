"""Write the results of upstream's masking of given sequences, with given positions and coins."""

import sys

import given  # noqa: F401

# isort: split

import configure_pretraining
import numpy as np
import run_pretraining  # noqa: F401  (the patches' TensorFlow)
from pretrain import pretrain_data, pretrain_helpers

vocabulary, source, target, probability = sys.argv[1:]
tf = pretrain_helpers.tf
values = np.load(source)
ids = values["ids"].astype(np.int32)
inside = np.arange(ids.shape[1]) < values["sizes"][:, None]
config = configure_pretraining.PretrainingConfig(
    "m", "x", max_seq_length=ids.shape[1], vocab_file=vocabulary, mask_prob=float(probability)
)
fetches = {}


def categorical(logits, number, dtype):
    fetches["candidates"] = logits
    return tf.constant(values["positions"], dtype)


tf.random.categorical = categorical
tf.random.uniform = lambda shape, *rest, **keys: tf.constant(values["coins"], tf.float32)
features = {"input_ids": tf.constant(ids), "input_mask": tf.constant(inside, tf.int32)}
inputs = pretrain_data.features_to_inputs(features | {"segment_ids": None})
masked = pretrain_helpers.mask(config, inputs, config.mask_prob)
fetches["masked"], fetches["positions"] = masked.input_ids, masked.masked_lm_positions
fetches["labels"], fetches["weights"] = masked.masked_lm_ids, masked.masked_lm_weights
with tf.Session() as session:
    np.savez(target, **session.run(fetches))
