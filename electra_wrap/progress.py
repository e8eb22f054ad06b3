"""Messages and progress on stderr: a bar in a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from electra_wrap.errors import printable

console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Seconds between lines where stderr is no terminal.
INTERVAL = 30.0


def log(message: str) -> None:
    """Print a message."""
    with contextlib.suppress(OSError):  # stderr may be closed; the work goes on
        console.print(f"electra_wrap: {printable(message)}", markup=False)


def warn(message: str) -> None:
    """Print a warning."""
    log(f"warning: {message}")


class ProgressBar:
    """Progress in units, e.g. steps; with the unit "MB", numbers are bytes.

    `total` is 0 where it is not known. The speed leaves out what was `done` at the start.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._scale = 1e6 if unit == "MB" else 1
        self._first, self._started, self._printed, self._last = done, time.monotonic(), 0.0, -1
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(f"{name} {{task.fields[amount]}}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            amount = self._amount(done)
            self._task = self._bar.add_task(
                name, total=total or None, completed=done, amount=amount, note=""
            )

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def _amount(self, done: int) -> str:
        digits = 1 if self._unit == "MB" else 0
        of = f"/{self._total / self._scale:,.{digits}f}" if self._total else ""
        return f"{done / self._scale:,.{digits}f}{of} {self._unit}"

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` units are done (of `total`, where it was not known before)."""
        self._total = total or self._total
        now = time.monotonic()
        speed = (done - self._first) / max(now - self._started, 1e-9)
        note = f"{note}  {speed / self._scale:.2f} {self._unit}/s".strip()
        amount = self._amount(done)
        if self._bar:
            total = self._total or None
            self._bar.update(self._task, total=total, completed=done, amount=amount, note=note)
        elif (done == self._total and done != self._last) or now - self._printed >= INTERVAL:
            self._printed, self._last = now, done
            remaining = ""
            if done < self._total and speed:
                remaining = f", {format_duration((self._total - done) / speed)} left"
            log(f"{self._name}: {amount}  {note}{remaining}")


def format_duration(seconds: float) -> str:
    """Format seconds: 42 s, 13 min, 5.2 h, 288 h (12 days)."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 3600:,.0f} h ({seconds / 86400:.0f} days)"
