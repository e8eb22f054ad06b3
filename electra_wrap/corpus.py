"""Text in, shards out: one sentence a line, documents separated by blank lines, UTF-8."""

from __future__ import annotations

import codecs
import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from electra_wrap import profile, sources
from electra_wrap.errors import EnvironmentLacks, UsageError
from electra_wrap.rundir import remove, write_json

#: Largest piece kept together. A file without blank lines, or with one enormous document, would otherwise be
#: one piece of work: a single process would do it all, from memory.
MAX_PIECE_LINES, MAX_PIECE_BYTES = 1000, 2**20

#: A longer line is enormous: a file without line ends, most likely.
MAX_LINE_BYTES = 100_000

#: Upstream's records, which may be given in place of text.
RECORDS = "pretrain_data.tfrecord-*"

#: Seconds between the points from which sharding goes on after it was killed.
SAVE_EVERY = 3.0

#: Control characters that are no spaces either. Upstream's tokenizer drops them, so that nobody sees them.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")

#: How files begin that are no UTF-8 text, and what they are.
_NO_TEXT = {
    rb"\xff\xfe|\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    rb"\x1f\x8b": "compressed by gzip; name it .gz",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2; name it .bz2",
    rb"\xfd7zXZ": "compressed by xz; name it .xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd; name it .zst",
    rb"PK\x03\x04": "a zip archive; unpack it",
}


#: What is found in a corpus, and what a person is told of it if it is not zero. Lines, documents, words and bytes are
#: of the text kept; the next three are mended, whatever the profile says, because nothing of the text is lost by that;
#: `corpus.bad_lines` is for the three after them.
FINDINGS = {
    **dict.fromkeys(("lines", "documents", "words", "bytes", "held_out_lines"), ""),
    "byte_order_marks": "byte order marks, removed",
    "crlf_lines": "lines that end with \\r\\n, mended",
    "empty_documents": "empty documents, removed",
    "invalid_utf8": "lines that are not UTF-8",
    "control_characters": "lines with control characters",
    "enormous_lines": f"lines of more than {MAX_LINE_BYTES:,} bytes",
    "skipped_lines": "lines skipped because of that",
    "duplicate_lines": "duplicate lines, left out",
    "duplicate_documents": "duplicate documents, left out",
}


def find(names: Iterable[str], exclude: Path) -> list[str]:
    """Return what to read: URLs as they are, files, globs, and directories, whose *.txt are taken recursively.

    A directory of upstream's records, without text, gives those. Nothing under `exclude` (the run directory) is
    taken. UsageError if something local matches nothing.
    """
    found: list[str] = []
    for name in names:
        if sources.is_remote(name):
            found.append(name)
            continue
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*.txt") if p.is_file() and p.name != "vocab.txt")
            files = files or sorted(path.glob(RECORDS))
        elif path.is_file():
            files = [path]
        else:
            # Path.glob takes no absolute patterns
            files = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
        files = [p.absolute() for p in files if not p.resolve().is_relative_to(exclude)]
        if not files:
            raise UsageError(f"corpus.source = {name!r} has no text; give files, globs, URLs or directories with *.txt")
        found += map(str, files)
    return list(dict.fromkeys(found))


@dataclasses.dataclass
class _State:
    """How far sharding is: what it needs to go on, and to see whether it may."""

    identity: Any
    names: list[str]
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FINDINGS, 0))
    #: Number of the source, bytes of its text and lines of all that are done, and which version the server had.
    source: int = 0
    offset: int = 0
    read_lines: int = 0
    version: str | None = None
    #: Whether a document goes on there of which something was written, and whether it is held out.
    in_document: bool = False
    held_out: bool | None = None
    #: Bytes written to each shard and their CRC-32C; the last is the held-out one.
    sizes: list[int] = dataclasses.field(default_factory=list)
    checks: list[int] = dataclasses.field(default_factory=list)
    complete: bool = False

    def fits(self, shards: int) -> bool:
        """Whether this is what a state of so many shards looks like."""
        numbers = [self.source, self.offset, self.read_lines, *self.sizes, *self.checks, *self.counts.values()]
        return (
            len(self.sizes) == len(self.checks) == shards + 1
            and self.counts.keys() == FINDINGS.keys()
            and all(isinstance(number, int) and number >= 0 for number in numbers)
            and isinstance(self.names, list)
            and all(isinstance(name, str) for name in self.names)
            and isinstance(self.version, str | None)
            and {type(self.in_document), type(self.held_out)} <= {bool, type(None)}
        )


def shard(
    names: Iterable[str],
    work: Path,
    keys: profile.Corpus,
    identity: Any = None,
    on_progress: Callable[[int, int, int], None] = lambda done, total, lines: None,
) -> dict[str, int]:
    """Write the text as part-00000.txt … under `work`/corpus, and the held-out part of it under `work`/heldout.

    Pieces (documents, or 1000 lines of one) go whole to the shard with the fewest bytes so far, so that every
    process has equal work. Whether a document is held out depends on its own text alone, and so stays the same when
    the corpus grows. Returns how much there is of each of FINDINGS.

    What a killed call left in `work` is continued if it was given the same `identity` (JSON). `on_progress` gets how
    many bytes were read as they are stored, of how many (0: not known), and how many lines. UsageError if nothing is
    left, and as `sources.Stream`.
    """
    known = work / "state.json"
    state = None
    # Damaged is as good as not there.
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError):
        read = _State(**json.loads(known.read_text(encoding="utf-8")))
        state = read if read.fits(keys.shards) else None
    if state is None or state.identity != identity:
        remove(work)
        state = _State(identity, [file for name in names for file in sources.expand(name)])
        state.sizes, state.checks = [0] * (keys.shards + 1), [0] * (keys.shards + 1)
    if not state.complete:
        try:
            _Sharder(work, keys, state, on_progress).run()
        except _Changed:  # a source is not what it was: what was made of it is of no use
            remove(work)
            return shard(names, work, keys, identity, on_progress)
    if not any(state.sizes[:-1]):
        remove(work)
        raise UsageError("corpus.source has no text to train on; give a file with at least one line of text")
    return state.counts


class _Changed(Exception):
    """A source, or what was made of it, is not what it was when this was begun."""


class _Sharder:
    def __init__(self, work: Path, keys: profile.Corpus, state: _State, on_progress: Callable[..., None]) -> None:
        self._work, self._keys, self._state, self._on_progress = work, keys, state, on_progress
        self._counts = state.counts
        self._separator = b"\n" if keys.blank_lines_separate_documents else b""
        self._lines, self._documents = (_seen(keys, kind) for kind in ("lines", "documents"))
        self._files: list[BinaryIO] = []
        self._piece: list[bytes] = []
        self._piece_bytes = self._done = self._total = 0
        self._whole_line, self._saved = True, time.monotonic()

    def run(self) -> None:
        names = self._state.names
        if not any(map(sources.is_remote, names)):
            self._total = sum(Path(name).stat().st_size for name in names)
            self._done = sum(Path(name).stat().st_size for name in names[: self._state.source])
        for directory in ("corpus", "heldout"):
            (self._work / directory).mkdir(parents=True, exist_ok=True)
        paths = [self._work / "corpus" / f"part-{number:05d}.txt" for number in range(self._keys.shards)]
        with contextlib.ExitStack() as stack:
            paths.append(self._work / "heldout" / "part-00000.txt")
            for path, size, check in zip(paths, self._state.sizes, self._state.checks, strict=True):
                if size and _checksum(path, size) != check:
                    raise _Changed
                self._files.append(stack.enter_context(path.open("ab")))
                self._files[-1].truncate(size)
            while self._state.source < len(names) and not self._enough():
                self._read(names[self._state.source], len(names) == 1)
                self._state.source, self._state.offset, self._state.version = self._state.source + 1, 0, None
            self._save(complete=True)

    def _enough(self) -> bool:
        return self._keys.max_lines is not None and self._state.read_lines >= self._keys.max_lines

    def _read(self, name: str, alone: bool) -> None:
        """Read a source from where the state says."""
        state = self._state
        with contextlib.closing(sources.Stream(name, self._keys.sha256, state.offset)) as stream:
            if state.offset and stream.version != state.version:
                raise _Changed
            state.version = stream.version
            total = self._total or (stream.size if alone else 0)
            for raw, size in self._raw_lines(stream):
                if not state.offset:
                    _refuse_no_text(name, raw or b"")
                state.offset += size
                if raw is None:
                    continue
                if raw.strip():
                    self._add(raw, name)
                    if len(self._piece) >= MAX_PIECE_LINES or self._piece_bytes >= MAX_PIECE_BYTES:
                        self._write()
                        if not self._keys.blank_lines_separate_documents:
                            state.held_out = None
                elif self._keys.blank_lines_separate_documents:
                    self._counts["empty_documents"] += not (self._piece or state.in_document)
                    self._end_document()
                if not self._piece and self._whole_line and time.monotonic() - self._saved > SAVE_EVERY:
                    self._save()
                if not state.read_lines % 1000:
                    self._on_progress(self._done + stream.done, total, state.read_lines)
                if self._enough():
                    break
            self._end_document()
            self._done += stream.done
            self._on_progress(self._done, total, state.read_lines)

    def _raw_lines(self, stream: sources.Stream) -> Iterator[tuple[bytes | None, int]]:
        """Yield each line and how many bytes it takes. Of an enormous one, pieces that end at spaces, or None."""
        rest = b""
        while raw := rest + stream.readline(MAX_LINE_BYTES - len(rest)):
            rest, goes_on = b"", not self._whole_line
            skip = goes_on and (self._keys.bad_lines == "skip" or not raw.strip())
            self._whole_line = len(raw) < MAX_LINE_BYTES or raw.endswith(b"\n")
            if self._whole_line:
                self._state.read_lines += 1
            else:
                if not goes_on and (skip := self._bad("enormous_lines", stream.name)):
                    self._counts["skipped_lines"] += 1
                cut = raw.rfind(b" ") + 1 or codecs.utf_8_decode(raw, "replace", False)[1]
                raw, rest = raw[:cut], raw[cut:]
            yield None if skip else raw, len(raw)
        if not self._whole_line:  # the text ended inside it
            self._whole_line, self._state.read_lines = True, self._state.read_lines + 1

    def _add(self, raw: bytes, name: str) -> None:
        """Add a line to the piece, mended."""
        bad = False
        try:
            line = raw.decode()
        except UnicodeDecodeError:
            # What cannot be read becomes U+FFFD, which the tokenizer drops.
            line, bad = raw.decode("utf-8", "replace"), self._bad("invalid_utf8", name)
        if raw.endswith(b"\r\n"):
            self._counts["crlf_lines"] += 1
        if line.startswith("\ufeff"):
            self._counts["byte_order_marks"] += 1
            line = line[1:]
        if _CONTROL.search(line):
            bad |= self._bad("control_characters", name)
            line = _CONTROL.sub("", line)
        if bad:
            self._counts["skipped_lines"] += 1
            return
        # Upstream's reader ends a line at \n alone; what else Python calls a line end is a space.
        text = " ".join(line.split()).encode()
        if not text:
            return
        if self._lines is not None and self._lines(text):
            self._counts["duplicate_lines"] += 1
            return
        self._piece.append(text)
        self._piece_bytes += len(text) + 1

    def _bad(self, kind: str, name: str) -> bool:
        """Count a bad line; return whether it is to be skipped. UsageError if the profile says stop."""
        self._counts[kind] += 1
        if self._keys.bad_lines == "stop":
            line = self._state.read_lines + (kind == "enormous_lines")
            raise UsageError(
                f"{name}: line {line:,} of the corpus is one of the {FINDINGS[kind]}; mend it, or set "
                'corpus.bad_lines to "repair" or "skip"'
            )
        return self._keys.bad_lines == "skip"

    def _end_document(self) -> None:
        self._write()
        self._state.in_document, self._state.held_out = False, None

    def _write(self) -> None:
        """Write the piece to where it belongs."""
        if not self._piece:
            return
        text = b"\n".join(self._piece) + b"\n" + self._separator
        lines = len(self._piece)
        self._piece, self._piece_bytes = [], 0
        if self._documents is not None and self._documents(text):
            self._counts["duplicate_documents"] += 1
            return
        if self._state.held_out is None:  # the first piece of a document decides for all
            self._state.held_out = _fraction(text) < self._keys.held_out
        sizes = self._state.sizes
        number = len(sizes) - 1 if self._state.held_out else sizes.index(min(sizes[:-1]))
        self._files[number].write(text)
        sizes[number] += len(text)
        self._state.checks[number] = google_crc32c.extend(self._state.checks[number], text)
        self._counts["documents"] += not self._state.in_document
        self._state.in_document = True
        self._counts["lines"] += lines
        self._counts["words"] += lines + text.count(b" ")
        self._counts["bytes"] += len(text)
        self._counts["held_out_lines"] += lines * self._state.held_out

    def _save(self, complete: bool = False) -> None:
        """Write down how far this is, when the shards are on disk. Deduplication would have to remember too much."""
        if not complete and (self._lines or self._documents):
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        self._state.complete = complete
        write_json(self._work / "state.json", dataclasses.asdict(self._state))
        self._saved = time.monotonic()


def seen_share(text: Path, held_out: Path) -> float:
    """Share of the bytes of the held-out shards that are in lines which the text's shards have, too."""
    lines: collections.Counter[bytes] = collections.Counter()
    for path in held_out.iterdir():
        with path.open("rb") as file:
            for line in file:
                lines[line] += len(line) if line != b"\n" else 0
    unseen = dict(lines)
    for path in text.iterdir():
        with path.open("rb") as file:
            for line in file:
                unseen.pop(line, None)
    return 1 - sum(unseen.values()) / max(1, lines.total())


def _refuse_no_text(name: str, beginning: bytes) -> None:
    for magic, what in _NO_TEXT.items():
        if re.match(magic, beginning):
            raise UsageError(f"{name} is {what}")


def _checksum(path: Path, size: int) -> int | None:
    """CRC-32C of the first `size` bytes of a file; None if it is shorter."""
    check = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while size and (read := file.read(min(size, 2**20))):
            check, size = google_crc32c.extend(check, read), size - len(read)
    return None if size else check


def _fraction(text: bytes) -> float:
    """Map a text to a number in [0, 1), uniformly and for good."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def _seen(keys: profile.Corpus, kind: str) -> Callable[[bytes], bool] | None:
    """Return what tells of a text whether it, or one that is similar, came before; None if nobody asked for that."""
    if keys.deduplicate != kind:
        return None
    if keys.similarity == 1:
        digests: set[bytes] = set()

        def exact(text: bytes) -> bool:
            number = len(digests)
            digests.add(hashlib.blake2b(text, digest_size=12).digest())
            return len(digests) == number

        return exact
    try:
        import datasketch
    except ImportError:
        raise EnvironmentLacks("corpus.similarity needs a package: pip install 'electra-wrap[similar]'") from None
    index = datasketch.MinHashLSH(threshold=keys.similarity, num_perm=128)

    def near(text: bytes) -> bool:
        shingles = datasketch.MinHash(num_perm=128)
        shingles.update_batch([text[i : i + 8] for i in range(max(1, len(text) - 7))])
        known = bool(index.query(shingles))
        if not known:
            index.insert(len(index.keys), shingles)
        return known

    return near
