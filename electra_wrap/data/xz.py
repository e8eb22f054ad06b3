"""Decompression of .xz with a limit of memory, which Python's lzma.open does not have."""

from __future__ import annotations

import io
import lzma
from typing import Any

#: Most bytes that decompression may take. `xz -9` needs 65 MiB, and a file may declare 4 GiB.
MAX_MEMORY = 2**28


class Reader(io.RawIOBase):
    """Decompresses a file. LZMAError if that takes more memory, EOFError if the file is cut off."""

    def __init__(self, stored: io.BufferedReader) -> None:
        self._stored, self._decompressor = stored, lzma.LZMADecompressor(memlimit=MAX_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        text = b""
        while not text:
            data = self._decompressor.unused_data
            if self._decompressor.eof:  # another stream may follow, after a padding of zeros
                while not data.strip(b"\0"):
                    if not (data := self._stored.read(2**16)):
                        return 0
                data = data.lstrip(b"\0")
                self._decompressor = lzma.LZMADecompressor(memlimit=MAX_MEMORY)
            elif self._decompressor.needs_input and not (data := self._stored.read(2**16)):
                raise EOFError("the file ends before its end marker")
            text = self._decompressor.decompress(data, len(buffer))
        buffer[: len(text)] = text
        return len(text)
