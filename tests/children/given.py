"""Recorded batches as upstream's features."""

import numpy as np


def features(given):
    """Batches, masks and samples of native_steps.py or native_evaluation.py, [steps, n, …], under upstream's names."""
    inside = np.arange(given["ids"].shape[2]) < given["sizes"][..., None]
    arrays = {
        "input_ids": given["ids"],
        "input_mask": inside,
        "segment_ids": inside & (np.arange(given["ids"].shape[2]) >= given["firsts"][..., None]),
        "masked_lm_positions": given["positions"],
        "masked_lm_ids": np.take_along_axis(given["ids"], given["positions"], 2) * (given["weights"] > 0),
        "masked_lm_weights": given["weights"],
        "masked": given["masked"],
        "sampled": given["sampled"].reshape(given["positions"].shape),
    }
    return {name: value.astype(np.float32 if "weights" in name else np.int32) for name, value in arrays.items()}
