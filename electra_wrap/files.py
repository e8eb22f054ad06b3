"""Files and directories that are never seen half written, checksums and locks."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from electra_wrap.errors import UsageError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary name for the file or directory `path`, and rename it at the end.

    What an interrupted attempt left under the temporary name is removed first; after an error,
    so is what this one wrote. A directory is made, in a parent that exists.
    """
    temporary = path.with_name(f"{path.name}.partial")
    remove(temporary)
    try:
        if directory:
            temporary.mkdir()
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    move_into_place(temporary, path)


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


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new one."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, in ASCII because file names need not be valid Unicode."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def archive(path: Path) -> Path | None:
    """Rename `path` to the first free `path.old-N` and return that; None if it does not exist."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target


def write_checksums(checksums: Path, files: Iterable[Path]) -> None:
    """Write the SHA-256 of files in the format of sha256sum, after syncing them to disk."""
    lines = []
    for file in files:
        _sync(file)
        lines.append(f"{sha256(file)}  {file.relative_to(checksums.parent)}\n")
    write_text(checksums, "".join(sorted(lines)))


def read_checksums(checksums: Path) -> dict[Path, str]:
    """Return the SHA-256 of each file that a checksum file names; empty if it is damaged."""
    try:
        lines = [line.split("  ", 1) for line in checksums.read_text("utf-8").splitlines()]
        return {checksums.parent / name: digest for digest, name in lines}
    except ValueError:
        return {}


def describe(paths: Iterable[Path]) -> str:
    """Return what tells files from others: number, size, a digest of names, sizes and times."""
    stats = [(path.name, (stat := path.stat()).st_size, int(stat.st_mtime)) for path in paths]
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
    return f"{len(stats):,} files, {sum(size for _, size, _ in stats):,} bytes, {digest}"


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. The kernel releases it when the process ends, however it ends.

    UsageError if another process has the lock and `wait` is false.
    """
    try:
        with filelock.FileLock(path, blocking=wait):
            yield
    except filelock.Timeout:
        raise UsageError(
            f"{path.parent} is in use by another process; wait for it or choose another --run-dir"
        ) from None
