"""TFRecord files. Writing and counting need no TensorFlow; reading imports it.

As a module, `python -m electra_wrap.data.tfrecords` answers calls of `count_examples`.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c

from electra_wrap import subprocesses
from electra_wrap.errors import UsageError

#: Names of upstream's record files, which may be given in place of text: then N-of-M.
RECORD_GLOB = "pretrain_data.tfrecord-*"


class RecordWriter(io.BufferedWriter):
    """Writes a TFRecord file. It has the methods of `tf.io.TFRecordWriter`.

    A record is its length in 8 bytes, their checksum in 4, its content, and the content's checksum.
    """

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path, "wb"))

    def write(self, record: Any) -> int:
        length = struct.pack("<Q", len(record))
        return super().write(length + _masked_crc(length) + record + _masked_crc(record))


def _masked_crc(content: bytes) -> bytes:
    """Return the masked CRC-32C of `content` (tensorflow/core/lib/hash/crc32c.h)."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def count(path: Path) -> int:
    """Return the number of records in a TFRecord file."""
    number = 0
    with path.open("rb") as file:
        while header := file.read(12):
            file.seek(int.from_bytes(header[:8], "little") + 4, 1)
            number += 1
    return number


def read(directory: Path, length: int, vocab_size: int) -> Iterator[tuple[Sequence[int], int]]:
    """Yield the ids of each example and how many of them belong to its first segment.

    Examples come from one file after the other in turn, which is the order in which one process
    writes them. UsageError if the files are damaged, or if an example is not padded to `length`
    tokens or has an id of `vocab_size` or more.
    """
    import tensorflow as tf

    paths = sorted(directory.glob(RECORD_GLOB), key=lambda path: int(path.name.split("-")[1]))
    files = [tf.compat.v1.io.tf_record_iterator(str(path)) for path in paths]
    try:
        for record in itertools.chain.from_iterable(itertools.zip_longest(*files)):
            if record is None:  # this file has fewer records than others
                continue
            features = tf.train.Example.FromString(record).features.feature
            ids = features["input_ids"].int64_list.value
            if len(ids) != length or max(ids) >= vocab_size:
                actual = f"examples of {len(ids)} tokens up to id {max(ids, default=-1)}"
                expected = f"the profile says {length} tokens and the vocabulary has {vocab_size}"
                raise UsageError(f"{directory} has {actual}, {expected}; correct the profile")
            size = sum(features["input_mask"].int64_list.value)
            second = sum(features["segment_ids"].int64_list.value)
            if size <= 2 + bool(second):  # [CLS], and a [SEP] for each segment
                raise UsageError(f"{directory} has examples without a token; build them again")
            yield ids[:size], size - second
    except tf.errors.OpError as error:
        problem = f"{directory}: the records are damaged ({error.message})"
        raise UsageError(f"{problem}; build them again") from None


def count_examples(directory: str, length: int, vocab_size: int) -> int:
    """Return the number of examples in a directory of upstream's records. Errors as in `read`."""
    return sum(1 for _ in read(Path(directory), length, vocab_size))


if __name__ == "__main__":
    subprocesses.serve(count_examples)
