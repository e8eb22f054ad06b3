"""Write the results of upstream's masking of given sequences, with given positions and coins."""

import os
import sys

checkout, vocabulary, source, target, probability = sys.argv[1:]
sys.path.insert(0, checkout)
os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'

import configure_pretraining  # noqa: E402
import numpy as np  # noqa: E402
import run_pretraining  # noqa: E402, F401  (the patches' TensorFlow)
from pretrain import pretrain_data, pretrain_helpers  # noqa: E402

tf = pretrain_helpers.tf
given = np.load(source)
ids = given["ids"].astype(np.int32)
inside = np.arange(ids.shape[1]) < given["sizes"][:, None]
config = configure_pretraining.PretrainingConfig(
    "m", "x", max_seq_length=ids.shape[1], vocab_file=vocabulary, mask_prob=float(probability)
)
logits = []


def categorical(values, number, dtype):
    logits.append(values)
    return tf.constant(given["positions"], dtype)


tf.random.categorical = categorical
tf.random.uniform = lambda shape, *rest, **keys: tf.constant(given["coins"], tf.float32)
inputs = pretrain_data.Inputs(
    tf.constant(ids), tf.constant(inside, tf.int32), None, None, None, None
)
masked = pretrain_helpers.mask(config, inputs, config.mask_prob)
with tf.Session() as session:
    results = session.run(
        {
            "candidates": logits[0],
            "masked": masked.input_ids,
            "positions": masked.masked_lm_positions,
            "labels": masked.masked_lm_ids,
            "weights": masked.masked_lm_weights,
        }
    )
np.savez(target, **results)
