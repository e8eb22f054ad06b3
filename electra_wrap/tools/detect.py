"""`detect`: reads texts, and prints a table of the tokens of each.

Colors add nothing that the words do not say, because output may be piped.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from electra_wrap.errors import UsageError, visible

_STYLES = {"replaced": "bold red", "found": "green", "missed": "yellow", "false alarm": "bold red"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - the command line ends quietly when nobody reads on


def read_texts(texts: Sequence[str], file: str | None) -> Iterator[str]:
    """Yield the lines of `file` ("-" is stdin) or, without a file, `texts`; no blank ones.

    UsageError if one is not UTF-8, or all are blank.
    """
    source, is_blank = file or "the command", True
    lines: Iterable[bytes] = map(os.fsencode, texts)
    with contextlib.ExitStack() as stack:
        if file == "-":
            source, lines = "stdin", sys.stdin.buffer
        elif file:
            lines = stack.enter_context(Path(file).open("rb"))
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                problem = f"text {number:,} of {source} is not UTF-8"
                raise UsageError(f"{problem}; convert it with iconv") from None
            if text.strip():
                is_blank = False
                yield text
    if is_blank:
        raise UsageError(f"{source} has no text; give a sentence")


def show(results: Iterable[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print a table for each result of `inference.detect` or `inference.replace`, and counts."""
    console = console or _Console(highlight=False)
    texts, generated, total = 0, False, Counter[str]()
    for result in results:
        generated, counts = "original" in result, Counter[str]()
        originals = result.get("original", result["tokens"])
        table = Table("token", "original" if generated else "", box=None, pad_edge=False)
        table.add_column("replaced?", justify="right")
        table.add_column("")
        for position, token in enumerate(result["tokens"]):
            original = "" if originals[position] == token else originals[position]
            probability = f"{result['probabilities'][position]:.1%}"
            verdict = _judge(result, position)
            counts[verdict] += 1
            style = _STYLES.get(verdict)
            table.add_row(_visible(token), _visible(original), probability, verdict, style=style)
        text = _visible(result["text"][: result["cut"]])
        console.print(text, table, _summarize(counts, generated=generated), "", sep="\n")
        texts += 1
        total += counts
    if texts > 1:
        console.print(f"{texts:,} texts: {_summarize(total, generated=generated)}")


def _judge(result: Mapping[str, Any], position: int) -> str:
    """Return a verdict on the prediction for a token; "" for an original token found to be one."""
    predicted = result["replaced"][position]
    if position in result.get("changed", ()):
        return "found" if predicted else "missed"
    if not predicted:
        return ""
    return "false alarm" if "changed" in result else "replaced"


def _summarize(counts: Counter[str], *, generated: bool) -> str:
    if not generated:
        return f"{counts['replaced']:,} of {counts.total():,} tokens are predicted to be replaced"
    found, alarms = counts["found"], counts["false alarm"]
    return f"{found + counts['missed']:,} replaced, {found:,} found, {alarms:,} false alarms"


def _visible(text: str) -> Text:
    return Text(visible(text))
