"""TensorBoard's event files: writing and reading them.

The command writes them, whichever engine trains. Each model has two TensorBoard runs with the same
tags: models/NAME/train and models/NAME/eval.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb

from electra_wrap.data.tfrecords import RecordWriter

# TensorBoard uses TensorFlow unless this module exists.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumed training


class Writer:
    """Writes a new event file in a directory, whose parent must exist.

    With `start`, it replaces the earlier events of that step and later ones. Errors of the disk are
    ignored: a training does not fail because of its scalars.
    """

    def __init__(self, directory: Path, start: int | None = None) -> None:
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        self._file = RecordWriter(str(directory / name))
        self._write(0, file_version="brain.Event:2")
        if start is not None:
            self._write(start, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def write_table(self, step: int, tag: str, rows: Mapping[str, Any]) -> None:
        """Write a text with a table of two columns."""
        lines = [f"| {key} | {json.dumps(rows[key], ensure_ascii=False)} |" for key in rows]
        table = "\n".join(["| | |", "|---|---|", *lines])
        self._write(step, summary=text_pb(tag, table.encode("utf-8", "replace").decode()))

    def _write(self, step: int, **content: Any) -> None:
        with contextlib.suppress(OSError):
            event = Event(wall_time=time.time(), step=step, **content)
            self._file.write(event.SerializeToString())
            self._file.flush()


def read(directory: Path, *, replaced: bool = False) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars in a directory: for each tag, the steps and values.

    With `replaced`, events that a later attempt replaced are included.
    """
    if not directory.is_dir():
        return {}
    reader = EventAccumulator(str(directory), {"scalars": 0}, purge_orphaned_data=not replaced)
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}
