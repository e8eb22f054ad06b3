"""Writing that is never seen half done, checksums and locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from electra_wrap.errors import UsageError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name for the file or directory `path`, and rename it at the end.

    What an interrupted attempt left under the temporary name is removed first; after an error,
    so is what this one wrote.
    """
    temporary = path.with_name(f"{path.name}.partial")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    move_into_place(temporary, path)


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` at the end.

    UsageError if `path` exists, unless `replace`.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path} exists; choose another --out, or replace it with --force")
    with atomic(path) as directory:
        directory.mkdir()
        yield directory
        remove(path)


def move_into_place(temporary: Path, path: Path) -> None:
    """Sync a file or directory to disk, then rename it to `path`."""
    for file in [temporary, *temporary.rglob("*")]:
        _sync(file)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush to disk, with the mode that the umask gives; some libraries write files as 0600."""
    if path.is_file():
        path.chmod((path.stat().st_mode | 0o666) & ~_UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def read_text(path: Path) -> str:
    """Return the text of a file. ValueError for anything else: reading a pipe would not end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    return path.read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new one."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in ASCII because file names need not be valid Unicode."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists. No directory is seen half removed."""
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():  # an earlier removal was interrupted
        shutil.rmtree(removed)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    path.rename(removed)
    shutil.rmtree(removed)


def archive(path: Path) -> Path | None:
    """Rename `path` to the first free `path.old-N` and return that; None if it does not exist."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_checksums(checksums: Path, files: Iterable[Path]) -> None:
    """Write the SHA-256 of files in the format of sha256sum, after syncing them to disk."""
    lines = []
    for file in files:
        _sync(file)
        lines.append(f"{sha256(file)}  {file.relative_to(checksums.parent)}\n")
    write_text(checksums, "".join(sorted(lines)))


def is_intact(checksums: Path, digest: Callable[[Path], str] = sha256) -> bool:
    """Whether the files match the checksums. False if there is no checksum file."""
    try:
        lines = [line.split("  ", 1) for line in checksums.read_text("utf-8").splitlines()]
        named = {checksums.parent / name: expected for expected, name in lines}
        # Reading a device or a pipe would not end.
        return bool(named) and all(
            path.is_file() and digest(path) == expected for path, expected in named.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. The kernel releases it when the process ends, however it ends.

    Shared locks do not exclude each other. UsageError, naming the holder, if another process has
    the lock and `wait` is false.
    """
    with path.open("a+") as file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            raise UsageError(
                f"{path.parent} is in use by process {holder}; wait for it or choose another "
                "--run-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield
