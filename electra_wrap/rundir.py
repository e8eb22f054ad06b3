"""A run directory: its layout, its manifest, its lock, and writing that cannot be seen half done."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_wrap.errors import UsageError


class RunDir:
    """Paths of one run, and the manifest: what each stage was made from, and how it ended.

    The manifest also remembers the SHA-256 of every file by size and modification time, so that asking whether
    something changed costs a `stat`, not a read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.manifest: dict[str, Any] = {"stages": {}, "digests": {}}
        if (manifest := self.path / "manifest.json").is_file():
            try:
                read = json.loads(manifest.read_text(encoding="utf-8"))
                self.manifest = {key: read[key] for key in self.manifest}
            except (ValueError, KeyError, TypeError):
                raise UsageError(
                    f"{manifest} is damaged; move it away to rebuild what it described, or choose another --run-dir"
                ) from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def save(self) -> None:
        """Write the manifest."""
        write_json(self.path / "manifest.json", self.manifest)

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, or of a directory's sorted relative names and file digests.

        FileNotFoundError if there is neither.
        """
        if path.is_dir():
            names = sorted(p for p in path.rglob("*") if p.is_file())
            lines = "".join(f"{self.digest(p)}  {p.relative_to(path)}\n" for p in names)
            return hashlib.sha256(lines.encode()).hexdigest()
        status = path.stat()
        known = self.manifest["digests"].get(self._key(path))
        if known and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        self.manifest["digests"][self._key(path)] = [status.st_size, status.st_mtime_ns, value]
        return value

    def _key(self, path: Path) -> str:
        # Relative inside the run directory, so that a run can be moved.
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    @contextlib.contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Hold the run directory, exclusively or with others that do the same. UsageError, naming who has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / ".lock", shared):
            yield

    def set_aside(self, path: Path) -> Path | None:
        """Rename `path` to the first free `path.old-N` and return that; None if there was nothing there."""
        if not path.exists():
            return None
        number = 1
        while (target := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        path.rename(target)
        return target


@contextlib.contextmanager
def exclusive(path: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`. The kernel releases it when the process ends, however it ends.

    UsageError, naming the holder, if another process has it, or else `wait`; `shared` ones do not exclude each other.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            raise UsageError(
                f"{path.parent} is in use by process {holder}; wait for it or choose another --run-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def partial(path: Path) -> Iterator[Path]:
    """Yield the temporary name under which to make the file or directory `path`; put it in place at the end.

    What an interrupted attempt left under that name, or this one leaves after an error, is removed: nobody was
    told that it exists.
    """
    temporary = path.with_name(f"{path.name}.partial")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    finish(temporary, path)


def finish(temporary: Path, path: Path) -> None:
    """Rename what is done to its name, when it is on disk."""
    for file in [temporary, *temporary.rglob("*")]:
        _sync(file)
    temporary.rename(path)
    _sync(path.parent)


def link(source: Path, target: Path) -> None:
    """Give a file another name, or where the file system knows no links, a copy of it."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    with partial(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there. A directory is never seen half removed."""
    if not path.is_dir():
        return path.unlink(missing_ok=True)
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
