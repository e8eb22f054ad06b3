"""Pre-training examples: built as upstream's build_pretraining_dataset.py builds them, and stored.

A store is a directory with two flat arrays that training maps into memory. `tokens.bin` holds the
ids of all examples, one after the other, in 2 bytes each, or 4 beyond 65,536 tokens. `index.bin`
holds two 64-bit integers for each example: where it ends, and the length of its first segment.
`store.json` holds the type of the ids and the number of examples.
"""

import array
import dataclasses
import functools
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from electra_wrap import subprocesses
from electra_wrap.data import tokenization, vocab
from electra_wrap.files import write_json
from electra_wrap.profile import Profile
from electra_wrap.progress import ProgressBar


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
    with shard.open(encoding="utf-8", newline="\n") as file:
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


def build_store(profile: Profile, vocabulary: Path, text: Path, out: Path, log: Path) -> int:
    """Fill the directory `out` with a store of the examples of the shards in `text`.

    Returns their number; without text, `out` stays empty. Each shard is a task of its own, for as
    many processes as there are processors.
    """
    sizes = {path: size for path in sorted(text.iterdir()) if (size := path.stat().st_size)}
    if not sizes:
        return 0
    dtype = "<u2" if len(vocab.read(vocabulary)) <= 2**16 else "<u4"
    build_part = functools.partial(_build_part, profile, vocabulary, dtype)
    number = end = done = 0
    with (
        ProgressBar(f"examples of {text.name}", sum(sizes.values()), "B") as bar,
        subprocesses.pool(min(len(sizes), len(os.sched_getaffinity(0))), log=log) as pool,
        (out / "tokens.bin").open("wb") as tokens,
        (out / "index.bin").open("wb") as index,
    ):
        parts = pool.map(build_part, sizes, range(len(sizes)))
        for size, (part_tokens, part_index) in zip(sizes.values(), parts, strict=True):
            tokens.write(part_tokens.data)
            index.write((part_index + np.array([end, 0])).data)
            number, end, done = number + len(part_index), end + len(part_tokens), done + size
            bar.show(done)
    write_json(out / "store.json", {"dtype": dtype, "examples": number})
    return number


def _build_part(
    profile: Profile, vocabulary: Path, dtype: str, shard: Path, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and the index of a shard's examples, as a store has them."""
    encode = _line_encoder(vocabulary, **profile.tokenizer.normalization)
    tokens, index = array.array("I"), list[int]()
    for example in build(profile, vocab.read(vocabulary), encode, shard, number):
        tokens.extend(example.ids)
        index += [len(tokens), example.first_length]
    return np.array(tokens, dtype), np.array(index, "<i8").reshape(-1, 2)


@functools.cache
def _line_encoder(vocabulary: Path, **normalization: bool) -> Callable[[str], list[int]]:
    """Return the encoder of lines, which shares its cache of words among a process's shards."""
    return tokenization.line_encoder(vocab.read(vocabulary), **normalization)
