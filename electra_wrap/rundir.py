"""A run directory: its layout, its manifest, its lock, and writing that cannot be seen half done."""

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

#: A run's manifest, and a second copy: one of the two is whole, whatever happens to the other.
MANIFESTS = ("manifest.json", "manifest.copy.json")


class RunDir:
    """Paths of one run, and the manifest: what each stage was made from, and how it ended.

    The manifest also remembers the SHA-256 of every file by size and modification time, so that asking whether
    something changed costs a `stat`, not a read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._read()

    def _read(self) -> None:
        self.manifest: dict[str, Any] = {"stages": {}, "digests": {}, "models": {}}
        there = [file for file in map(self.path.joinpath, MANIFESTS) if file.is_file()]
        for file in there:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                read = json.loads(file.read_text(encoding="utf-8"))
                for entry in read["stages"].values():
                    kinds = {"outcome": str, "inputs": dict, "versions": dict}
                    if entry["outcome"] == "done":
                        kinds |= {"outputs": dict, "facts": dict}
                    if not all(isinstance(entry[key], kind) for key, kind in kinds.items()):
                        raise ValueError
                self.manifest = {key: dict(read.get(key, {})) for key in self.manifest}
                return
        if there:
            raise UsageError(f"{there[0]} is damaged, and its copy too; restore one, or choose another --run-dir")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def save(self) -> None:
        """Write the manifest."""
        for name in MANIFESTS:
            write_json(self.path / name, self.manifest)

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
        if isinstance(known, list) and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        value = sha256(path)
        self.manifest["digests"][self._key(path)] = [status.st_size, status.st_mtime_ns, value]
        return value

    def forget(self, directory: Path) -> None:
        """Have what is under a directory read again when its digest is asked for: a bit may rot unnoticed."""
        known = self.manifest["digests"]
        for key in [key for key in known if (self.path / key).is_relative_to(directory)]:
            del known[key]

    def _key(self, path: Path) -> str:
        # Relative inside the run directory, so that a run can be moved.
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    @contextlib.contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Hold the run directory, exclusively or with others that do the same. UsageError, naming who has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with exclusive(self.path / ".lock", shared):
            self._read()  # another one may have worked here in between
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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(sums: Path, files: Iterable[Path]) -> None:
    """Write the digests of files beside `sums` as sha256sum does, when all is on disk. What has none is not whole."""
    lines = []
    for file in files:
        _sync(file)
        lines.append(f"{sha256(file)}  {file.relative_to(sums.parent)}\n")
    write_text(sums, "".join(sorted(lines)))


def whole(sums: Path, digest: Callable[[Path], str] = sha256) -> bool:
    """Whether files are as `write_sums` found them, by what gives their digests."""
    try:
        lines = [line.split("  ", 1) for line in sums.read_text(encoding="utf-8").splitlines()]
        return bool(lines) and all(digest(sums.parent / name) == known for known, name in lines)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


@contextlib.contextmanager
def partial(path: Path) -> Iterator[Path]:
    """Yield the temporary name under which to make the file or directory `path`; put it in place at the end.

    What an interrupted attempt left under that name, or this one leaves after an error, is removed: nobody was
    told that it exists.
    """
    temporary = path.with_name(f"{path.name}.partial")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    finish(temporary, path)


@contextlib.contextmanager
def output(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` at the end. UsageError if that exists, without `force`."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; choose another --out, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial(path) as directory:
        directory.mkdir()
        yield directory
        remove(path)


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
    """Write `value` as JSON, atomically; in ASCII, because the names of files need not be Unicode."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there. A directory is never seen half removed."""
    removed = path.with_name(f".{path.name}.removed")
    if removed.exists():  # an attempt at this was killed
        shutil.rmtree(removed)
    if not path.is_dir():
        return path.unlink(missing_ok=True)
    path.rename(removed)
    shutil.rmtree(removed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
