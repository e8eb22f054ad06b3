"""Metrics of both networks, as metric_fn in upstream's run_pretraining.py defines them.

Their names are TensorBoard's tags, the keys of `evaluate --json` and those of the manifest.
"""

from __future__ import annotations

import numpy as np

#: Our name of each metric of upstream's evaluation.
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

#: Thresholds of the ROC curve, and the term that prevents 0/0: the defaults of tf.metrics.auc.
_THRESHOLDS = np.array([-1e-7, *(i / 199 for i in range(1, 199)), 1 + 1e-7], np.float32)
_EPSILON = 1e-6


class Tally:
    """Sums over batches, from which the metrics follow.

    The `sums` of several processes add up to those of all.
    """

    def __init__(self) -> None:
        self.sums = np.zeros(10 + 2 * (len(_THRESHOLDS) + 1))

    def add_generator(
        self, correct: np.ndarray, sampled: np.ndarray, losses: np.ndarray, weights: np.ndarray
    ) -> None:
        """Add a batch's masked tokens; all arrays are [n, masked].

        `correct` and `sampled`: whether the most likely and the sampled token are the original one.
        `losses`: the cross entropies in nats. `weights`: 1 where a token is masked, 0 elsewhere.
        """
        for i, values in enumerate((correct, sampled, losses, 1)):
            self.sums[i] += (weights * values).sum(dtype=np.float64)

    def add_discriminator(
        self, logits: np.ndarray, replaced: np.ndarray, inside: np.ndarray
    ) -> None:
        """Add a batch's tokens; all arrays are [n, length].

        `replaced`: whether the token is not the original one. `inside`: whether there is a token.
        """
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
        # Upstream counts padding as tokens that are not replaced, with probability 0.
        probabilities = np.where(inside, 1 / (1 + np.exp(-logits)), 0).astype(np.float32)
        bins, size = np.searchsorted(_THRESHOLDS, probabilities), len(_THRESHOLDS) + 1
        self.sums[10 : 10 + size] += np.bincount(bins[replaced], minlength=size)
        self.sums[10 + size :] += np.bincount(bins[~replaced], minlength=size)

    def values(self) -> dict[str, float]:
        """Return the metrics: shares from 0 to 1, losses in nats, the AUC by trapezoids.

        NaN where nothing was counted.
        """
        correct, sampled, loss, masked, examples, losses = self.sums[:6]
        tokens, replaced, predicted, true_positives = self.sums[6:10]
        positive, negative = (bins[::-1].cumsum()[::-1] for bins in np.split(self.sums[10:], 2))
        true_rate = (positive[1:] + _EPSILON) / (positive[0] + _EPSILON)
        false_rate = negative[1:] / (negative[0] + _EPSILON)
        with np.errstate(invalid="ignore"):
            values = {
                "loss/generator": loss / masked,
                "loss/discriminator": losses / examples,
                "generator/accuracy": correct / masked,
                "generator/sampled_accuracy": sampled / masked,
                "discriminator/accuracy": 1 - (replaced + predicted - 2 * true_positives) / tokens,
                # As tf.metrics.accuracy: 0/0 is 0.
                "discriminator/precision": true_positives / max(predicted, 1),
                "discriminator/recall": true_positives / max(replaced, 1),
                "discriminator/auc": -np.trapezoid(true_rate, false_rate),  # the rates fall
                "discriminator/replaced": replaced / tokens,
            }
        return {name: float(value) for name, value in values.items()}
