"""Where text comes from: files, URLs, data sets of a hub; read once, from front to back, as it arrives."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from backports import zstd

from electra_wrap.errors import EnvironmentLacks, UsageError

#: A data set of a hub: hf://datasets/NAME[@REVISION][:CONFIG[:SPLIT[:COLUMN]]].
DATASET = "hf://datasets/"

#: Compressed text, by the end of its name. Each knows where it ends, so that a cut one is an error.
_COMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": zstd.ZstdFile,
}

#: What their readers raise when they are cut or corrupt.
_BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstd.ZstdError)

#: Archives of several files: read as text they are noise.
_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")

#: Seconds before each new attempt at a transfer that broke off, and without a byte until one counts as broken off.
PAUSES, PATIENCE = (1, 2, 4, 8, 16), 60


#: Bytes of the first request over HTTP. Each further one is for twice as many, so that a corpus of which only the
#: beginning is wanted costs little more than that, and a whole one few requests.
FIRST_BLOCK, LAST_BLOCK = 2**19, 2**26


def is_remote(name: str) -> bool:
    return "://" in name


def expand(name: str) -> list[str]:
    """The files that a source names: itself, or where it is a URL with `*`, those that match."""
    if not is_remote(name) or "*" not in name:
        return [name]
    filesystem, path = _filesystem(name)
    try:
        found = sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(path))
    except Exception as error:  # each file system has errors of its own
        raise EnvironmentLacks(f"{name} cannot be listed ({_said(error)}); mend that and run again") from None
    if not found:
        raise UsageError(f"corpus.source = {name!r} matches nothing; correct it")
    return found


class Stream:
    """A source's text as bytes, decompressed: `readline`, and how far it is read.

    EnvironmentLacks if a transfer fails for good; UsageError if there is no such source, if it is cut or corrupt, or
    if its digest (that of the bytes as they are stored) is not `sha256`.
    """

    def __init__(self, name: str, sha256: str | None = None, offset: int = 0, patient: bool = True) -> None:
        """Begin `offset` bytes into the text. Whoever is `patient` tries again if a transfer breaks off."""
        self.name, self._sha256, self._hash = name, sha256, hashlib.sha256()
        dataset = name.startswith(DATASET)
        path = Path(re.split("[?#]", name)[0] if is_remote(name) else name)
        kind = None if dataset else _COMPRESSED.get(path.suffix)
        if not dataset and (path.suffix in _ARCHIVES or ".tar" in path.suffixes):
            raise UsageError(f"{name}: an archive of files is not read; unpack it")
        skipped = 0 if kind or sha256 or dataset else offset
        if dataset:
            self._raw: io.RawIOBase = _Dataset(name)
        elif is_remote(name):
            self._raw = _Remote(name, skipped, patient)
        else:
            self._raw = io.FileIO(name)
            self._raw.seek(skipped)
        #: What a server says of which version of a file this is; bytes as they are stored; 0 if that is not known.
        self.version: str | None = getattr(self._raw, "version", None)
        self.size: int = getattr(self._raw, "size", 0)
        self.done = skipped
        counted = io.BufferedReader(_Tap(self._raw, self._tap), 2**16)
        self._stored = counted
        self._text = cast(BinaryIO, io.BufferedReader(kind(counted), 2**16) if kind else counted)
        offset -= skipped
        while offset and (known := self._guarded(self._text.read, min(offset, 2**20))):
            offset -= len(known)

    def _tap(self, data: memoryview) -> None:
        self.done += len(data)
        if self._sha256:
            self._hash.update(data)

    def readline(self, limit: int) -> bytes:
        """Return the next line with its end, or `limit` bytes of it; nothing at the end of the text."""
        line = self._guarded(self._text.readline, limit)
        if not line and self._sha256:
            while self._guarded(self._stored.read, 2**20):
                pass
            if (digest := self._hash.hexdigest()) != self._sha256:
                raise UsageError(f"{self.name} has sha256 {digest}, the profile says {self._sha256}; correct one")
        return line

    def _guarded(self, read: Any, size: int) -> bytes:
        try:
            return cast(bytes, read(size))
        except (*_BROKEN, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file, not of what is in it: bz2 has no error of its own
            raise UsageError(f"{self.name}: cannot be read as text: {error}; replace the file") from None

    def close(self) -> None:
        self._raw.close()


class _Raw(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _Tap(_Raw):
    """A file whose bytes someone sees pass."""

    def __init__(self, file: io.RawIOBase, see: Any) -> None:
        self._file, self._see = file, see

    def readinto(self, buffer: Any) -> int:
        number = self._file.readinto(buffer) or 0
        self._see(memoryview(buffer)[:number])
        return number


def _said(error: Exception) -> str:
    """What an error says, on one line; of an HTTP error not the URL, in which there may be a secret."""
    if hasattr(error, "status"):  # aiohttp's; importing it for its name would cost a tenth of a second
        return f"{error.status} {getattr(error, 'message', '')}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. EnvironmentLacks if its package is not installed."""
    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        options = {
            "client_kwargs": {
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE),
                "auto_decompress": False,  # ranges count the bytes that are sent
                "trust_env": True,  # proxies, and passwords in ~/.netrc
            },
            "skip_instance_cache": True,
        }
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(os.path.expandvars(url), **options))
    except ImportError as error:
        raise EnvironmentLacks(f"corpus.source = {url!r}: {error}") from None
    except Exception as error:  # each file system has errors of its own
        raise UsageError(f"corpus.source = {url!r}: {_said(error)}; correct it") from None


class _Remote(_Raw):
    """A file behind a URL, read in order.

    A transfer that breaks off goes on where it stopped; where a server cannot do that, it begins again and what is
    known is left out.
    """

    def __init__(self, url: str, position: int, patient: bool) -> None:
        self._url, self._position, self._patient = url, position, patient
        self.version: str | None = None
        self.size, self._block = 0, FIRST_BLOCK
        self._more = False  # whether what is open is a part of a file, after which there may be others
        self._filesystem, self._path = _filesystem(url)
        self._file: Any = None
        self._attempt(lambda: b"")  # so that size and version are known

    def readinto(self, buffer: Any) -> int:
        data = self._attempt(lambda: self._read(len(buffer)))
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, number: int) -> bytes:
        data = self._file.read(number)
        if not data and self._more and self._position != self.size:
            self._block = min(2 * self._block, LAST_BLOCK)
            self._file = self._open()
            data = self._file.read(number)
        if not data and self._position < self.size:
            raise EOFError("the server sends nothing more")
        return cast(bytes, data)

    def _attempt(self, do: Callable[[], bytes]) -> bytes:
        """Open the file if it is not, and do something with it, until that goes well."""
        for pause in (*(PAUSES if self._patient else ()), None):
            try:
                if self._file is None:
                    self._file = self._open()
                return do()
            except FileNotFoundError:
                raise UsageError(f"corpus.source = {self._url!r}: there is no such file; correct it") from None
            except UsageError:
                raise
            except Exception as error:  # each file system has errors of its own
                self._drop()
                status = getattr(error, "status", 0)
                if pause is None or (status in range(400, 500) and status not in (408, 429)):  # refused for good
                    raise EnvironmentLacks(
                        f"{self._url} cannot be read beyond byte {self._position:,} ({_said(error)}); run again later"
                    ) from None
                time.sleep(pause)
        raise AssertionError

    def _open(self) -> Any:
        """Open the file at the position; over HTTP, a block of it, which is all that is sent if no more is read."""
        if not _is_http(self._url):
            file = self._filesystem.open(self._path, "rb")
            file.seek(self._position)
            self.size, self.version = file.size or 0, self._filesystem.ukey(self._path)
            return file
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={self._position}-{self._position + self._block - 1}"}
        try:
            # With a size, fsspec does not ask for it; without blocks of its own, it passes on what comes.
            file = self._filesystem.open(self._path, "rb", block_size=0, size=1, headers=headers)
            status, answer = file.r.status, file.r.headers
        except Exception as error:
            if getattr(error, "status", 0) != 416:
                raise
            file, status, answer = io.BytesIO(), 416, getattr(error, "headers", None) or {}  # nothing is left of it
        version = answer.get("Last-Modified") or answer.get("ETag") or self.version
        if self.version not in (None, version):
            raise UsageError(f"{self._url} changed while it was read; run again to begin anew")
        self.version = version
        self._more = status == 206
        if status == 206:
            total = answer["Content-Range"].rpartition("/")[2]
            self.size = int(total) if total.isdigit() else 0  # it need not tell
        elif status == 200:  # all of it
            self.size = int(answer.get("Content-Length") or 0)
            known = self._position
            while known:
                if not (data := file.read(min(known, 2**16))):
                    raise EOFError("it is shorter than before")
                known -= len(data)
        return file

    def _drop(self) -> None:
        """Close the file, however it is."""
        if self._file is not None:
            with contextlib.suppress(Exception):
                self._file.close()
            self._file = None

    def close(self) -> None:
        self._drop()
        super().close()


class _Dataset(_Raw):
    """A data set of a hub as text: its rows one after the other, with a blank line after each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.version: str | None = None
        self._rows, self._row = self._open(), io.BytesIO()

    def readinto(self, buffer: Any) -> int:
        while not (number := self._row.readinto(buffer)):
            try:
                row = next(self._rows, None)
            except Exception as error:
                raise EnvironmentLacks(f"{self._name} cannot be read on ({_said(error)}); run again later") from None
            if row is None:
                return 0
            self._row = io.BytesIO(re.sub(r"\n\s*\n", "\n", row).encode() + b"\n\n")
        return number

    def _open(self) -> Iterator[str]:
        os.environ["USE_TORCH"] = "0"  # else it imports PyTorch, for a format nobody asked for
        try:
            import datasets
            from huggingface_hub import HfApi
            from huggingface_hub.errors import RepositoryNotFoundError
        except ImportError:
            raise EnvironmentLacks(f"{self._name} needs a package: pip install 'electra-wrap[datasets]'") from None
        name, config, split, column, *more = [*self._name.removeprefix(DATASET).split(":"), "", "", ""][:5]
        if any(more) or not name:
            raise UsageError(f"corpus.source = {self._name!r} is not {DATASET}NAME[:CONFIG[:SPLIT[:COLUMN]]]")
        name, _, revision = name.partition("@")
        for library in ("datasets", "huggingface_hub"):  # they retry for half a minute, and tell each time
            logging.getLogger(library).setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        split, column = split or "train", column or "text"
        try:
            if not Path(name).is_dir():
                self.version = revision = HfApi().dataset_info(name, revision=revision or None).sha or revision
            rows = datasets.load_dataset(name, config or None, split=split, revision=revision or None, streaming=True)
            first = next(iter(rows), {column: ""})
        except (ValueError, RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
            raise UsageError(f"{self._name}: {_said(error)}; correct corpus.source") from None
        except Exception as error:
            raise EnvironmentLacks(f"{self._name} cannot be read ({_said(error)}); run again later") from None
        if not isinstance(first.get(column), str):
            raise UsageError(f"{self._name}: no text in a column {column!r}; there are {', '.join(first)}")
        return (row[column] or "" for row in rows)
