"""Training data is built part by part, one for each shard of text, by several processes or machines at once.

A part is a function of its shard and of the profile alone, and has its final name only when it is whole. So a build
that was killed goes on with the parts that are missing, and n machines that share nothing but the run directory can
each build an nth of them.
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from electra_wrap import process
from electra_wrap.rundir import exclusive, partial, remove, whole, write_json, write_sums

#: The file of a part that says what it is, and the one with the digests of its files.
FACTS, SUMS = "part.json", "SHA256SUMS"

_READ = re.compile(r"\bread (\d+) of (part-\d+\.txt)$")

#: The job of the processes that `build` forks.
_job: Callable[[int, Path], int]


def build(
    job: Callable[[int, Path], int], out: Path, numbers: Sequence[int], workers: int, inputs: dict[str, Any]
) -> None:
    """Make the parts `numbers` under `out` by `job(number, directory to make)`, which returns how many examples.

    Several at a time, by forked processes: the caller is a child process without threads. It prints what `follow`
    reads. `inputs` is what the parts are made from.
    """
    global _job  # noqa: PLW0603 - what a forked process finds without pickling
    _job = job
    context = multiprocessing.get_context("fork")
    ours: dict[str, Any] = {"initializer": process.die_with_parent, "initargs": (os.getpid(),)}
    with process.telling(), concurrent.futures.ProcessPoolExecutor(workers, context, **ours) as pool:
        try:
            futures = [pool.submit(_build, out, number, inputs) for number in numbers]
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _build(out: Path, number: int, inputs: dict[str, Any]) -> None:
    with exclusive(out / f"{number:05d}.lock", wait=True):  # another machine may have been asked for it too
        part = path(out, number)
        if not whole(part / SUMS):
            remove(part)
            with partial(part) as temporary:
                made = {"examples": _job(number, temporary), "inputs": inputs}
                write_json(temporary / FACTS, made)
                write_sums(temporary / SUMS, list(temporary.iterdir()))


def path(parts: Path, number: int) -> Path:
    """Where a part is when it is whole."""
    return parts / f"{number:05d}"


def facts(part: Path) -> dict[str, Any] | None:
    """What a part was made from (`inputs`) and how many `examples` it has; None if it does not say so."""
    try:
        read: dict[str, Any] = json.loads((part / FACTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return read


class _Counted(io.FileIO):
    """A file that tells, once a second, how much of it was read."""

    def __init__(self, name: Path) -> None:
        super().__init__(name)
        self._done, self._told = 0, time.monotonic()

    def readinto(self, buffer: Any) -> int | None:
        number = super().readinto(buffer)
        self._done += number or 0
        if not number or time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            print(f"read {self._done} of {Path(self.name).name}", flush=True)
        return number


def open_counted(name: Path) -> IO[str]:
    """Open a text whose lines end with \\n alone; lines for `follow` are printed as it is read."""
    return io.TextIOWrapper(io.BufferedReader(_Counted(name), 2**20), encoding="utf-8", newline="\n")


def follow(on_bytes: Callable[[int], None]) -> Callable[[str], None]:
    """Return what reads the lines of `build`'s process; `on_bytes` gets how much text is done."""
    done: dict[str, int] = {}

    def read(line: str) -> None:
        if match := _READ.search(line):
            done[match[2]] = int(match[1])
            on_bytes(sum(done.values()))

    return read
