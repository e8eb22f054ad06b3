"""Pre-training examples: built as upstream's build_pretraining_dataset.py builds them, and stored.

A store is a directory with two flat arrays that training maps into memory. `tokens.bin` holds the
ids of all examples, one after the other, in 2 bytes each, or 4 beyond 65,536 tokens. `index.bin`
holds two 64-bit integers for each example: where it ends, and the length of its first segment.
`store.json` holds the type of the ids and the number of examples.

Runs as a child process, with a job as JSON to build parts, or to answer `call`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import subprocesses
from electra_wrap.data import parts, tfrecords, vocab
from electra_wrap.files import write_json
from electra_wrap.profile import Profile


@dataclasses.dataclass(frozen=True)
class Example:
    """The ids of an example: `[CLS] segment [SEP]` or `[CLS] segment [SEP] second segment [SEP]`.

    `first_length` is the length of the first segment with its special tokens.
    """

    ids: Sequence[int]
    first_length: int


class Builder:
    """Packs tokenized lines into examples, with the rules and the random draws of upstream's
    ExampleBuilder."""

    def __init__(self, max_length: int, tokens: list[str], seed: int) -> None:
        self._max_length = max_length
        self._cls, self._sep = tokens.index("[CLS]"), tokens.index("[SEP]")
        self._random = random.Random(seed)
        self._sentences: list[Sequence[int]] = []
        self._length, self._target = 0, max_length

    def add(self, sentence: Sequence[int]) -> Example | None:
        """Add the ids of a line. Return the example that it completes, if any."""
        self._sentences.append(sentence)
        self._length += len(sentence)
        return self._pack() if self._length >= self._target else None

    def end_document(self) -> Example | None:
        """Return an example of the lines that are left, if any."""
        return self._pack() if self._length else None

    def _pack(self) -> Example:
        draw = self._random.random
        # A tenth of the examples have one segment, the others two of about half the length. Three
        # tokens are [CLS] and [SEP].
        half = 100_000 if draw() < 0.1 else (self._target - 3) // 2
        first: list[int] = []
        second: list[int] = []
        for sentence in self._sentences:
            fits = not first or len(first) + len(sentence) < half
            # A sentence across the middle goes to either side. Upstream draws only in that case.
            if fits or (not second and len(first) < half and draw() < 0.5):
                first.extend(sentence)
            else:
                second.extend(sentence)
        del first[self._max_length - 2 :]
        del second[max(0, self._max_length - len(first) - 3) :]
        self._sentences, self._length = [], 0
        short = draw() < 0.05  # so that the model also sees short texts
        self._target = self._random.randint(5, self._max_length) if short else self._max_length
        ids = [self._cls, *first, self._sep]
        if second:
            ids += [*second, self._sep]
        return Example(ids, len(first) + 2)


def build(
    profile: Profile,
    tokens: list[str],
    encode: Callable[[str], list[int]],
    shard: Path,
    number: int,
) -> Iterator[Example]:
    """Yield the examples of a shard, those of upstream's process `number`.

    `encode` returns the ids of a line.
    """
    builder = Builder(profile.model.max_seq_length, tokens, profile.train.seed + number)
    with parts.open_with_progress(shard) as file:
        for line in map(str.strip, file):
            if line:
                example = builder.add(encode(line))
            elif profile.corpus.blank_lines_separate_documents:
                example = builder.end_document()
            else:
                continue
            if example:
                yield example
    if example := builder.end_document():
        yield example


def write(directory: Path, examples: Iterable[Example], vocab_size: int) -> int:
    """Write a store. Return the number of examples."""
    dtype = _dtype(vocab_size)
    pieces = (
        (np.array(example.ids, dtype), np.array([[len(example.ids), example.first_length]], "<i8"))
        for example in examples
    )
    return _write(directory, pieces, dtype)


def join(stores: Iterable[Path], directory: Path, vocab_size: int) -> None:
    """Fill a directory with one store of the examples of several, in their order."""
    pieces = ((store.tokens, store.index) for store in map(Store, stores))
    _write(directory, pieces, _dtype(vocab_size))


def _dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _write(directory: Path, pieces: Iterable[tuple[np.ndarray, np.ndarray]], dtype: str) -> int:
    """Write a store that is made of the tokens and the index of others. Return its size."""
    directory.mkdir(exist_ok=True)
    number, end = 0, 0
    tokens_file, index_file = directory / "tokens.bin", directory / "index.bin"
    with tokens_file.open("wb") as tokens, index_file.open("wb") as index:
        for piece_tokens, piece_index in pieces:
            tokens.write(piece_tokens.data)
            index.write((piece_index + np.array([end, 0])).data)
            end += len(piece_tokens)
            number += len(piece_index)
    write_json(directory / "store.json", {"dtype": dtype, "examples": number})
    return number


class Store:
    """A store, mapped into memory. An empty directory is a store without examples.

    `tokens` and `index`, [examples, 2], are the arrays of its files.
    """

    def __init__(self, directory: Path) -> None:
        self.tokens, self.index = np.empty(0, "<u2"), np.empty((0, 2), "<i8")
        if not any(directory.iterdir()):
            return
        metadata = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        if metadata["examples"]:  # an empty file cannot be mapped
            self.tokens = np.memmap(directory / "tokens.bin", metadata["dtype"], "r")
            self.index = np.memmap(directory / "index.bin", "<i8", "r").reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.index)

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens of examples: [n] to [n]."""
        starts = np.where(numbers > 0, self.index[numbers - 1, 0], 0)
        sizes: np.ndarray = self.index[numbers, 0] - starts
        return sizes

    def read(self, numbers: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of examples, padded with 0, and the lengths of their first segments.

        Shapes: [n] to [n, length] and [n].
        """
        sizes = self.sizes(numbers)
        positions = np.arange(length)
        inside = positions < sizes[:, None]
        flat = np.where(inside, (self.index[numbers, 0] - sizes)[:, None] + positions, 0)
        ids = np.where(inside, self.tokens[flat], 0).astype(np.int64)
        return ids, self.index[numbers, 1]


def build_parts(
    profile: dict[str, Any], text: str, vocabulary: str, out: str, jobs: dict[str, Any]
) -> None:
    """Build a part for each shard in the directory `text`; `jobs` go to `parts.build`."""
    settings = Profile.model_validate(profile)
    shards, tokens = sorted(Path(text).iterdir()), vocab.read(Path(vocabulary))
    # All shards of a process use the same cache of words.
    encode = vocab.line_encoder(tokens, **settings.tokenizer.normalization)

    def build_part(number: int, directory: Path) -> int:
        examples = build(settings, tokens, encode, shards[number], number)
        return write(directory, examples, len(tokens))

    parts.build(build_part, Path(out), **jobs)


def import_records(records: str, out: str, max_length: int, vocab_size: int) -> int:
    """Write a store of upstream's records. Return the number of examples."""
    examples = itertools.starmap(Example, tfrecords.read(Path(records), max_length, vocab_size))
    return write(Path(out), examples, vocab_size)


if __name__ == "__main__":
    if sys.argv[1:]:
        build_parts(**json.loads(sys.argv[1]))
    else:
        subprocesses.serve(import_records)
