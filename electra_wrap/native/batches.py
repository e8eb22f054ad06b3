"""What one training step sees: which examples, which tokens are masked, and the random numbers for sampling.

A batch is a pure function of (seed, step): nothing has to be remembered to resume at a step, and any number of
processes and micro-batches that divide it among themselves see the same batch.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from electra_wrap.errors import StageFailed
from electra_wrap.native.examples import Store

#: Share of the chosen tokens that become [MASK]; the others stay as they are, and are predicted all the same.
MASKED_SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are chosen: their share, and the ids of [MASK] and of the special tokens never chosen."""

    probability: float
    mask: int
    never: tuple[int, ...]

    def most(self, length: int) -> int:
        """Most tokens chosen in a sequence: max_predictions_per_seq of the pin's configure_pretraining.py."""
        return int((self.probability + 0.005) * length)

    def numbers(self, sizes: np.ndarray, length: int) -> np.ndarray:
        """How many tokens are chosen in sequences of `sizes` tokens; rounded half to even, in float32, as upstream."""
        wanted = np.round(sizes.astype(np.float32) * np.float32(self.probability)).astype(np.int64)
        return np.maximum(1, np.minimum(self.most(length), wanted))

    def choose(self, ids: np.ndarray, sizes: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choose positions with replacement among the tokens that are not special, each as likely as the other.

        ids [n, length], sizes [n], draws [n, most] in [0, 1). Returns positions and weights, both [n, most]; where
        the weight is 0, nothing is chosen and the position is 0.
        """
        length = ids.shape[1]
        candidates = (np.arange(length) < sizes[:, None]) & ~np.isin(ids, (*self.never, self.mask))
        candidates_first = np.argsort(~candidates, axis=1, kind="stable")
        ranks = (draws * candidates.sum(1, keepdims=True)).astype(np.int64)
        positions = np.take_along_axis(candidates_first, ranks, 1)
        chosen = np.arange(draws.shape[1]) < self.numbers(sizes, length)[:, None]
        return np.where(chosen, positions, 0), chosen.astype(np.float32)

    def apply(self, ids: np.ndarray, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return `ids` with [MASK] at the chosen positions whose draw is below 0.85; at position 0 nothing changes."""
        masked = ids.copy()
        rows, columns = np.nonzero((draws < MASKED_SHARE) & (positions > 0))
        masked[rows, positions[rows, columns]] = self.mask
        return masked


@functools.lru_cache(maxsize=2)  # a batch lies in one epoch or two
def _order(seed: int, epoch: int, number: int) -> np.ndarray:
    order = np.arange(number, dtype=np.uint32 if number < 2**32 else np.uint64)
    _random(seed, 2 * int(epoch)).shuffle(order)
    return order


def _random(seed: int, number: int) -> np.random.Generator:
    """The `number`th stream of random numbers of a seed: even numbers for epochs, odd ones for steps."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


class Batches:
    """Micro-batches by number, for one process of several: number = step × `micro_batches` + micro-batch.

    Examples come in an order that is shuffled over the whole store, anew in each epoch, or else as they are.
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
        shuffled: bool = True,
    ) -> None:
        self._store, self._masking, self._length, self._seed = store, masking, length, seed
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._rows = batch_size // (micro_batches * processes)
        self._processes, self._process, self._shuffled = processes, process, shuffled

    def examples(self, step: int) -> np.ndarray:
        """Numbers of the examples in the batch of a step: [batch_size]."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, places = np.divmod(places, len(self._store))
        if not self._shuffled:
            return places
        orders = [_order(self._seed, epoch, len(self._store))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(orders).astype(np.int64)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Return this process's rows of a micro-batch, and the totals of the whole batch that the losses are over."""
        step, micro_batch = divmod(number, self._micro_batches)
        numbers = self.examples(step)
        sizes = self._store.sizes(numbers)
        draws = _random(self._seed, 2 * step + 1).random((3, self._batch_size, self._masking.most(self._length)))
        first = (micro_batch * self._processes + self._process) * self._rows
        rows = slice(first, first + self._rows)
        ids, firsts = self._store.read(numbers[rows], self._length)
        positions, weights = self._masking.choose(ids, sizes[rows], draws[0, rows])
        if not positions.any():  # only [CLS], which is never chosen, is at 0
            raise StageFailed(f"no example of step {step + 1:,} has a token that could be masked; look at the corpus")
        return {
            "ids": ids,
            "sizes": sizes[rows],
            "firsts": firsts,
            "positions": positions,
            "weights": weights,
            "masked": self._masking.apply(ids, positions, draws[1, rows]),
            "draws": draws[2, rows].astype(np.float32),
            "chosen": np.asarray(self._masking.numbers(sizes, self._length).sum(), np.float32),
            "tokens": np.asarray(sizes.sum(), np.float32),
        }
