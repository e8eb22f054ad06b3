"""TFRecord files, without TensorFlow."""

import io
import struct
from pathlib import Path
from typing import Any

import google_crc32c

#: Names of upstream's record files: N-of-M.
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
