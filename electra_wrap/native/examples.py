"""Pre-training examples: built as upstream's build_pretraining_dataset.py builds them, and stored for random access.

A store is a directory with two flat arrays that training maps into memory: `tokens.bin` has the ids of all examples
one after the other, `index.bin` where each example ends and how long its first segment is. An example is a slice, so
shuffling the whole corpus is a permutation of numbers and resuming at any example is arithmetic. (Arrow would do the
same at the price of a large dependency.) Nothing is padded: a token costs two bytes, or four beyond 65,536 words.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from electra_wrap import vocab
from electra_wrap.profile import Profile
from electra_wrap.rundir import write_json

#: Lines tokenized at once: the tokenizers library spreads them over the processors.
LINES_AT_ONCE = 5000


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


def build(corpus: Path, vocabulary: Path, profile: Profile, on_bytes: Callable[[int], None]) -> Iterator[Example]:
    """Yield the examples of the shards in `corpus`, shard by shard; `on_bytes` gets how much text is done.

    Shard i's are those of upstream's process i of as many processes as there are shards, seeded with seed + i.
    """
    tokens = vocab.read(vocabulary)
    keys = profile.tokenizer
    tokenizer = vocab.build_tokenizer(tokens, lowercase=keys.lowercase, strip_accents=keys.strip_accents)
    tokenizer.encode_special_tokens = True  # text that says "[MASK]" is text
    done = 0
    for number, path in enumerate(sorted(corpus.iterdir())):
        seed = profile.train.seed + number
        builder = Builder(profile.model.max_seq_length, tokens.index("[CLS]"), tokens.index("[SEP]"), seed)
        with path.open(encoding="utf-8", newline="\n") as file:
            while lines := [line.strip() for line in itertools.islice(file, LINES_AT_ONCE)]:
                encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
                for line, encoding in zip(lines, encodings, strict=True):
                    if line:
                        example = builder.add(encoding.ids)
                    elif profile.corpus.blank_lines_separate_documents:
                        example = builder.end()
                    else:
                        continue
                    if example:
                        yield example
                done += sum(len(line.encode()) + 1 for line in lines)
                on_bytes(done)
        if example := builder.end():
            yield example


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
