"""Pre-training examples: built as upstream's build_pretraining_dataset.py builds them, and stored.

A store is a directory with two flat arrays that training maps into memory. `tokens.bin` holds the
ids of all examples, one after the other, in 2 bytes each, or 4 beyond 65,536 tokens. `index.bin`
holds two 64-bit integers for each example: where it ends, and the length of its first segment.
`store.json` holds the type of the ids and the number of examples.

Runs as a child process, with a job as JSON to build parts, or to answer `call`.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import subprocesses
from electra_wrap.data import parts, tfrecords, vocab
from electra_wrap.files import write_json


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

    def __init__(self, max_length: int, cls: int, sep: int, seed: int) -> None:
        self._max_length, self._cls, self._sep = max_length, cls, sep
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
    shard: Path,
    number: int,
    tokens: list[str],
    *,
    normalization: dict[str, bool],
    max_length: int,
    blank_lines_separate_documents: bool,
    seed: int,
) -> Iterator[Example]:
    """Yield the examples of a shard: those of upstream's process `number`, seeded seed + number."""
    builder = Builder(max_length, tokens.index("[CLS]"), tokens.index("[SEP]"), seed + number)
    encode = _encoder(tuple(tokens), **normalization)
    with parts.open_with_progress(shard) as file:
        for line in map(str.strip, file):
            if line:
                example = builder.add(encode(line))
            elif blank_lines_separate_documents:
                example = builder.end_document()
            else:
                continue
            if example:
                yield example
    if example := builder.end_document():
        yield example


@functools.lru_cache(1)  # all shards of a process use the same cache of words
def _encoder(
    tokens: tuple[str, ...], *, lowercase: bool, strip_accents: bool
) -> Callable[[str], Sequence[int]]:
    """Return a function from a line to its ids."""
    tokenizer = vocab.build_tokenizer(
        list(tokens), lowercase=lowercase, strip_accents=strip_accents
    )
    tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
    return vocab.WordCache(lambda word: tokenizer.encode(word, add_special_tokens=False).ids).ids


def write(directory: Path, examples: Iterable[Example], vocab_size: int) -> int:
    """Write a store. Return the number of examples."""
    directory.mkdir(exist_ok=True)
    number, end = 0, 0
    code = _typecode(vocab_size)
    with (
        (directory / "tokens.bin").open("wb") as tokens,
        (directory / "index.bin").open("wb") as index,
    ):
        for example in examples:
            end += len(example.ids)
            number += 1
            tokens.write(array.array(code, example.ids).tobytes())
            index.write(array.array("q", (end, example.first_length)).tobytes())
    _write_metadata(directory, code, number)
    return number


def join(stores: Sequence[Path], directory: Path, vocab_size: int) -> None:
    """Fill an empty directory with one store of the examples of several, in their order."""
    number, end = 0, 0
    code = _typecode(vocab_size)
    with (
        (directory / "tokens.bin").open("wb") as tokens,
        (directory / "index.bin").open("wb") as index,
    ):
        for store in stores:
            with (store / "tokens.bin").open("rb") as file:
                shutil.copyfileobj(file, tokens, 2**20)
            with (store / "index.bin").open("rb") as file:
                while rows := file.read(2**20):
                    shifted = np.frombuffer(rows, "<i8").reshape(-1, 2) + np.array([end, 0])
                    index.write(shifted.tobytes())
                    number += len(shifted)
            end = tokens.tell() // array.array(code).itemsize
    _write_metadata(directory, code, number)


def _typecode(vocab_size: int) -> str:
    """Return the type of ids for `array`: unsigned, of 2 or 4 bytes."""
    return "H" if vocab_size <= 2**16 else "I"


def _write_metadata(directory: Path, code: str, number: int) -> None:
    dtype = f"<u{array.array(code).itemsize}"
    write_json(directory / "store.json", {"dtype": dtype, "examples": number})


class Store:
    """A store, mapped into memory. An empty directory is a store without examples."""

    def __init__(self, directory: Path) -> None:
        self._size = 0
        if not any(directory.iterdir()):
            return
        metadata = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self._size = metadata["examples"]
        if self._size:  # an empty file cannot be mapped
            self._tokens = np.memmap(directory / "tokens.bin", metadata["dtype"], "r")
            self._index = np.memmap(directory / "index.bin", "<i8", "r", shape=(self._size, 2))

    def __len__(self) -> int:
        return self._size

    def sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens of examples: [n] to [n]."""
        starts = np.where(numbers > 0, self._index[numbers - 1, 0], 0)
        sizes: np.ndarray = self._index[numbers, 0] - starts
        return sizes

    def read(self, numbers: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of examples, padded with 0, and the lengths of their first segments.

        Shapes: [n] to [n, length] and [n].
        """
        sizes = self.sizes(numbers)
        positions = np.arange(length)
        inside = positions < sizes[:, None]
        flat = np.where(inside, (self._index[numbers, 0] - sizes)[:, None] + positions, 0)
        ids = np.where(inside, self._tokens[flat], 0).astype(np.int64)
        return ids, self._index[numbers, 1]


def build_parts(text: str, vocabulary: str, out: str, jobs: dict[str, Any], **options: Any) -> None:
    """Build a part for each shard in `text`; `options` are those of `build`."""
    shards, tokens = sorted(Path(text).iterdir()), vocab.read(Path(vocabulary))

    def build_part(number: int, directory: Path) -> int:
        examples = build(shards[number], number, tokens, **options)
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
