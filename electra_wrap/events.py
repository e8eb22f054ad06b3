"""The events that child processes report: one line of JSON each on stdout."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """`bytes` of text have been read since the last event."""

    bytes: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training runs on: device, precision, number of threads, versions of packages."""

    values: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Step:
    """A logged training step. `clock` is the child's monotonic clock in seconds."""

    step: int
    clock: float
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of the checkpoint of `step` on `examples` held-out examples."""

    step: int
    examples: int
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error: the name of its class in errors.py, and its message."""

    kind: str
    message: str


Event = Progress | Setup | Step | Evaluation | Failure
OnEvent = Callable[[Event], None]

_TYPES: dict[str, Any] = {
    kind.__name__.lower(): kind for kind in (Progress, Setup, Step, Evaluation, Failure)
}


def emit(event: Event) -> None:
    """Print an event for the parent process."""
    name = type(event).__name__.lower()
    print(json.dumps({"event": name, **dataclasses.asdict(event)}), flush=True)


def parse(line: str) -> Event | None:
    """Return the event on a line of a child's output, or None if the line is not an event."""
    if not line.startswith('{"event": "'):
        return None
    # Another process may have written to the end of the same line.
    values = json.JSONDecoder().raw_decode(line)[0]
    event: Event = _TYPES[values.pop("event")](**values)
    return event
