"""Recorded batches as upstream's features."""

import numpy as np


def features(given):
    """Return batches, masks and samples [steps, n, …] under upstream's names.

    `given` is what native_steps.py or native_evaluation.py recorded.
    """
    ids, positions, weights = given["ids"], given["positions"], given["weights"]
    place = np.arange(ids.shape[2])
    inside = place < given["sizes"][..., None]
    second = place >= given["first_segment_lengths"][..., None]
    arrays = {
        "input_ids": ids,
        "input_mask": inside,
        "segment_ids": inside & second,
        "masked_lm_positions": positions,
        "masked_lm_ids": np.take_along_axis(ids, positions, 2) * (weights > 0),
        "masked_lm_weights": weights,
        "masked": given["masked"],
        "sampled": given["sampled"].reshape(positions.shape),
    }
    return {
        name: value.astype(np.float32 if "weights" in name else np.int32)
        for name, value in arrays.items()
    }
