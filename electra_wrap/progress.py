"""What a person sees while a stage runs: a bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Messages and progress. Results go to stdout.
console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Seconds between lines where stderr is no terminal.
INTERVAL = 30.0


def say(message: str) -> None:
    """Print one line of message."""
    with contextlib.suppress(OSError):  # nobody listens any more; the work goes on
        console.print(f"electra_wrap: {message}", markup=False)


class Meter:
    """Progress of `total` units (0: not known); the speed is that of this session's own units.

    With the unit MB numbers are bytes, and are shown as megabytes.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._first, self._started, self._printed, self._last = done, time.monotonic(), 0.0, -1
        self._bar: Progress | None = None
        if console.is_terminal:
            shown, note = TextColumn(f"{what} {{task.fields[shown]}}"), TextColumn("{task.fields[note]}")
            times = TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()
            self._bar = Progress(shown, BarColumn(), note, *times, console=console)
            self._task = self._bar.add_task(what, total=total or None, completed=done, shown=self._show(done), note="")

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self, done: int) -> str:
        scale, digits = (1e6, 1) if self._unit == "MB" else (1, 0)
        of = f"/{self._total / scale:,.{digits}f}" if self._total else ""
        return f"{done / scale:,.{digits}f}{of} {self._unit}"

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` units are done (of `total`, if that is known by now), with a `note`, e.g. the loss."""
        self._total = total or self._total
        now = time.monotonic()
        speed = (done - self._first) / max(now - self._started, 1e-9)
        note = f"{note}  {speed / (1e6 if self._unit == 'MB' else 1):.2f} {self._unit}/s".strip()
        if self._bar:
            self._bar.update(self._task, total=self._total or None, completed=done, shown=self._show(done), note=note)
        elif (done == self._total and done != self._last) or now - self._printed >= INTERVAL:
            self._printed, self._last = now, done
            remaining = f", {duration((self._total - done) / speed)} left" if done < self._total and speed else ""
            say(f"{self._what}: {self._show(done)}  {note}{remaining}")


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 42 s, 13 min, 5.2 h, 288 h (12 days)."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 3600:,.0f} h ({seconds / 86400:.0f} days)"
