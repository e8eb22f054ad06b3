"""What TensorBoard shows of a run: numbers with a name and a step, and the hyperparameters as text.

Written by the command itself, whichever engine trains, and read back for the report. Each model has two of
TensorBoard's runs, models/NAME/train and models/NAME/eval, which use the same tags.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# TensorBoard's reader and writer import TensorFlow if it is there, unless this module is.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.plugins.text.summary_v2 import text_pb  # noqa: E402

from electra_wrap.upstream.records import RecordWriter  # noqa: E402


class Writer:
    """Appends to the events in a directory; those of `start` and later, of an attempt that was killed, are void.

    Nothing is said of a disk that is full: the work is worth more than its scalars.
    """

    def __init__(self, directory: Path, start: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self._file = RecordWriter(str(directory / name))
        self._add(0, file_version="brain.Event:2")
        if start is not None:
            self._add(start, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]))

    def text(self, step: int, tag: str, values: Mapping[str, Any]) -> None:
        """Write a table of two columns."""
        rows = "".join(f"| {key} | {json.dumps(value, ensure_ascii=False)} |\n" for key, value in values.items())
        self._add(step, summary=text_pb(tag, f"| | |\n|---|---|\n{rows}".encode("utf-8", "replace").decode()))

    def _add(self, step: int, **what: Any) -> None:
        with contextlib.suppress(OSError):
            self._file.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
            self._file.flush()


def read(directory: Path, *, void: bool = False) -> dict[str, list[tuple[int, float, float]]]:
    """Return the scalars in a directory by tag: step, time in seconds, value; `void`: with those that were replaced."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of what is void, which we know
    if not directory.is_dir():
        return {}
    everything = {"scalars": 0}
    events = EventAccumulator(str(directory), everything, purge_orphaned_data=not void).Reload()
    return {
        tag: [(event.step, event.wall_time, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
