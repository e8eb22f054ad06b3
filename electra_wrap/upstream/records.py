"""What the patched build_pretraining_dataset.py uses in place of TensorFlow: files, records, and words remembered.

The script needs TensorFlow for opening files and for writing `tf.train.Example`, and pays for it with seconds of
import and most of the time that an example takes. Here are the few names of it that the script and the two modules
it imports ask for, and the memory of words. The records are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import string
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import google_crc32c

from electra_wrap import parts
from electra_wrap.vocab import Words

#: A character that cased text keeps as it is: no control, no space, none of a script that is split by character.
_KEPT = "".join(c for c in map(chr, range(0x250)) if unicodedata.category(c)[0] not in "CZ")
_PUNCTUATION = string.punctuation + "".join(c for c in _KEPT if unicodedata.category(c)[0] == "P")
_PLAIN = re.compile(f"[{re.escape(_KEPT)}]+")
_PIECES = re.compile(f"[{re.escape(_PUNCTUATION)}]|[^{re.escape(_PUNCTUATION)}]+")


class TokenIds:
    """A tokenizer of upstream's as a function of lines, which tokenizes each space-separated word once.

    That is the same: upstream treats each character, and then each word between spaces, by itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocab: dict[str, int] = tokenizer.vocab
        self._basic = tokenizer.basic_tokenizer
        wordpieces = tokenizer.wordpiece_tokenizer.tokenize
        self._pieces = Words(lambda piece: [self.vocab[token] for token in wordpieces(piece)])
        self._words = Words(self._word)

    def __call__(self, line: str) -> list[int]:
        return self._words.ids(line)

    def _word(self, word: str) -> list[int]:
        plain = not self._basic.do_lower_case and _PLAIN.fullmatch(word)
        ids: list[int] = []
        for piece in _PIECES.findall(word) if plain else self._basic.tokenize(word):
            ids += self._pieces[piece]
        return ids


class Example:
    """A `tf.train.Example` of ids, mask and segments, as bytes: https://protobuf.dev/programming-guides/encoding."""

    def __init__(self, vocab: dict[str, int], first: list[int], second: list[int], length: int) -> None:
        """`first` and `second` are the segments' ids, without special tokens; `length` is that of a whole example."""
        ids = [vocab["[CLS]"], *first, vocab["[SEP]"], *([*second, vocab["[SEP]"]] if second else [])]
        ones, zeros = len(ids), bytes(length - len(ids))
        self._bytes = _message(
            _feature(b"input_ids", b"".join(map(_varint, ids)) + zeros)
            + _feature(b"input_mask", b"\1" * ones + zeros)
            + _feature(b"segment_ids", bytes(len(first) + 2) + b"\1" * (ones - len(first) - 2) + zeros)
        )

    def SerializeToString(self, deterministic: bool) -> bytes:
        return self._bytes


@functools.cache
def _varint(value: int) -> bytes:
    """Seven bits a byte, least first; the high bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _message(content: bytes, field: int = 1) -> bytes:
    """A field that has a message, a string or packed numbers: its number and wire type 2, its length, it."""
    return b"%c%b%b" % (field << 3 | 2, _varint(len(content)), content)


def _feature(name: bytes, values: bytes) -> bytes:
    """An entry of `Features.feature`: the name, and a Feature whose field 3 is an Int64List of packed varints."""
    return _message(_message(name) + _message(_message(_message(values), 3), 2))


class RecordWriter:
    """Writes a TFRecord file: of each record its length, a checksum of that, itself, and a checksum of it."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by `close`, as upstream's own

    def write(self, record: bytes) -> None:
        length = struct.pack("<Q", len(record))
        self._file.write(length + _checksum(length) + record + _checksum(record))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _checksum(content: bytes) -> bytes:
    """CRC-32C, masked as TFRecord files have it: rotated, and a constant added (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _open(path: str, mode: str | None = None) -> IO[Any]:
    """Open a file as GFile does. What is opened without a mode is the script's text, whose progress is told."""
    if mode is None:
        return parts.open_counted(Path(path))
    return Path(path).open(mode) if "b" in mode else Path(path).open(mode, encoding="utf-8", newline="\n")


class tf:
    """The part of `tensorflow.compat.v1` that building records needs, for files of this machine."""

    class io:
        TFRecordWriter = RecordWriter

        class gfile:
            GFile = staticmethod(_open)
            listdir = staticmethod(os.listdir)
            exists = staticmethod(os.path.exists)
            makedirs = staticmethod(os.makedirs)
            rmtree = staticmethod(shutil.rmtree)


def count(path: Path) -> int:
    """Number of records in a TFRecord file: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    number = 0
    with path.open("rb") as file:
        while header := file.read(12):
            file.seek(int.from_bytes(header[:8], "little") + 4, 1)
            number += 1
    return number


def build(write_examples: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Do those of the script's jobs that `--jobs` names (the keywords of `parts.build`), each as a part of its own."""

    def job(number: int, out: Path) -> int:
        out.mkdir()
        write_examples(number, argparse.Namespace(**{**vars(args), "output_dir": str(out)}))
        return sum(map(count, out.iterdir()))

    parts.build(job, Path(args.output_dir), **json.loads(args.jobs))
