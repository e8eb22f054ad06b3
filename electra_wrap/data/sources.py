"""Sources of text: files, URLs and data sets of a hub, read from front to back as they arrive."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
from backports import zstd

from electra_wrap.errors import EnvironmentProblem, UsageError

#: A data set of a hub: hf://datasets/NAME[@REVISION][:CONFIG[:SPLIT[:COLUMN]]].
DATASET = "hf://datasets/"

#: How to open compressed text. The formats mark their end, so that a truncated file is an error.
_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}

#: What reading a truncated or corrupt file raises. For bz2 that is an OSError without errno.
_READ_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError)

_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")

#: Seconds before each new attempt at a transfer that broke off.
PAUSES = (1, 2, 4, 8, 16)

#: Seconds without a byte after which a transfer counts as broken off.
TIMEOUT = 60

#: Bytes of the first request over HTTP, and of the largest. Each request is for twice as many as
#: the one before, so that neither the beginning of a file nor all of it takes many requests.
FIRST_BLOCK, LAST_BLOCK = 2**19, 2**26


def is_remote(name: str) -> bool:
    return "://" in name


def expand(name: str) -> list[str]:
    """Return the files that a source names: those that match a URL with `*`, or else itself."""
    if not is_remote(name) or "*" not in name:
        return [name]
    filesystem, path = _filesystem(name)
    try:
        matches = sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    except Exception as error:  # each file system has errors of its own
        raise _unavailable(f"{name} cannot be listed", error) from None
    if not matches:
        raise UsageError(f"corpus.source = {name!r} matches nothing; correct it")
    return matches


class Stream:
    """The text of a source as bytes, decompressed. With `retry`, broken transfers continue.

    `size` is the number of stored bytes, 0 if it is not known. EnvironmentProblem if a transfer
    fails for good; UsageError if there is no such source, if it is truncated or corrupt, or if the
    SHA-256 of its stored bytes is not `sha256`.
    """

    def __init__(self, name: str, sha256: str | None = None, *, retry: bool = True) -> None:
        path = Path(re.split("[?#]", name)[0] if is_remote(name) else name)
        decompress = _OPEN.get(path.suffix)
        source: io.RawIOBase
        if name.startswith(DATASET):
            source, decompress = _Dataset(name), None
        elif path.suffix in _ARCHIVES or ".tar" in path.suffixes:
            raise UsageError(f"{name}: an archive of files is not read; unpack it")
        elif is_remote(name):
            source = _Remote(name, retry)
        else:
            source = io.FileIO(name)
        self.name, self._sha256 = name, sha256
        self.size: int = getattr(source, "size", 0)
        self._counter = _Counter(source, hashlib.sha256() if sha256 else None)
        self._stored = io.BufferedReader(self._counter, 2**16)
        self._text = decompress(self._stored) if decompress else self._stored

    @property
    def done(self) -> int:
        """Number of stored bytes that have been read."""
        return self._counter.done

    def readline(self, limit: int) -> bytes:
        """Return the next line with its end, or its first `limit` bytes; b"" at the end."""
        try:
            line: bytes = self._text.readline(limit)
        except _READ_ERRORS as error:
            if getattr(error, "errno", None):
                raise  # the disk's error, not the content's
            raise UsageError(f"{self.name}: cannot be read as text: {error}; replace it") from None
        if not line and self._sha256:
            while self._stored.read(2**20):
                pass  # what decompression left unread
            digest = self._counter.hash.hexdigest()
            if digest != self._sha256:
                raise UsageError(
                    f"{self.name} has sha256 {digest}, the profile says {self._sha256}; correct one"
                )
        return line

    def close(self) -> None:
        self._counter.source.close()


class _Raw(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _Counter(_Raw):
    """Counts and hashes the bytes of another file as they are read."""

    def __init__(self, source: io.RawIOBase, hash: Any) -> None:
        self.source, self.hash, self.done = source, hash, 0

    def readinto(self, buffer: Any) -> int:
        number = self.source.readinto(buffer) or 0
        self.done += number
        if self.hash:
            self.hash.update(memoryview(buffer)[:number])
        return number


def _describe(error: Exception) -> str:
    """Describe an error on one line, without the URL of an HTTP error: it may hold a secret."""
    if hasattr(error, "status"):  # aiohttp's; the import for its type would take 0.1 s
        return f"{error.status} {getattr(error, 'message', '')}"
    return " ".join(str(error).split()) or type(error).__name__


def _unavailable(problem: str, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(f"{problem} ({_describe(error)}); run again later")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        # Ranges count the bytes that are sent. The environment: proxies, and passwords in ~/.netrc.
        client = {"timeout": timeout, "auto_decompress": False, "trust_env": True}
        options = {"client_kwargs": client, "skip_instance_cache": True}
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(os.path.expandvars(url), **options))
    except ImportError as error:
        raise EnvironmentProblem(f"corpus.source = {url!r}: {error}") from None
    except Exception as error:  # each file system has errors of its own
        raise UsageError(f"corpus.source = {url!r}: {_describe(error)}; correct it") from None


class _Remote(_Raw):
    """A file behind a URL, read in order. `size` is 0 if the server does not report it.

    A transfer that breaks off continues where it stopped. Where a server cannot do that, it starts
    again and the bytes that were read before are skipped.
    """

    def __init__(self, url: str, retry: bool) -> None:
        self._url, self._pauses = url, PAUSES if retry else ()
        self._filesystem, self._path = _filesystem(url)
        self._position, self._block, self.size = 0, FIRST_BLOCK, 0
        self._version: str | None = None
        self._is_block = False  # whether the open file is one block of a larger file
        self._file: Any = None
        self._read_with_retries(0)  # the size is known from now on

    def readinto(self, buffer: Any) -> int:
        data = self._read_with_retries(len(buffer))
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read_with_retries(self, number: int) -> bytes:
        pauses = iter(self._pauses)
        while True:
            try:
                return self._read(number)
            except FileNotFoundError:
                raise UsageError(f"{self._url}: no such file; correct corpus.source") from None
            except UsageError:
                raise
            except Exception as error:  # each file system has errors of its own
                self._drop()
                status, pause = getattr(error, "status", 0), next(pauses, None)
                refused = 400 <= status < 500 and status not in (408, 429)
                if pause is None or refused:
                    problem = f"{self._url} cannot be read beyond byte {self._position:,}"
                    raise _unavailable(problem, error) from None
                time.sleep(pause)

    def _read(self, number: int) -> bytes:
        if self._file is None:
            self._open()
        data: bytes = self._file.read(number)
        if number and not data and self._is_block and self._position != self.size:
            self._block = min(2 * self._block, LAST_BLOCK)
            self._open()
            data = self._file.read(number)
        if number and not data and self._position < self.size:
            raise EOFError("the server sends nothing more")
        return data

    def _open(self) -> None:
        """Open the file at the position. Over HTTP, open one block, so that no more is sent."""
        if _is_http(self._url):
            file, status, headers = self._request()
            version = headers.get("Last-Modified") or headers.get("ETag") or self._version
        else:
            file, status, headers = self._filesystem.open(self._path, "rb"), 0, {}
            file.seek(self._position)
            self.size, version = file.size or 0, self._filesystem.ukey(self._path)
        if self._version not in (None, version):
            raise UsageError(f"{self._url} changed while it was read; run again to start over")
        self._file, self._version, self._is_block = file, version, status == 206
        if status == 206:
            total = headers["Content-Range"].rpartition("/")[2]
            self.size = int(total) if total.isdigit() else 0
        elif status == 200:  # the server does not support ranges and sends the whole file
            self.size = int(headers.get("Content-Length") or 0)
            skip = self._position
            while skip and (data := file.read(min(skip, 2**16))):
                skip -= len(data)
            if skip:
                raise EOFError("the file is shorter than before")

    def _request(self) -> tuple[Any, int, Any]:
        """Request a block; return the file that it is, the status and the headers."""
        end = self._position + self._block - 1
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={self._position}-{end}"}
        try:
            # With a size, fsspec does not request it; without blocks, it does not buffer.
            file = self._filesystem.open(self._path, "rb", block_size=0, size=1, headers=headers)
        except Exception as error:
            if getattr(error, "status", 0) != 416:  # the position is the end of the file
                raise
            return io.BytesIO(), 416, getattr(error, "headers", None) or {}
        return file, file.r.status, file.r.headers

    def _drop(self) -> None:
        """Close the file, ignoring errors, so that the next read opens it again."""
        with contextlib.suppress(Exception):
            self._file.close()
        self._file = None

    def close(self) -> None:
        self._drop()
        super().close()


class _Dataset(_Raw):
    """The rows of a data set of a hub, with a blank line after each."""

    def __init__(self, name: str) -> None:
        self._name, self._rows, self._row = name, _open_dataset(name), io.BytesIO()

    def readinto(self, buffer: Any) -> int:
        while not (number := self._row.readinto(buffer)):
            try:
                row = next(self._rows, None)
            except Exception as error:
                raise _unavailable(f"{self._name} cannot be read further", error) from None
            if row is None:
                return 0
            self._row = io.BytesIO(re.sub(r"\n\s*\n", "\n", row).encode() + b"\n\n")
        return number


def _open_dataset(source: str) -> Iterator[str]:
    """Return the rows of a data set, streamed from the hub or read from a local directory."""
    os.environ["USE_TORCH"] = "0"  # else the library imports PyTorch
    try:
        import datasets
    except ImportError:
        raise EnvironmentProblem(f"{source} needs: pip install -e '.[datasets]'") from None
    name, config, split, column, *rest = [*source.removeprefix(DATASET).split(":"), "", "", ""]
    if not name or any(rest):
        raise UsageError(f"{source} is not {DATASET}NAME[:CONFIG[:SPLIT[:COLUMN]]]; correct it")
    name, _, revision = name.partition("@")
    column = column or "text"
    for library in ("datasets", "huggingface_hub"):  # they log each retry
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split or "train", revision=revision or None, streaming=True
        )
        first = next(iter(rows), {column: ""})
    except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UsageError(f"{source}: {_describe(error)}; correct corpus.source") from None
    except Exception as error:
        raise _unavailable(f"{source} cannot be read", error) from None
    if not isinstance(first.get(column), str):
        raise UsageError(f"{source}: no text in a column {column!r}; there are {', '.join(first)}")
    return (row[column] or "" for row in rows)
