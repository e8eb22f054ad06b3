"""Examples are built in parts, one for each shard of text, by several processes or machines.

A part depends on its shard and on the profile alone, and gets its final name when it is complete.
So a build that was killed continues with the missing parts, and n machines that share nothing but
the run directory can each build an nth of them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from electra_wrap import events, files, subprocesses

#: In each part: the file of its metadata, and the file with the checksums of all files.
METADATA, CHECKSUMS = "part.json", "SHA256SUMS"

#: Builds a part in a directory that it makes; returns the number of examples.
Job = Callable[[int, Path], int]

#: The job of the processes that `build` forks.
_job: Job


def build(
    job: Job, out: Path, numbers: Sequence[int], workers: int, inputs: dict[str, Any]
) -> None:
    """Build the parts `numbers` under `out`, each by `job(number, directory)`.

    Up to `workers` jobs run at the same time in forked processes, so the caller must be a child
    process without threads. `inputs`, what the parts are made from, goes to their metadata.
    """
    global _job  # noqa: PLW0603 - a forked process finds it there without pickling
    _job = job
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=subprocesses.die_with_parent, initargs=(os.getpid(),)
    )
    with subprocesses.report_errors():
        try:
            futures = [pool.submit(_build, out, number, inputs) for number in numbers]
            for future in concurrent.futures.as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _build(out: Path, number: int, inputs: dict[str, Any]) -> None:
    part = part_path(out, number)
    # Another machine may build the same part.
    with files.lock(out / f"{number:05d}.lock", wait=True):
        if files.is_intact(part / CHECKSUMS):
            return
        files.remove(part)
        with files.atomic(part) as temporary:
            examples = _job(number, temporary)
            files.write_json(temporary / METADATA, {"examples": examples, "inputs": inputs})
            files.write_checksums(temporary / CHECKSUMS, list(temporary.iterdir()))


def part_path(parts: Path, number: int) -> Path:
    """Return the path of a part, which exists when the part is complete."""
    return parts / f"{number:05d}"


def read_metadata(part: Path) -> dict[str, Any] | None:
    """Return the number of `examples` of a part and the `inputs` that it was made from.

    None if the part does not exist or its metadata are damaged.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        metadata: dict[str, Any] = json.loads((part / METADATA).read_text(encoding="utf-8"))
        return metadata
    return None


class _ReportingFile(io.FileIO):
    """A file that emits an event once a second while it is read, and at its end."""

    _done, _reported = 0, 0.0

    def readinto(self, buffer: Any) -> int | None:
        number = super().readinto(buffer)
        self._done += number or 0
        if not number or time.monotonic() - self._reported > 1:
            self._reported = time.monotonic()
            events.emit(events.Progress(Path(self.name).name, self._done))
        return number


def open_with_progress(path: Path) -> IO[str]:
    """Open a text file for reading. Lines end with \\n alone; Progress events are emitted."""
    buffered = io.BufferedReader(_ReportingFile(path), 2**20)
    return io.TextIOWrapper(buffered, encoding="utf-8", newline="\n")


def sum_progress(on_bytes: Callable[[int], None]) -> Callable[[events.Event], None]:
    """Return a function of events that passes on how many bytes of all files have been read."""
    done: dict[str, int] = {}

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Progress):
            done[event.file] = event.bytes
            on_bytes(sum(done.values()))

    return on_event
