"""Pre-training examples: built as upstream's build_pretraining_dataset.py builds them, and stored for random access.

A store is a directory with two flat arrays that training maps into memory: `tokens.bin` has the ids of all examples
one after the other, `index.bin` where each example ends and how long its first segment is. An example is a slice, so
shuffling the whole corpus is a permutation of numbers and resuming at any example is arithmetic. (Arrow would do the
same at the price of a large dependency.) Nothing is padded: a token costs two bytes, or four beyond 65,536 words.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import parts, vocab
from electra_wrap.rundir import write_json


@dataclasses.dataclass(frozen=True)
class Example:
    """Ids of `[CLS] first segment [SEP]`, then `second segment [SEP]` if there is one; how many belong to the first."""

    ids: Sequence[int]
    first: int


class Builder:
    """Packs tokenized lines into examples, by the rules and with the random draws of upstream's ExampleBuilder."""

    def __init__(self, max_length: int, cls: int, sep: int, seed: int) -> None:
        self._max_length, self._cls, self._sep = max_length, cls, sep
        self._random = random.Random(seed)
        self._sentences: list[Sequence[int]] = []
        self._length, self._target = 0, max_length

    def add(self, sentence: Sequence[int]) -> Example | None:
        """Add a line's ids; return the example that it fills, if it does."""
        self._sentences.append(sentence)
        self._length += len(sentence)
        return self._pack() if self._length >= self._target else None

    def end(self) -> Example | None:
        """End a document: return what it left, if anything."""
        return self._pack() if self._length else None

    def _pack(self) -> Example:
        draw = self._random.random
        # One segment in a tenth of the examples, else two of about half the length; three places are for [CLS], [SEP].
        half = 100_000 if draw() < 0.1 else (self._target - 3) // 2
        first: list[int] = []
        second: list[int] = []
        for sentence in self._sentences:
            fits = not first or len(first) + len(sentence) < half
            # A sentence that passes the middle goes to either side; the coin is tossed only where it decides.
            if fits or (not second and len(first) < half and draw() < 0.5):
                first.extend(sentence)
            else:
                second.extend(sentence)
        del first[self._max_length - 2 :]
        del second[max(0, self._max_length - len(first) - 3) :]
        self._sentences, self._length = [], 0
        short = draw() < 0.05  # so that the model sees short texts too
        self._target = self._random.randint(5, self._max_length) if short else self._max_length
        ids = [self._cls, *first, self._sep, *([*second, self._sep] if second else [])]
        return Example(ids, len(first) + 2)


def build(
    shard: Path, number: int, tokens: list[str], rules: dict[str, bool], length: int, documents: bool, seed: int
) -> Iterator[Example]:
    """Yield the examples of a shard: those of upstream's process `number`, which is seeded with seed + number.

    `rules` are those of `vocab.build_tokenizer`; `documents`: blank lines separate them.
    """
    builder = Builder(length, tokens.index("[CLS]"), tokens.index("[SEP]"), seed + number)
    ids = _token_ids(tuple(tokens), **rules)
    with parts.open_counted(shard) as file:
        for line in map(str.strip, file):
            if line:
                example = builder.add(ids(line))
            elif documents:
                example = builder.end()
            else:
                continue
            if example:
                yield example
    if example := builder.end():
        yield example


@functools.lru_cache(1)
def _token_ids(tokens: tuple[str, ...], lowercase: bool, strip_accents: bool) -> Callable[[str], Sequence[int]]:
    """What gives the ids of a line; the words that it knows serve all shards of a process."""
    tokenizer = vocab.build_tokenizer(list(tokens), lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.encode_special_tokens = True  # text that says "[MASK]" is text
    return vocab.Words(lambda word: tokenizer.encode(word, add_special_tokens=False).ids).ids


def write(directory: Path, examples: Iterable[Example], vocab_size: int) -> int:
    """Write a store; return the number of examples."""
    directory.mkdir()
    number, end = 0, 0
    code = "H" if vocab_size <= 2**16 else "I"
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "index.bin").open("wb") as index:
        for example in examples:
            end += len(example.ids)
            number += 1
            tokens.write(array.array(code, example.ids).tobytes())
            index.write(array.array("q", (end, example.first)).tobytes())
    write_json(directory / "store.json", {"dtype": f"<u{array.array(code).itemsize}", "examples": number})
    return number


def join(stores: Sequence[Path], directory: Path) -> None:
    """Fill an empty directory with one store of the examples of several, one after the other."""
    number, end = 0, 0
    dtypes = set()
    with (directory / "tokens.bin").open("wb") as tokens, (directory / "index.bin").open("wb") as index:
        for store in stores:
            facts = json.loads((store / "store.json").read_text(encoding="utf-8"))
            dtypes.add(facts["dtype"])
            number += facts["examples"]
            with (store / "tokens.bin").open("rb") as file:
                shutil.copyfileobj(file, tokens, 2**20)
            with (store / "index.bin").open("rb") as file:
                while rows := file.read(2**20):
                    index.write((np.frombuffer(rows, "<i8").reshape(-1, 2) + np.array([end, 0])).tobytes())
            end = tokens.tell() // np.dtype(facts["dtype"]).itemsize
    (dtype,) = dtypes
    write_json(directory / "store.json", {"dtype": dtype, "examples": number})


class Store:
    """A store, mapped into memory."""

    def __init__(self, directory: Path) -> None:
        facts = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self._number = facts["examples"]
        self._tokens = np.memmap(directory / "tokens.bin", facts["dtype"], "r")
        self._index = np.memmap(directory / "index.bin", "<i8", "r", shape=(self._number, 2))

    def __len__(self) -> int:
        return int(self._number)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each of these examples: [n] to [n]."""
        starts = np.where(numbers > 0, self._index[numbers - 1, 0], 0)
        sizes: np.ndarray = self._index[numbers, 0] - starts
        return sizes

    def read(self, numbers: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of these examples, padded with 0, and of each the length of its first segment.

        Shapes: [n] to [n, length] and [n].
        """
        sizes = self.sizes(numbers)
        places = np.arange(length)
        inside = places < sizes[:, None]
        flat = np.where(inside, (self._index[numbers, 0] - sizes)[:, None] + places, 0)
        return np.where(inside, self._tokens[flat], 0).astype(np.int64), self._index[numbers, 1]


def main(text: str, vocabulary: str, out: str, jobs: dict[str, Any], **keys: Any) -> None:
    """Build parts of the examples of the shards in `text`; `keys` are those of `build`."""
    shards, tokens = sorted(Path(text).iterdir()), vocab.read(Path(vocabulary))

    def job(number: int, store: Path) -> int:
        return write(store, build(shards[number], number, tokens, **keys), len(tokens))

    parts.build(job, Path(out), **jobs)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
