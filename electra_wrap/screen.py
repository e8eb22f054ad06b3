"""What `detect` shows of each text: its sentence, and each token with the probability that it was replaced.

What colour tells, a mark tells too: output may be piped, and not everybody sees the colours.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

#: Styles of probabilities from a value on: blue and orange, which every eye tells apart, with a black of their own.
#: (A discriminator that knows nothing says what share is replaced in training, 10 to 15%: that is no colour.)
STYLES = ((0.9, "bold #000000 on #f1891b"), (0.5, "bold #000000 on #fdc887"), (0.2, "#000000 on #a6d3ea"), (0.0, ""))

#: What the generator put in.
CHANGED = "underline"

#: Keeps the columns of right-to-left tokens in order, where a terminal turns such text around.
LEFT_TO_RIGHT = "\N{LEFT-TO-RIGHT MARK}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - the command line knows what to do with it


@dataclasses.dataclass
class Counts:
    """Texts, their tokens, tokens masked and changed by the generator, changes that were found, and false alarms."""

    texts: int = 0
    tokens: int = 0
    masked: int = 0
    changed: int = 0
    found: int = 0
    alarms: int = 0

    def add(self, result: Mapping[str, Any]) -> None:
        """Add what `check.detect` or `check.replace` says of a text."""
        changed = set(result.get("changed", ()))
        found = {place for place, replaced in enumerate(result["replaced"]) if replaced}
        self.texts += 1
        self.tokens += len(result["tokens"])
        self.masked += len(result.get("masked", ()))
        self.changed += len(changed)
        self.found += len(found & changed)
        self.alarms += len(found - changed)

    def line(self, generated: bool) -> str:
        """The counts in words, with the generator's part or without."""
        if not generated:
            return f"{self.alarms:,} of {_many(self.tokens, 'token')} found to be replaced"
        alarms = _many(self.alarms, "false alarm")
        if not self.masked:
            return f"0 replaced: no token can be masked; {alarms}"
        if not self.changed:
            return f"0 replaced: what the generator put in was there before; {alarms}"
        return f"{self.changed:,} replaced, {self.found:,} found; {alarms}"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def show(results: Iterable[Mapping[str, Any]], generated: bool, console: Console | None = None) -> None:
    """Print results of `check.detect`, or (`generated`) of `check.replace`, as they come."""
    console = console or _Console(highlight=False)
    total = Counts()
    for result in results:
        if not total.texts:
            console.print(_legend(generated))
        counts = Counts()
        for each in (counts, total):
            each.add(result)
        console.print()
        for name, sentence in _sentences(result, generated):
            indent = 11 if generated else 6
            for number, part in enumerate(sentence.wrap(console, max(1, console.width - indent), overflow="fold")):
                part.rstrip()
                console.print(Text.assemble((("" if number else name).ljust(indent), "dim"), part))
        console.print()
        for line in _lines(_words(result, console.width), console.width):
            console.print(*_rows(line), sep="\n", end="\n\n", no_wrap=True, overflow="ignore", crop=False)
        console.print(counts.line(generated))
    if total.texts > 1:
        console.print(f"\nin all, {total.texts:,} texts: {total.line(generated)}")


def visible(text: str) -> str:
    """Return a text on one line, without what a terminal would obey: escapes, and changes of direction."""
    return "".join(
        c if c.isprintable() or c in "\u200c\u200d" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def _legend(generated: bool) -> Text:
    what = "*put in by the generator*, above it what was there (= the same); " if generated else ""
    bands = zip(("<20%", "20–50%", ">50%!", ">90%!"), reversed(STYLES), strict=True)
    styled = [Text(words, style) for words, (_, style) in bands]
    return Text(" ").join([Text(f"{what}probability of a replacement:"), *styled])


def _sentences(result: Mapping[str, Any], generated: bool) -> list[tuple[str, Text]]:
    """The text as it was read and, if it was there, as the generator left it; each with its name."""
    more = "" if result["cut"] is None else " …"
    sentences = [("text", Text(visible(result["text"][: result["cut"]]) + more))]
    if generated:
        sentence = Text()
        for place, token in enumerate(result["tokens"]):
            changed = place in result["changed"]
            sentence.append("" if place == 0 or token.startswith("##") else " ")
            sentence.append(_mark(token, changed), CHANGED if changed else "")
        sentences.append(("generator", sentence.append(more)))
    return sentences


def _mark(token: str, changed: bool) -> str:
    return f"*{visible(token)}*" if changed else visible(token)


@dataclasses.dataclass
class _Cell:
    """A token's column: what was there if the generator was asked, the token, its probability; and their styles."""

    texts: tuple[str, ...]
    styles: tuple[str, ...]
    #: Columns between it and the one before: pieces of a word are closer together.
    gap: int

    @property
    def width(self) -> int:
        return max(map(cell_len, self.texts))


def _words(result: Mapping[str, Any], width: int) -> Iterator[list[_Cell]]:
    """The cells of each word: its first token, and the pieces (##) that follow. None is wider than `width`."""
    masked, changed = result.get("masked", ()), result.get("changed", ())
    word: list[_Cell] = []
    for place, token in enumerate(result["tokens"]):
        probability, found = result["probabilities"][place], result["replaced"][place]
        style = next(style for least, style in STYLES if probability >= least)
        was = visible(result["original"][place]) if place in changed else "=" if place in masked else ""
        texts = was, _mark(token, place in changed), f"{probability:.0%}{'!' * found}"
        styles = "dim", f"{style} {CHANGED}" if place in changed else style, style
        piece = bool(word) and token.startswith("##")
        if word and not piece:
            yield word
            word = []
        cut = (text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…" for text in texts)
        word.append(_Cell(tuple(cut), styles, 1 if piece else 2))
    if word:
        yield word


def _lines(words: Iterable[list[_Cell]], width: int) -> Iterator[list[_Cell]]:
    """Fill lines of `width` columns with words; only one that is longer than a line is divided."""
    line: list[_Cell] = []
    used = 0
    for word in words:
        fits = sum(cell.gap + cell.width for cell in word) - word[0].gap <= width
        for together in [word] if fits else [[cell] for cell in word]:
            needed = sum(cell.gap + cell.width for cell in together)
            if line and used + needed > width:
                yield line
                line, used = [], 0
            used += needed - (0 if line else together[0].gap)
            line += together
    if line:
        yield line


def _rows(line: Sequence[_Cell]) -> list[Text]:
    """The two rows of a line of cells, and above them what was there, if anything is to be said of that."""
    characters = {character for cell in line for text in cell.texts for character in text}
    mark = LEFT_TO_RIGHT if {"R", "AL"} & set(map(unicodedata.bidirectional, characters)) else ""
    rows = []
    for level in range(3):
        if level or any(cell.texts[0] for cell in line):
            row = Text(mark)
            for number, cell in enumerate(line):
                row.append(" " * cell.gap * (number > 0))
                row.append(cell.texts[level], cell.styles[level]).append(mark)
                row.append(" " * (cell.width - cell_len(cell.texts[level])), cell.styles[2] if level else "")
            rows.append(row)
    return rows
