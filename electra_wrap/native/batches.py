"""Batches: which examples a step sees, which tokens are masked, and the draws for sampling.

A batch is a pure function of the seed and the step. So resuming at a step needs no state, and any
number of processes and micro-batches that divide a batch see the same one.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from electra_wrap.errors import StageFailed
from electra_wrap.native.examples import Store
from electra_wrap.profile import Model

#: Share of the chosen tokens that become [MASK]. The others stay, and are predicted all the same.
MASKED_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens to predict are chosen. `special_ids` are never chosen, nor is `mask_id`."""

    mask_prob: float
    max_predictions: int
    mask_id: int
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, model: Model, tokens: list[str]) -> Masking:
        """Return the masking of a profile's model with a vocabulary."""
        return cls(
            mask_prob=model.mask_prob,
            max_predictions=model.max_predictions_per_seq,
            mask_id=tokens.index("[MASK]"),
            special_ids=(tokens.index("[SEP]"), tokens.index("[CLS]")),
        )

    def counts(self, sizes: np.ndarray) -> np.ndarray:
        """Return how many tokens are chosen in sequences of `sizes` tokens: [n] to [n].

        Rounded half to even, in float32, as upstream.
        """
        rounded = np.round(sizes.astype(np.float32) * np.float32(self.mask_prob)).astype(np.int64)
        return np.maximum(1, np.minimum(self.max_predictions, rounded))

    def choose(
        self, ids: np.ndarray, sizes: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose positions uniformly, with replacement, among the tokens that are not special.

        ids [n, length], sizes [n], draws [n, max_predictions] in [0, 1). Return positions and
        weights, both [n, max_predictions]. Where the weight is 0, nothing is chosen and the
        position is 0.
        """
        inside = np.arange(ids.shape[1]) < sizes[:, None]
        candidates = inside & ~np.isin(ids, (*self.special_ids, self.mask_id))
        candidates_first = np.argsort(~candidates, axis=1, kind="stable")
        ranks = (draws * candidates.sum(1, keepdims=True)).astype(np.int64)
        positions = np.take_along_axis(candidates_first, ranks, 1)
        chosen = np.arange(draws.shape[1]) < self.counts(sizes)[:, None]
        return np.where(chosen, positions, 0), chosen.astype(np.float32)

    def apply(self, ids: np.ndarray, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return `ids` with [MASK] at the chosen positions whose draw is below MASKED_SHARE."""
        masked = ids.copy()
        rows, columns = np.nonzero((draws < MASKED_SHARE) & (positions > 0))
        masked[rows, positions[rows, columns]] = self.mask_id
        return masked


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch or two
def _order(seed: int, epoch: int, number: int) -> np.ndarray:
    order = np.arange(number, dtype=np.uint32 if number < 2**32 else np.uint64)
    _random(seed, 2 * epoch).shuffle(order)
    return order


def _random(seed: int, stream: int) -> np.random.Generator:
    """Return a stream of random numbers of a seed: even streams are epochs, odd ones steps."""
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


class Batches:
    """Micro-batches by number, for one of several processes.

    The number is step × `micro_batches` + micro-batch. Examples come in an order that is shuffled
    over the whole store, anew in each epoch; or in the order of the store, if not `shuffle`.
    """

    def __init__(
        self,
        store: Store,
        masking: Masking,
        *,
        length: int,
        batch_size: int,
        seed: int,
        micro_batches: int = 1,
        processes: int = 1,
        process: int = 0,
        shuffle: bool = True,
    ) -> None:
        self._store, self._masking, self._length, self._seed = store, masking, length, seed
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._rows = batch_size // (micro_batches * processes)
        self._processes, self._process, self._shuffle = processes, process, shuffle

    def examples(self, step: int) -> np.ndarray:
        """Return the numbers of the examples in a step's batch: [batch_size]."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, positions = np.divmod(positions, len(self._store))
        if not self._shuffle:
            return positions
        numbers = [
            _order(self._seed, int(epoch), len(self._store))[positions[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(numbers).astype(np.int64)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Return this process's rows of a micro-batch.

        `chosen` and `tokens` are totals of the whole batch, by which the losses are divided.
        """
        step, micro_batch = divmod(number, self._micro_batches)
        numbers = self.examples(step)
        sizes = self._store.sizes(numbers)
        shape = (3, self._batch_size, self._masking.max_predictions)
        draws = _random(self._seed, 2 * step + 1).random(shape)
        start = (micro_batch * self._processes + self._process) * self._rows
        rows = slice(start, start + self._rows)
        ids, first_segment_lengths = self._store.read(numbers[rows], self._length)
        positions, weights = self._masking.choose(ids, sizes[rows], draws[0, rows])
        if not positions.any():  # position 0 is [CLS], which is never chosen
            raise StageFailed(
                f"no example of step {step + 1:,} has a token that could be masked; check the "
                "corpus"
            )
        return {
            "ids": ids,
            "sizes": sizes[rows],
            "first_segment_lengths": first_segment_lengths,
            "positions": positions,
            "weights": weights,
            "masked": self._masking.apply(ids, positions, draws[1, rows]),
            "draws": draws[2, rows].astype(np.float32),
            "chosen": np.asarray(self._masking.counts(sizes).sum(), np.float32),
            "tokens": np.asarray(sizes.sum(), np.float32),
        }
