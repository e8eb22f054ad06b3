"""Text in, shards out: one sentence a line, documents separated by blank lines, UTF-8."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec

from electra_wrap import profile
from electra_wrap.errors import UsageError

#: Longest piece kept together. A file without blank lines, or with one enormous document, would otherwise be
#: one piece of work: a single process would do it all, from memory.
MAX_PIECE_LINES = 1000


#: Upstream's records, which may be given in place of text.
RECORDS = "pretrain_data.tfrecord-*"


@dataclasses.dataclass
class Counts:
    """What became of a corpus: of the text kept, and of what was mended or left out on the way."""

    lines: int = 0
    pieces: int = 0
    bytes: int = 0
    held_out_lines: int = 0
    invalid_utf8: int = 0


def find_files(sources: Iterable[str], exclude: Path) -> list[Path]:
    """Return the text files of `sources`: files, globs, and directories, whose *.txt are taken recursively.

    A directory of upstream's records, without text, gives those.

    Nothing under `exclude` (the run directory) is taken. UsageError if a source matches nothing.
    """
    files: list[Path] = []
    for source in sources:
        if "://" in source:
            raise UsageError(
                f"corpus.source = {source!r}: remote text is not fetched; download it and --set corpus.source=FILE"
            )
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*.txt") if p.is_file() and p.name != "vocab.txt")
            found = found or sorted(path.glob(RECORDS))
        elif path.is_file():
            found = [path]
        else:
            # Path.glob takes no absolute patterns
            matches = glob.glob(source, recursive=True)  # noqa: PTH207
            found = sorted(Path(p) for p in matches if Path(p).is_file())
        found = [p.resolve() for p in found if not p.resolve().is_relative_to(exclude)]
        if not found:
            raise UsageError(f"corpus.source = {source!r} has no text; give files, globs or directories with *.txt")
        files += [p for p in found if p not in files]
    return files


def shard(files: Iterable[Path], training: Path, held_out: Path, keys: profile.Corpus) -> Counts:
    """Write the text as part-00000.txt … under `training`, and the held-out part of it under `held_out`.

    Pieces (documents, or 1000 lines of one) go whole to the shard with the fewest bytes so far, so that every
    process has equal work. Whether a piece is held out depends on its own text alone, and so stays the same when
    the corpus grows. Compressed files (.gz, .bz2, .xz, .zst as fsspec knows them) are read as text. Lines that
    are not UTF-8 get replacement characters, which the tokenizer drops, and are counted. UsageError if nothing
    is left.
    """
    counts = Counts()
    separator = "\n" if keys.blank_lines_separate_documents else ""
    with contextlib.ExitStack() as stack:

        def create(directory: Path, number: int) -> list:  # type: ignore[type-arg]
            directory.mkdir()
            names = (directory / f"part-{i:05d}.txt" for i in range(number))
            return [stack.enter_context(name.open("w", encoding="utf-8", newline="\n")) for name in names]

        writers = create(training, keys.shards)
        held_out_writer = create(held_out, 1)[0]
        sizes = [0] * keys.shards
        for piece in _pieces(_lines(files, keys.max_lines, counts), keys.blank_lines_separate_documents):
            text = "\n".join(piece) + "\n" + separator
            size = len(text.encode())
            counts.pieces += 1
            counts.lines += len(piece)
            counts.bytes += size
            if _fraction(text) < keys.held_out:
                counts.held_out_lines += len(piece)
                held_out_writer.write(text)
            else:
                smallest = sizes.index(min(sizes))
                sizes[smallest] += size
                writers[smallest].write(text)
    if not any(sizes):
        raise UsageError("corpus.source has no text to train on; give a file with at least one line of text")
    return counts


def _fraction(text: str) -> float:
    """Map a text to a number in [0, 1), uniformly and for good."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _lines(files: Iterable[Path], max_lines: int | None, counts: Counts) -> Iterator[str]:
    """Yield stripped lines, blank ones too, and a blank one after each file. `max_lines` counts the files' lines."""
    number = 0
    for path in files:
        try:
            with fsspec.open(str(path), "rb", compression="infer") as file:
                for raw in file:
                    if number == max_lines:
                        return
                    number += 1
                    try:
                        line = raw.decode("utf-8")
                    except UnicodeDecodeError:
                        line = raw.decode("utf-8", "replace")
                        counts.invalid_utf8 += 1
                    # Upstream's reader ends a line at \n alone; what else Python would call a line end is a space.
                    yield re.sub(r"\s+", " ", line.removeprefix("\ufeff")).strip()
        except (OSError, EOFError) as error:
            raise UsageError(f"{path}: cannot be read as text: {error}; replace the file") from None
        yield ""


def _pieces(lines: Iterable[str], blank_lines_separate_documents: bool) -> Iterator[list[str]]:
    piece: list[str] = []
    for line in lines:
        if line:
            piece.append(line)
        if piece and (len(piece) == MAX_PIECE_LINES or (not line and blank_lines_separate_documents)):
            yield piece
            piece = []
    if piece:
        yield piece
