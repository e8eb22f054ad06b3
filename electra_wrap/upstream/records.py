"""What the patched build_pretraining_dataset.py uses in place of TensorFlow and its tokenizer.

The script needs TensorFlow only to open files and to write `tf.train.Example`, which costs seconds
of import and most of an example's time. This module has the few names that the script and the
modules it imports use, and a cache of tokenized words. The records are the same, byte for byte.
"""

import argparse
import functools
import multiprocessing
import os
import re
import shutil
import string
import unicodedata
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

from electra_wrap import events, subprocesses
from electra_wrap.data import tfrecords
from electra_wrap.data.tokenization import WordCache

# Most words can do without upstream's slow tokenizer. It leaves these characters of cased text as
# they are: no control characters, no white space, and no scripts that it splits by character.
_KEPT = "".join(c for c in map(chr, range(0x250)) if unicodedata.category(c)[0] not in "CZ")
_PUNCTUATION = string.punctuation + "".join(c for c in _KEPT if unicodedata.category(c)[0] == "P")
_PLAIN = re.compile(f"[{re.escape(_KEPT)}]+")
_PIECES = re.compile(f"[{re.escape(_PUNCTUATION)}]|[^{re.escape(_PUNCTUATION)}]+")


class TokenIds:
    """Upstream's tokenizer as a function of lines that tokenizes each distinct word once.

    The result is the same: upstream handles every character, and then every word between spaces,
    without its context.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocab: dict[str, int] = tokenizer.vocab
        self._basic = tokenizer.basic_tokenizer
        wordpieces = tokenizer.wordpiece_tokenizer.tokenize
        self._pieces = WordCache(lambda piece: [self.vocab[token] for token in wordpieces(piece)])
        self._words = WordCache(self._word_ids)

    def __call__(self, line: str) -> list[int]:
        return self._words.ids(line)

    def _word_ids(self, word: str) -> list[int]:
        plain = not self._basic.do_lower_case and _PLAIN.fullmatch(word)
        ids: list[int] = []
        for piece in _PIECES.findall(word) if plain else self._basic.tokenize(word):
            ids += self._pieces[piece]
        return ids


class Example:
    """A serialized `tf.train.Example` (https://protobuf.dev/programming-guides/encoding).

    `first` and `second` are the ids of the segments without special tokens. The example's ids, mask
    and segment ids are padded to `length`.
    """

    def __init__(
        self, vocab: dict[str, int], first: list[int], second: list[int], length: int
    ) -> None:
        ids = [vocab["[CLS]"], *first, vocab["[SEP]"]]
        if second:
            ids += [*second, vocab["[SEP]"]]
        padding = bytes(length - len(ids))
        first_size = len(first) + 2
        second_size = len(ids) - first_size
        self._bytes = _message(
            _feature(b"input_ids", b"".join(map(_varint, ids)) + padding)
            + _feature(b"input_mask", b"\1" * len(ids) + padding)
            + _feature(b"segment_ids", bytes(first_size) + b"\1" * second_size + padding)
        )

    def SerializeToString(self, deterministic: bool) -> bytes:
        return self._bytes


@functools.cache
def _varint(value: int) -> bytes:
    """Encode 7 bits per byte, least significant first; the high bit is set if more follow."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes((*encoded, value))


def _message(content: bytes, field: int = 1) -> bytes:
    """Encode a field of wire type 2 (message, string, packed numbers): its tag, length, content."""
    return b"%c%b%b" % (field << 3 | 2, _varint(len(content)), content)


def _feature(name: bytes, values: bytes) -> bytes:
    """Encode an entry of `Features.feature`: a name, and a Feature with an Int64List (field 3)."""
    return _message(_message(name) + _message(_message(_message(values), 3), 2))


def _open(path: str, mode: str | None = None) -> IO[Any]:
    """Open a file as GFile does: a line of text ends with \\n alone."""
    if "b" in (mode or ""):
        return Path(path).open(str(mode))
    return Path(path).open(mode or "r", encoding="utf-8", newline="\n")


def _make_directory(path: str) -> None:
    """Make a directory, and its parent, but not the run directory, whose disk may be gone."""
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).mkdir(exist_ok=True)


class tf:
    """The part of `tensorflow.compat.v1` that building records needs, for local files."""

    class io:
        TFRecordWriter = tfrecords.RecordWriter

        class gfile:
            GFile = staticmethod(_open)
            listdir = staticmethod(os.listdir)
            exists = staticmethod(os.path.exists)
            makedirs = staticmethod(_make_directory)
            rmtree = staticmethod(shutil.rmtree)


def build(
    write_examples: Callable[[int, argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Do the script's jobs, one for each shard, in as many processes as there are processors.

    By itself, the script starts all of them at once, and succeeds if one of them dies.
    """
    shards = sorted(Path(args.corpus_dir).iterdir())
    context = multiprocessing.get_context("fork")  # write_examples is not in a module
    workers = min(len(shards), len(os.sched_getaffinity(0)))
    initializer = subprocesses.die_with_parent
    with (
        ProcessPoolExecutor(workers, context, initializer=initializer) as pool,
        subprocesses.report_errors(),
    ):
        sizes = {n: size for n, path in enumerate(shards) if (size := path.stat().st_size)}
        jobs = {pool.submit(write_examples, n, args): size for n, size in sizes.items()}
        for job in as_completed(jobs):
            job.result()
            events.emit(events.Progress(jobs[job]))
