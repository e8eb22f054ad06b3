"""Shards of text: one sentence a line, documents separated by blank lines, UTF-8."""

from __future__ import annotations

import codecs
import collections
import contextlib
import glob
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from electra_wrap import profile
from electra_wrap.data import sources, tfrecords
from electra_wrap.errors import UsageError

#: Largest piece of a document that is kept together. A text without blank lines would otherwise
#: be one piece of work: a single process would do it all, from memory.
MAX_PIECE_LINES, MAX_PIECE_BYTES = 1000, 2**20

#: A longer line is enormous; most likely the file has no line ends.
MAX_LINE_BYTES = 100_000

#: Control characters except white space. Upstream's tokenizer drops them silently.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")

#: What files are that begin with these bytes, and what to do.
_NOT_TEXT = {
    rb"\xff\xfe|\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    rb"\x1f\x8b": "compressed by gzip; name it .gz",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2; name it .bz2",
    rb"\xfd7zXZ": "compressed by xz; name it .xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd; name it .zst",
    rb"PK\x03\x04": "a zip archive; unpack it",
}

#: What `shard` counts, with the phrase for a report where that is not zero. Lines, documents,
#: words and bytes are of the text that is kept. The next three are always repaired, because that
#: loses no text; the three after them are subject to `corpus.bad_lines`.
COUNTS = {
    **dict.fromkeys(("lines", "documents", "words", "bytes", "held_out_lines"), ""),
    "byte_order_marks": "byte order marks, removed",
    "crlf_lines": "lines that end with \\r\\n, repaired",
    "empty_documents": "empty documents, removed",
    "invalid_utf8": "lines that are not UTF-8",
    "control_characters": "lines with control characters",
    "enormous_lines": f"lines of more than {MAX_LINE_BYTES:,} bytes",
    "skipped_lines": "lines skipped because of that",
    "duplicate_lines": "duplicate lines, left out",
    "duplicate_documents": "duplicate documents, left out",
}

#: Called with the stored bytes that have been read, their total (0 if unknown), and the lines.
OnProgress = Callable[[int, int, int], None]


def find_sources(names: Iterable[str], exclude: Path) -> list[str]:
    """Return the URLs and absolute paths to read for the values of `corpus.source`.

    Directories stand for their *.txt at any depth, or for upstream's records if they have no text.
    Nothing under `exclude`, the run directory, is returned. UsageError if a name matches nothing.
    """
    resolved: list[str] = []
    for name in names:
        if sources.is_remote(name):
            resolved.append(name)
            continue
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*.txt") if p.is_file() and p.name != "vocab.txt")
            files = files or sorted(path.glob(tfrecords.RECORD_GLOB))
        elif path.is_file():
            files = [path]
        elif not re.search(r"[*?[]", name):
            raise UsageError(f"corpus.source = {name!r}: no such file; correct it")
        else:
            matches = glob.glob(name, recursive=True)  # noqa: PTH207 - of absolute patterns, too
            files = sorted(Path(match) for match in matches if Path(match).is_file())
        files = [p.absolute() for p in files if not p.resolve().is_relative_to(exclude)]
        if not files:
            raise UsageError(f"corpus.source = {name!r} has no text; give *.txt files or URLs")
        resolved += map(str, files)
    return list(dict.fromkeys(resolved))


def shard(
    names: Iterable[str],
    text: Path,
    held_out: Path,
    settings: profile.Corpus,
    on_progress: OnProgress = lambda done, total, lines: None,
) -> dict[str, int]:
    """Write text to shards in the directory `text`, and held-out text to one in `held_out`.

    Pieces (a document, or `MAX_PIECE_LINES` of it) go to the shard with the fewest bytes so far,
    so that every process has equal work. A document is held out if the hash of its first piece, as
    a fraction, is below `settings.held_out`; so it stays held out when the corpus grows. Without
    blank lines, that is decided for each piece.

    If that holds out nothing, or everything, the text is read again: first in smaller pieces, if
    blank lines do not separate documents; then, if need be, with the nearest share that leaves text
    on both sides. A text of one piece is not held out.

    Returns the number of each of `COUNTS`; of duplicates, only of what was deduplicated.
    UsageError if there is no text, and errors as of `sources.Stream`.
    """
    for directory in (text, held_out):
        directory.mkdir(exist_ok=True)
    paths = [text / f"part-{number:05d}.txt" for number in range(settings.shards)]
    paths.append(held_out / "part-00000.txt")
    expanded = [file for name in names for file in sources.expand(name)]

    def write(piece_lines: int, share: float) -> _Sharder:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            sharder = _Sharder(files, settings, piece_lines, share)
            sharder.read(expanded, on_progress)
        if not sharder.counts["lines"]:
            raise UsageError("corpus.source has no text to train on; give a file with text")
        return sharder

    share, piece_lines = settings.held_out, MAX_PIECE_LINES
    sharder = write(piece_lines, share)
    if share and sharder.is_one_sided and not settings.blank_lines_separate_documents:
        lines = round(sharder.counts["lines"] * min(share, 0.5))
        piece_lines = max(1, min(lines, piece_lines))
        sharder = write(piece_lines, share)
    low, high = sharder.fractions
    if share and sharder.is_one_sided and (low < high or low < share):
        sharder = write(piece_lines, min(max(share, math.nextafter(low, 1)), high))
    return sharder.counts


class _Sharder:
    """Divides the text of sources among files. The last file gets the text that is held out."""

    def __init__(
        self, files: Sequence[BinaryIO], settings: profile.Corpus, piece_lines: int, share: float
    ) -> None:
        absent = {"duplicate_lines", "duplicate_documents"} - {f"duplicate_{settings.deduplicate}"}
        self.counts = {name: 0 for name in COUNTS if name not in absent}
        self.fractions = (1.0, 0.0)  # the smallest and the largest of a document
        self._files, self._sizes = files, [0] * len(files)
        self._settings, self._piece_lines, self._share = settings, piece_lines, share
        self._max_lines = settings.max_lines or math.inf
        self._separator = b"\n" if settings.blank_lines_separate_documents else b""
        self._digests: set[bytes] = set()
        self._piece: list[bytes] = []
        self._piece_bytes = self._read_lines = 0
        self._in_document = False  # whether a piece of the document has been written
        self._is_held_out: bool | None = None  # known from the document's first piece

    @property
    def is_one_sided(self) -> bool:
        """Whether all text is held out, or none."""
        return self.counts["held_out_lines"] in (0, self.counts["lines"])

    def read(self, names: Sequence[str], on_progress: OnProgress) -> None:
        """Read the sources, in order."""
        done = total = 0
        if not any(map(sources.is_remote, names)):
            total = sum(Path(name).stat().st_size for name in names)
        for name in names:
            if self._read_lines >= self._max_lines:
                break
            with contextlib.closing(sources.Stream(name, self._settings.sha256)) as stream:
                total = total or (stream.size if len(names) == 1 else 0)
                for raw in self._raw_lines(stream):
                    self._add_line(raw, name)
                    if not self._read_lines % 1000:
                        on_progress(done + stream.done, total, self._read_lines)
                self._end_document()
                done += stream.done
                on_progress(done, total, self._read_lines)

    def _raw_lines(self, stream: sources.Stream) -> Iterator[bytes]:
        """Yield each line. An enormous one is yielded in pieces that end at spaces, or skipped."""
        rest, is_continued, skip, is_first = b"", False, False, True
        while is_continued or self._read_lines < self._max_lines:
            raw = rest + stream.readline(MAX_LINE_BYTES - len(rest))
            if not raw:
                break
            if is_first:
                _refuse_other_formats(stream.name, raw)
            skip, rest, is_first = skip and is_continued, b"", False
            self._read_lines += not is_continued
            is_complete = len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n")
            if not is_complete:
                if not is_continued and (skip := self._skips("enormous_lines", stream.name)):
                    self.counts["skipped_lines"] += 1
                cut = raw.rfind(b" ") + 1 or codecs.utf_8_decode(raw, "replace", False)[1]
                raw, rest = raw[:cut], raw[cut:]
            # White space within an enormous line is no blank line.
            if not skip and (raw.strip() or not is_continued):
                yield raw
            is_continued = not is_complete

    def _skips(self, kind: str, name: str) -> bool:
        """Count a bad line; return whether to skip it. UsageError if the profile says "stop"."""
        self.counts[kind] += 1
        if self._settings.bad_lines == "stop":
            line = f"{name}: line {self._read_lines:,} of the corpus is one of the {COUNTS[kind]}"
            raise UsageError(f'{line}; fix it, or set corpus.bad_lines to "repair" or "skip"')
        return self._settings.bad_lines == "skip"

    def _add_line(self, raw: bytes, name: str) -> None:
        """Add a line to the piece, or end the document at a blank line."""
        if raw.strip():
            if text := self._repair(raw, name):
                self._piece.append(text)
                self._piece_bytes += len(text) + 1
            if len(self._piece) >= self._piece_lines or self._piece_bytes >= MAX_PIECE_BYTES:
                self._write_piece()
                if not self._separator:
                    self._is_held_out = None
        elif self._separator:
            self.counts["empty_documents"] += not (self._piece or self._in_document)
            self._end_document()

    def _repair(self, raw: bytes, name: str) -> bytes:
        """Return a line as upstream's reader takes it; b"" if it is skipped."""
        skip = False
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            # What cannot be decoded becomes U+FFFD, which the tokenizer drops.
            line, skip = raw.decode("utf-8", "replace"), self._skips("invalid_utf8", name)
        self.counts["crlf_lines"] += raw.endswith(b"\r\n")
        if line.startswith("\ufeff"):
            self.counts["byte_order_marks"] += 1
            line = line[1:]
        if _CONTROL.search(line):
            skip |= self._skips("control_characters", name)
            line = _CONTROL.sub("", line)
        if skip:
            self.counts["skipped_lines"] += 1
            return b""
        # Only \n ends a line for upstream's reader; other line ends of Python's are spaces.
        text = " ".join(line.split()).encode()
        return b"" if text and self._is_duplicate("lines", text) else text

    def _is_duplicate(self, kind: str, text: bytes) -> bool:
        """Whether to leave out a text because it was seen before. Counts it."""
        if kind != self._settings.deduplicate:
            return False
        digest = hashlib.blake2b(text, digest_size=12).digest()
        is_duplicate = digest in self._digests
        self._digests.add(digest)
        self.counts[f"duplicate_{kind}"] += is_duplicate
        return is_duplicate

    def _end_document(self) -> None:
        self._write_piece()
        self._in_document, self._is_held_out = False, None

    def _write_piece(self) -> None:
        if not self._piece:
            return
        text, lines = b"\n".join(self._piece) + b"\n" + self._separator, len(self._piece)
        self._piece, self._piece_bytes = [], 0
        if self._is_duplicate("documents", text):
            return
        if self._is_held_out is None:
            fraction = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
            low, high = self.fractions
            self.fractions = min(low, fraction), max(high, fraction)
            self._is_held_out = fraction < self._share
        number = -1 if self._is_held_out else self._sizes.index(min(self._sizes[:-1]))
        self._files[number].write(text)
        self._sizes[number] += len(text)
        self.counts["documents"] += not self._in_document
        self._in_document = True
        self.counts["lines"] += lines
        self.counts["words"] += lines + text.count(b" ")
        self.counts["bytes"] += len(text)
        self.counts["held_out_lines"] += lines * self._is_held_out


def _refuse_other_formats(name: str, beginning: bytes) -> None:
    for pattern, description in _NOT_TEXT.items():
        if re.match(pattern, beginning):
            raise UsageError(f"{name} is {description}")


def seen_share(text: Path, held_out: Path) -> float:
    """Return the share of held-out bytes in lines that the shards in `text` have, too."""
    counts = collections.Counter(_lines(held_out))
    sizes = {line: count * len(line) for line, count in counts.items()}
    seen = {line for line in _lines(text) if line in sizes}
    return sum(map(sizes.__getitem__, seen)) / max(1, sum(sizes.values()))


def _lines(directory: Path) -> Iterator[bytes]:
    """Yield the lines of shards that are not blank."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            yield from (line for line in file if line != b"\n")
