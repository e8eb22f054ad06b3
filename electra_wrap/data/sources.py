"""Sources of text: local files and URLs, which fsspec opens and decompresses."""

import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.utils import infer_compression

from electra_wrap.errors import ElectraWrapError, EnvironmentProblem, UsageError
from electra_wrap.progress import log

_ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz")

#: Seconds before each new attempt to open or read what failed.
PAUSES = (1, 2, 4, 8, 16)


def is_remote(name: str) -> bool:
    return "://" in name


def expand(name: str) -> list[str]:
    """Return the URLs that match a URL with `*`, or the name itself. UsageError if none does."""
    if not is_remote(name) or "*" not in name:
        return [name]
    filesystem, path = _filesystem(name)
    try:
        paths = sorted(filesystem.glob(path))
    except Exception as error:  # each file system has errors of its own
        raise EnvironmentProblem(f"{name} cannot be listed ({error!r}); run again later") from None
    if not paths:
        raise UsageError(f"corpus.source = {name!r} matches nothing; correct it")
    return [filesystem.unstrip_protocol(path) for path in paths]


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        # Stored bytes rather than decoded ones. The environment: proxies, passwords in ~/.netrc.
        options["client_kwargs"] = {"auto_decompress": False, "trust_env": True}
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
        return found
    except (ImportError, ValueError) as error:
        raise UsageError(f"corpus.source = {url!r}: {error}; correct it") from None


class Stream:
    """The text of a source, a path or a URL, as bytes, decompressed. `size` is as stored, or 0.

    EnvironmentProblem if a transfer fails for good; UsageError if the source does not exist, is
    truncated or corrupt, or if the SHA-256 of its stored bytes is not `sha256`.
    """

    def __init__(self, name: str, sha256: str | None = None, *, retry: bool = True) -> None:
        self.name, self._sha256 = name, sha256
        path = Path(name.partition("?")[0])
        if path.suffix in _ARCHIVES or ".tar" in path.suffixes:
            raise UsageError(f"{name}: an archive of files is not read; unpack it")
        pauses, compression = PAUSES if retry else (), infer_compression(path.name)
        file: Any
        if is_remote(name):
            filesystem, found = _filesystem(name)
            file = _retry(lambda: filesystem.open(found, "rb"), name, pauses)
        else:
            file = io.FileIO(name)
        self.size = int(getattr(file, "size", 0) or 0)
        self._raw = _Counter(file, name, pauses)
        self._stored = io.BufferedReader(self._raw, 2**16)
        self._text = compr[compression](self._stored) if compression else self._stored

    @property
    def done(self) -> int:
        """Number of stored bytes that have been read."""
        return self._raw.done

    def __iter__(self) -> Iterator[bytes]:
        """Yield the lines, with their ends."""
        try:
            yield from self._text
        except Exception as error:  # each compression has errors of its own
            if isinstance(error, ElectraWrapError) or getattr(error, "errno", None):
                raise  # a transfer's error or the disk's, not the content's
            raise UsageError(f"{self.name}: cannot be read as text: {error}; replace it") from None
        if self._sha256:
            while self._stored.read(2**20):
                pass  # what decompression left unread
            if (digest := self._raw.sha256.hexdigest()) != self._sha256:
                raise UsageError(
                    f"{self.name} has sha256 {digest}, the profile says {self._sha256}; correct one"
                )

    def close(self) -> None:
        self._raw.file.close()


def _retry(function: Any, name: str, pauses: tuple[int, ...]) -> Any:
    """Return what `function` returns, after new attempts where it fails."""
    for pause in (*pauses, None):
        try:
            return function()
        except Exception as error:  # each file system has errors of its own
            # fsspec raises FileNotFoundError for every failure of HTTP.
            status = getattr(error.__cause__, "status", None) if error.__cause__ else 404
            if isinstance(error, FileNotFoundError) and status in (404, 410):
                raise UsageError(f"{name}: no such file; correct corpus.source") from None
            if pause is None:
                problem = f"{name} cannot be read ({error.__cause__ or error!r})"
                raise EnvironmentProblem(f"{problem}; run again later") from None
            log(f"{name}: {error.__cause__ or error!r}; trying again in {pause} s")
            time.sleep(pause)


class _Counter(io.RawIOBase):
    """Counts and hashes what is read of a file, and repeats a read that failed."""

    def __init__(self, file: Any, name: str, pauses: tuple[int, ...]) -> None:
        self.file, self._name, self._pauses = file, name, pauses
        self.done, self.sha256 = 0, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self.file.read
        if is_remote(self._name):
            data: bytes = _retry(lambda: read(len(buffer)), self._name, self._pauses)
        else:
            data = read(len(buffer))
        buffer[: len(data)] = data
        self.done += len(data)
        self.sha256.update(data)
        return len(data)
