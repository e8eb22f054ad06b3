"""Recorded batches, masks and samples in place of what upstream's graph reads and draws.

Importing it makes upstream's scripts importable. It takes the checkout's path, the first argument,
from sys.argv.
"""

import os
import sys

import numpy as np

sys.path.insert(0, sys.argv.pop(1))
os.environ.setdefault("ELECTRA_WRAP_RUNTIME", '{"seed": 0, "precision": "auto", "devices": []}')


def features(recorded):
    """Return batches, masks and samples [steps, n, …] under upstream's names.

    `recorded` is what native_steps.py recorded.
    """
    ids, positions, weights = recorded["ids"], recorded["positions"], recorded["weights"]
    place = np.arange(ids.shape[2])
    inside = place < recorded["sizes"][..., None]
    second = place >= recorded["first_segment_lengths"][..., None]
    return {
        "input_ids": ids,
        "input_mask": inside,
        "segment_ids": inside & second,
        "masked_lm_positions": positions,
        "masked_lm_ids": np.take_along_axis(ids, positions, 2) * (weights > 0),
        "masked_lm_weights": weights,
        "masked": recorded["masked"],
        "sampled": recorded["sampled"].reshape(positions.shape),
    }


def install(values):
    """Have upstream read `values`, the result of `features`, and mask and sample accordingly.

    Return the dataset's elements as arrays.
    """
    import run_pretraining
    from pretrain import pretrain_data, pretrain_helpers

    tf = run_pretraining.tf
    arrays = {
        name: value.astype(np.float32 if name == "masked_lm_weights" else np.int32)
        for name, value in values.items()
    }
    batch = {}
    features_to_inputs = pretrain_data.features_to_inputs

    def recorded_inputs(features):
        batch.update(features)
        return features_to_inputs(features)

    def read(params):
        return tf.data.Dataset.from_tensor_slices(arrays)

    def mask(config, inputs, *rest):
        return pretrain_data.get_updated_inputs(inputs, input_ids=batch["masked"])

    def sample(logits, disallow=None):
        return tf.one_hot(batch["sampled"], int(logits.shape[-1]), dtype=tf.float32)

    pretrain_data.features_to_inputs = recorded_inputs
    pretrain_data.get_input_fn = lambda config, is_training: read
    pretrain_helpers.mask, pretrain_helpers.sample_from_softmax = mask, sample
    return arrays
