"""`detect`: reads texts, and prints the tokens of each."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from electra_wrap.errors import UsageError, visible


def read_texts(texts: Sequence[str]) -> Iterator[str]:
    """Yield the texts, or the lines of stdin for `-`; no blank ones. UsageError if not UTF-8."""
    lines: Iterable[bytes] = sys.stdin.buffer if texts == ["-"] else map(os.fsencode, texts)
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise UsageError(f"text {number:,} is not UTF-8; convert it with iconv") from None
        if text.strip():
            yield text


def show(result: Mapping[str, Any]) -> None:
    """Print a result of `inference.detect` or `inference.replace`: a line for each token."""
    print(visible(result["text"][: result["cut"]]))
    originals = result.get("original", result["tokens"])
    for position, token in enumerate(result["tokens"]):
        original = "" if originals[position] == token else f"for {originals[position]}"
        probability, verdict = result["probabilities"][position], _judge(result, position)
        line = f"  {visible(token):20} {visible(original):20} {probability:6.1%}  {verdict}"
        print(line.rstrip())


def _judge(result: Mapping[str, Any], position: int) -> str:
    """Return a verdict on the prediction for a token; "" for an original token found to be one."""
    predicted = result["replaced"][position]
    if position in result.get("changed", ()):
        return "found" if predicted else "missed"
    if not predicted:
        return ""
    return "false alarm" if "changed" in result else "replaced"
