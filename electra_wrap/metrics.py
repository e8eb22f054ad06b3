"""Metrics of both networks, as upstream's evaluation defines them (metric_fn in run_pretraining.py of the pin).

Their names are TensorBoard's tags, the keys of `evaluate --json` and those of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

#: Names of upstream's own evaluation, and ours.
UPSTREAM = {
    "loss": "loss/total",
    "masked_lm_loss": "loss/generator",
    "disc_loss": "loss/discriminator",
    "masked_lm_accuracy": "generator/accuracy",
    "sampled_masked_lm_accuracy": "generator/sampled_accuracy",
    "disc_accuracy": "discriminator/accuracy",
    "disc_precision": "discriminator/precision",
    "disc_recall": "discriminator/recall",
    "disc_auc": "discriminator/auc",
}

#: Where the ROC curve is measured, and what keeps 0/0 away: the defaults of tf.metrics.auc.
_THRESHOLDS = np.array([-1e-7, *(i / 199 for i in range(1, 199)), 1 + 1e-7], np.float32)
_EPSILON = 1e-6


def follow(on_scalars: Callable[[dict[str, Any]], None]) -> Callable[[str], None]:
    """Return what reads a trainer's output, and passes on its lines of JSON that have scalars."""

    def read(line: str) -> None:
        if line.startswith(('{"step"', '{"evaluated"')):
            on_scalars(json.JSONDecoder().raw_decode(line)[0])  # another process may have ended the line

    return read


class Tally:
    """Sums over batches from which the metrics follow. `sums` of several processes add up to those of all."""

    def __init__(self) -> None:
        self.sums = np.zeros(10 + 2 * (len(_THRESHOLDS) + 1))

    def add_generator(self, right: np.ndarray, sampled: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        """Add a batch's masked tokens, each array [n, masked]: 1 where the likeliest token is the right one, where the
        sampled one is, the cross entropies, and 1 where something is masked at all."""
        self.sums[:4] += [(weights * values).sum(dtype=np.float64) for values in (right, sampled, losses, 1)]

    def add_discriminator(self, logits: np.ndarray, replaced: np.ndarray, inside: np.ndarray) -> None:
        """Add a batch's tokens, each array [n, length]: the logits, where a token was replaced, where there is one."""
        logits, inside = logits.astype(np.float32), inside.astype(bool)
        replaced, predicted = replaced.astype(bool) & inside, (logits > 0) & inside
        losses = np.logaddexp(0, np.where(replaced, -logits, logits)) * inside
        self.sums[4:10] += [
            len(logits),
            (losses.sum(1) / (1e-6 + inside.sum(1))).sum(dtype=np.float64),
            inside.sum(),
            replaced.sum(),
            predicted.sum(),
            (replaced & predicted).sum(),
        ]
        # What is no token counts, as it does upstream, as one that was not replaced and has the probability 0.
        above = np.searchsorted(_THRESHOLDS, np.where(inside, 1 / (1 + np.exp(-logits)), 0).astype(np.float32))
        counts = [np.bincount(above[kind], minlength=len(_THRESHOLDS) + 1) for kind in (replaced, ~replaced)]
        self.sums[10:] += np.concatenate(counts)

    def values(self) -> dict[str, float]:
        """The metrics: shares from 0 to 1, losses in nats, AUC by trapezoids. NaN where there was nothing to count."""
        right, sampled, loss, masked, examples, losses, tokens, replaced, predicted, found = self.sums[:10]
        positive, negative = (part[::-1].cumsum()[::-1] for part in np.split(self.sums[10:], 2))
        true = (positive[1:] + _EPSILON) / (positive[0] + _EPSILON)
        false = negative[1:] / (negative[0] + _EPSILON)
        with np.errstate(invalid="ignore"):
            values = {
                "loss/generator": loss / masked,
                "loss/discriminator": losses / examples,
                "generator/accuracy": right / masked,
                "generator/sampled_accuracy": sampled / masked,
                "discriminator/accuracy": 1 - (replaced + predicted - 2 * found) / tokens,
                # As tf.metrics.accuracy: 0 of 0 is 0.
                "discriminator/precision": found / max(predicted, 1),
                "discriminator/recall": found / max(replaced, 1),
                "discriminator/auc": ((false[:-1] - false[1:]) * (true[:-1] + true[1:]) / 2).sum(),
                "discriminator/replaced": replaced / tokens,
            }
        return {name: float(value) for name, value in values.items()}
