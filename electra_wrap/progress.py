"""Messages and progress on stderr: a bar in a terminal, a line every 30 seconds elsewhere."""

import contextlib
import sys
from typing import Any

from tqdm import tqdm

from electra_wrap.errors import visible

#: Seconds between lines where stderr is no terminal.
INTERVAL = 30.0


def log(message: str) -> None:
    """Print a message."""
    with contextlib.suppress(OSError):  # stderr may be closed; the work goes on
        tqdm.write(f"electra_wrap: {visible(message)}", file=sys.stderr)


def warn(message: str) -> None:
    """Print a warning."""
    log(f"warning: {message}")


class _Lines:
    """stderr, where each state of a bar is a line of its own."""

    def write(self, text: str) -> None:
        if state := text.strip():
            log(state)

    def flush(self) -> None: ...


class ProgressBar(tqdm):  # type: ignore[misc]
    """Progress in units, e.g. steps or B (bytes). `total` is 0 where it is not known."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        options: dict[str, Any] = {
            "total": total or None,
            "initial": done,
            "unit": unit,
            "unit_scale": unit == "B",
        }
        if not sys.stderr.isatty():
            options |= {"file": _Lines(), "mininterval": INTERVAL, "ascii": True, "ncols": 99}
        super().__init__(desc=name, dynamic_ncols=sys.stderr.isatty(), **options)

    def show(self, done: int, note: str = "", total: int = 0) -> None:
        """Show that `done` units are done (of `total`, where it was not known before)."""
        self.total: int | None = total or self.total
        self.set_postfix_str(note, refresh=False)
        self.update(done - self.n)


def format_duration(seconds: float) -> str:
    """Format seconds as [H:]MM:SS."""
    return str(tqdm.format_interval(seconds))
