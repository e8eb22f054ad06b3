"""Sources of text: files, URLs and data sets of a hub, read from front to back as they arrive."""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import io
import logging
import lzma
import math
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from backports import zstd

from electra_wrap.data import xz
from electra_wrap.errors import EnvironmentProblem, UsageError
from electra_wrap.progress import log

#: A data set of a hub: hf://datasets/NAME[@REVISION][:CONFIG[:SPLIT[:COLUMN]]].
DATASET = "hf://datasets/"

#: An environment variable in a URL, and several file systems in one URL as fsspec writes them.
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_CHAIN = re.compile(r"^[\w+-]+::|::(/|[\w+-]+://)")

#: What reading a truncated or corrupt file raises. For bz2 that is an OSError without errno.
_READ_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError)

_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")

#: Seconds before each new attempt at a transfer that broke off.
PAUSES = (1, 2, 4, 8, 16)

#: Seconds without a byte after which a transfer counts as broken off.
TIMEOUT = 30

#: Bytes of the first request over HTTP, and of the largest. Each request is for twice as many as
#: the one before, so that neither the beginning of a file nor all of it takes many requests.
FIRST_BLOCK, LAST_BLOCK = 2**19, 2**26


def is_remote(name: str) -> bool:
    return "://" in name


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, a data set of a hub, or a path in one of fsspec's file systems.

    `name` is for messages and the manifest. It has the names of environment variables; their
    `values`, each with its ${NAME}, are what `hide` removes from a text.
    """

    name: str
    filesystem: Any = None
    path: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def hide(self, text: str) -> str:
        """Replace the values of environment variables by their names."""
        for value, name in self.values.items():
            for form in (value, quote(value, safe="")):
                text = text.replace(form, name)
        return text


def expand(name: str) -> list[Source]:
    """Return the sources that a value of `corpus.source` names: itself, or with `*` all matches.

    The environment variables of a URL get their values here: once, so that no listing of a server
    can name another one. UsageError if one is not set, or if nothing matches.
    """
    if not is_remote(name) or name.startswith(DATASET):
        return [Source(name)]
    source = _find_filesystem(name)
    if "*" not in name:
        return [source]
    try:
        paths = sorted(source.filesystem.glob(source.path))
    except Exception as error:  # each file system has errors of its own
        raise _unavailable(f"{name} cannot be listed", error, source) from None
    if not paths:
        raise UsageError(f"corpus.source = {name!r} matches nothing; correct it")
    unstrip = source.filesystem.unstrip_protocol
    return [
        dataclasses.replace(source, name=source.hide(unstrip(path)), path=path) for path in paths
    ]


def _find_filesystem(url: str) -> Source:
    """Return the source of a URL. UsageError or EnvironmentProblem if fsspec cannot read it."""
    if _CHAIN.search(url):
        raise UsageError(f"corpus.source = {url!r} is a chain of file systems; give one URL")
    names = _VARIABLE.findall(url)
    if unset := [name for name in names if name not in os.environ]:
        raise UsageError(f"corpus.source = {url!r}: ${{{unset[0]}}} is not set; export it")
    # A shorter value is no secret, and would be found everywhere.
    values = {os.environ[name]: f"${{{name}}}" for name in names if len(os.environ[name]) > 3}
    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        # Ranges count the bytes that are sent. The environment: proxies, and passwords in ~/.netrc.
        client = {"timeout": timeout, "auto_decompress": False, "trust_env": True}
        options = {"client_kwargs": client, "skip_instance_cache": True}
    try:
        expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], url)
        filesystem, path = fsspec.core.url_to_fs(expanded, **options)
        return Source(url, filesystem, path, values)
    except ImportError as error:
        raise EnvironmentProblem(f"corpus.source = {url!r}: {error}") from None
    except Exception as error:  # each file system has errors of its own
        reason = _describe(error, Source(url, values=values))
        raise UsageError(f"corpus.source = {url!r}: {reason}; correct it") from None


class Stream:
    """The text of a source as bytes, decompressed. With `retry`, broken transfers continue.

    `size` is the number of stored bytes, 0 if it is not known. EnvironmentProblem if a transfer
    fails for good; UsageError if there is no such source, if it is truncated or corrupt, or if the
    SHA-256 of its stored bytes is not `sha256`.
    """

    def __init__(self, source: Source, sha256: str | None = None, *, retry: bool = True) -> None:
        name = source.name
        path = Path(re.split("[?#]", name)[0] if is_remote(name) else name)
        decompress = _OPEN.get(path.suffix)
        file: io.RawIOBase
        if name.startswith(DATASET):
            file, decompress = _Dataset(source), None
        elif path.suffix in _ARCHIVES or ".tar" in path.suffixes:
            raise UsageError(f"{name}: an archive of files is not read; unpack it")
        elif source.filesystem:
            file = _Remote(source, retry)
        else:
            file = io.FileIO(name)
        self.name, self._sha256 = name, sha256
        self.size: int = getattr(file, "size", 0)
        self._counter = _Counter(file, hashlib.sha256() if sha256 else None)
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


#: How to open compressed text. The formats mark their end, so that a truncated file is an error.
_OPEN: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lambda stored: io.BufferedReader(xz.Reader(stored), 2**16),
    ".zst": zstd.open,
}


def _describe(error: Exception, source: Source) -> str:
    """Describe an error on one line, without the URL of an HTTP error: it may hold a secret."""
    if hasattr(error, "status"):  # aiohttp's; the import for its type would take 0.1 s
        return source.hide(f"{error.status} {getattr(error, 'message', '')}")
    return source.hide(" ".join(str(error).split()) or type(error).__name__)


def _unavailable(problem: str, error: Exception, source: Source) -> EnvironmentProblem:
    return EnvironmentProblem(f"{problem} ({_describe(error, source)}); run again later")


class _Remote(_Raw):
    """A file behind a URL, read in order. `size` is 0 if the server does not report it.

    A transfer that breaks off continues where it stopped. Where a server cannot do that, it starts
    again and the bytes that were read before are skipped.
    """

    def __init__(self, source: Source, retry: bool) -> None:
        self._source, self._pauses = source, PAUSES if retry else ()
        self._position, self._block = 0, FIRST_BLOCK
        self._end = math.inf  # where the open file ends, if it is a block of a larger one
        self._version: dict[str, Any] = {}
        self._file: Any = None
        self._read_with_retries(0)  # the size is known from now on

    @property
    def size(self) -> int:
        return int(self._version.get("size", 0))

    def readinto(self, buffer: Any) -> int:
        data = self._read_with_retries(len(buffer))
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read_with_retries(self, number: int) -> bytes:
        pauses, name = iter(self._pauses), self._source.name
        while True:
            try:
                return self._read(number)
            except FileNotFoundError:
                raise UsageError(f"{name}: no such file; correct corpus.source") from None
            except UsageError:
                raise
            except Exception as error:  # each file system has errors of its own
                self._drop()
                status, pause = getattr(error, "status", 0), next(pauses, None)
                refused = 400 <= status < 500 and status not in (408, 429)
                if pause is None or refused:
                    problem = f"{name} cannot be read beyond byte {self._position:,}"
                    raise _unavailable(problem, error, self._source) from None
                log(f"{name}: {_describe(error, self._source)}; trying again in {pause} s")
                time.sleep(pause)

    def _read(self, number: int) -> bytes:
        if self._position == self._end != self.size:
            self._drop()
            self._block = min(2 * self._block, LAST_BLOCK)
        if self._file is None:
            self._open()
        data: bytes = self._file.read(int(min(number, self._end - self._position)))
        end = self.size if self._end == math.inf else self._end
        if number and not data and self._position < end:
            raise EOFError("the server sends nothing more")
        return data

    def _open(self) -> None:
        """Open the file at the position. Over HTTP, open one block, so that no more is sent."""
        source = self._source
        if _is_http(source.name):
            file, version = self._request()
        else:
            file = source.filesystem.open(source.path, "rb")
            file.seek(self._position)
            version = {"size": file.size, "key": source.filesystem.ukey(source.path)}
        version = {key: value for key, value in version.items() if value}
        if any(self._version[key] != version[key] for key in self._version.keys() & version.keys()):
            raise UsageError(f"{source.name} changed while it was read; run again to start over")
        self._file, self._version = file, self._version | version

    def _request(self) -> tuple[Any, dict[str, Any]]:
        """Request a block; return it, and what identifies the version of the whole file."""
        last = self._position + self._block - 1
        headers: Any = {"Accept-Encoding": "identity", "Range": f"bytes={self._position}-{last}"}
        try:
            # With a size, fsspec does not request it; without blocks, it does not buffer.
            file = self._source.filesystem.open(
                self._source.path, "rb", block_size=0, size=1, headers=headers
            )
            status, headers = file.r.status, file.r.headers
        except Exception as error:
            if getattr(error, "status", 0) != 416:  # the position is the end of the file
                raise
            file, status, headers = io.BytesIO(), 416, getattr(error, "headers", None) or {}
        content_range = headers.get("Content-Range", "")
        if status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range)
            start, self._end = (int(match[1]), int(match[2]) + 1) if match else (-1, 0)
            size = int(match[3]) if match and match[3] != "*" else 0
            if start != self._position or self._end <= start or 0 < size < self._end:
                raise OSError("the server sends another range than requested")
        elif status == 416:
            total = content_range.rpartition("/")[2]
            size, self._end = int(total) if total.isdigit() else self._position, self._position
            if self._position < size:
                raise OSError("the server refuses to send the rest")
        else:  # the server does not support ranges and sends the whole file
            size, self._end = int(headers.get("Content-Length") or 0), math.inf
            skip = self._position
            while skip and (data := file.read(min(skip, 2**16))):
                skip -= len(data)
            if skip:
                raise EOFError("the file is shorter than before")
        return file, {key: headers.get(key) for key in ("ETag", "Last-Modified")} | {"size": size}

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

    def __init__(self, source: Source) -> None:
        self._source, self._rows, self._row = source, _open_dataset(source), io.BytesIO()

    def readinto(self, buffer: Any) -> int:
        while not (number := self._row.readinto(buffer)):
            try:
                row = next(self._rows, None)
            except Exception as error:
                problem = f"{self._source.name} cannot be read further"
                raise _unavailable(problem, error, self._source) from None
            if row is None:
                return 0
            self._row = io.BytesIO(re.sub(r"\n\s*\n", "\n", row).encode() + b"\n\n")
        return number


def _open_dataset(dataset: Source) -> Iterator[str]:
    """Return the rows of a data set, streamed from the hub or read from a local directory."""
    source = dataset.name
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
        raise UsageError(f"{source}: {_describe(error, dataset)}; correct corpus.source") from None
    except Exception as error:
        raise _unavailable(f"{source} cannot be read", error, dataset) from None
    if not isinstance(first.get(column), str):
        raise UsageError(f"{source}: no text in a column {column!r}; there are {', '.join(first)}")
    return (row[column] or "" for row in rows)
