"""The corpus: complete documents, equal shards, clean lines, and a held-out part."""

from __future__ import annotations

import bz2
import gzip
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from electra_wrap import files
from electra_wrap.data import corpus
from electra_wrap.errors import UsageError
from electra_wrap.profile import Corpus


def shard(tmp_path: Path, names: list[Any], **keys: Any) -> tuple[dict[str, int], list[str], str]:
    """Return the counts, the text of each shard, and the held-out text."""
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    settings = Corpus(source="x", **{"shards": 1, **keys})
    out.mkdir()
    counts = corpus.shard(map(str, names), out / "text", out / "heldout", settings)
    parts = [path.read_bytes().decode() for path in sorted((out / "text").iterdir())]
    return counts, parts, (out / "heldout" / "part-00000.txt").read_bytes().decode()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_document_is_written_once(tmp_path: Path) -> None:
    documents = [f"a{i}\nb{i} ñ\n" for i in range(50)]
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", "\n".join(documents))], shards=3)
    assert sorted("".join(parts).split("\n\n")[:-1]) == sorted(d.strip() for d in documents)
    assert (counts["lines"], counts["documents"], counts["words"]) == (100, 50, 150)
    assert counts["bytes"] == sum(len(p.encode()) for p in parts)


@pytest.mark.parametrize("blank", [True, False])
def test_one_large_document_is_divided_evenly(tmp_path: Path, blank: bool) -> None:
    text = "".join(f"una frase cualquiera número {i}\n" for i in range(30_000))
    path = write(tmp_path / "t", text)
    _, parts, _ = shard(tmp_path, [path], shards=3, blank_lines_separate_documents=blank)
    sizes = [len(p) for p in parts]
    assert max(sizes) < 1.05 * min(sizes)
    assert ("\n\n" in parts[0]) == blank


def test_held_out_text_stays_held_out_in_a_larger_corpus(tmp_path: Path) -> None:
    documents = [f"documento {i}\nsegunda línea {i}\n\n" for i in range(400)]
    small = write(tmp_path / "small", "".join(documents[:200]))
    large = write(tmp_path / "large", "".join(documents[::-1]))
    counts, parts, held_out = shard(tmp_path, [small], held_out=0.2, shards=3)
    _, more_parts, more_held_out = shard(tmp_path, [large], held_out=0.2, shards=5)
    assert 20 < counts["held_out_lines"] / 2 < 60
    assert not set(held_out.split("\n\n")[:-1]) & set("".join(parts).split("\n\n"))
    assert set(held_out.split("\n\n")) <= set(more_held_out.split("\n\n"))
    assert sorted("".join(more_parts) + more_held_out) == sorted("".join(documents))


@pytest.mark.parametrize(
    ("lines", "held_out"), [(2, 0.005), (2, 0.9), (999, 0.005), (1001, 0.2), (59_660, 0.005)]
)
def test_small_corpus_without_blank_lines_has_held_out_text(
    tmp_path: Path, lines: int, held_out: float
) -> None:
    path = write(tmp_path / "t", "".join(f"frase {i}\n" for i in range(lines)))
    keys: dict[str, Any] = {"held_out": held_out, "blank_lines_separate_documents": False}
    counts, parts, text = shard(tmp_path, [path], **keys)
    assert counts["held_out_lines"] == text.count("\n") == lines - "".join(parts).count("\n")
    assert 0 < counts["held_out_lines"] < max(2, lines * min(1, 4 * held_out))


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_small_corpus_of_documents_has_held_out_and_training_text(
    tmp_path: Path, held_out: float
) -> None:
    documents = [f"documento {i}\nsegunda línea {i}\n\n" for i in range(6)]
    path = write(tmp_path / "t", "".join(documents))
    counts, parts, text = shard(tmp_path, [path], held_out=held_out)
    assert counts["held_out_lines"] == (2 if held_out < 0.5 else 10)
    rising = next(s for i in range(1, 100) if (s := shard(tmp_path, [path], held_out=i / 100)[2]))
    assert rising in text, "a rising share holds out the same document first"
    assert sorted("".join(parts) + text) == sorted("".join(documents))


@pytest.mark.parametrize("text", ["una\ndos\n", "una\n\nuna\n\n"])
def test_corpus_that_cannot_be_divided_is_trained_on(tmp_path: Path, text: str) -> None:
    for held_out in (0.001, 0.999):
        counts, parts, held = shard(tmp_path, [write(tmp_path / "t", text)], held_out=held_out)
        assert "".join(parts) and not held and counts["held_out_lines"] == 0


def test_lines_are_those_of_upstreams_reader(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\n  dos \x0b tres\u2028cuatro\x85cinco\t\r\n\r\n\n\nseis".encode() + b"\xff\n"
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", raw)])
    assert parts == ["uno\ndos tres cuatro cinco\n\nseis\ufffd\n\n"]
    assert counts["invalid_utf8"] == 1


LONG = b"palabra " * 12_499


@pytest.mark.parametrize(
    ("kind", "line", "repaired"),
    [
        ("invalid_utf8", b"ma\xf1ana ser\xe1", "ma�ana ser�".encode()),
        ("control_characters", b"uno\x00dos \x1b[1mtres", b"unodos [1mtres"),
        ("enormous_lines", LONG + b"palabra fin", LONG + b"palabra\nfin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_lines_are_counted_and_repaired_skipped_or_refused(
    tmp_path: Path, kind: str, line: bytes, repaired: bytes
) -> None:
    path = write(tmp_path / "t", b"antes\n" + line + b"\ndespu\xc3\xa9s\n")
    counts, (text,), _ = shard(tmp_path, [path])
    assert text == f"antes\n{repaired.decode()}\ndespués\n\n"
    assert counts[kind] == 1 and counts["skipped_lines"] == 0
    counts, (text,), _ = shard(tmp_path, [path], bad_lines="skip")
    assert text == "antes\ndespués\n\n" and counts[kind] == counts["skipped_lines"] == 1
    with pytest.raises(UsageError, match=rf"/t: line 2 .* one of the {corpus.COUNTS[kind]}"):
        shard(tmp_path, [path], bad_lines="stop")


@pytest.mark.parametrize(
    "line", ["ñ" * 50_000, "ñ" * 50_001, "x" + "一" * 70_000, "palabra " * 12_500, "x" * 100_000]
)
def test_enormous_lines_are_cut_between_characters_within_one_document(
    tmp_path: Path, line: str
) -> None:
    path = write(tmp_path / "t", f"antes\n{line}\ndespués\n")
    counts, (text,), _ = shard(tmp_path, [path])
    first, *pieces, last = text.removesuffix("\n\n").split("\n")
    assert (first, last) == ("antes", "después") and "" not in pieces
    assert "".join(pieces) == line.strip() or " ".join(pieces) == line.strip()
    assert counts["invalid_utf8"] == 0 and counts["documents"] == 1


def test_enormous_line_at_the_end_of_a_file_ends_there(tmp_path: Path) -> None:
    names = [write(tmp_path / "a", "uno\n" + "x" * 100_000), write(tmp_path / "b", "dos\ntres\n")]
    for policy, middle in (("repair", "x" * 100_000 + "\n"), ("skip", "")):
        counts, (text,), _ = shard(tmp_path, names, bad_lines=policy)
        assert text == f"uno\n{middle}\ndos\ntres\n\n" and counts["documents"] == 2
    _, (text,), _ = shard(tmp_path, names, max_lines=3)
    assert text.endswith("\n\ndos\n\n")


def test_harmless_irregularities_are_always_repaired_and_counted(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\ndos\r\n\r\n\r\n\n\ufefftres\n".encode()
    kinds = ("byte_order_marks", "crlf_lines", "empty_documents", "documents")
    for policy in ("repair", "skip", "stop"):
        path = write(tmp_path / "t", raw)
        counts, parts, _ = shard(tmp_path, [path], bad_lines=policy)
        assert parts == ["uno\ndos\n\ntres\n\n"]
        assert [counts[kind] for kind in kinds] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hola".encode("utf-16"), "is UTF-16; convert it"),
        (gzip.compress(b"hola"), "is compressed by gzip; name it .gz"),
        (bz2.compress(b"hola"), "is compressed by bzip2; name it .bz2"),
    ],
)
def test_files_in_other_formats_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shard(tmp_path, [write(tmp_path / "t", content)])


def test_long_document_is_not_divided_between_training_and_held_out_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "\n".join(f"{i}\n" * 2500 for i in range(20)))
    _, parts, held_out = shard(tmp_path, [path], held_out=0.3)
    assert held_out and not set(held_out.split()) & set("".join(parts).split())


def test_earlier_files_do_not_change_what_is_held_out_of_later_ones(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"held_out": 0.3, "blank_lines_separate_documents": False}
    old = write(tmp_path / "b", "".join(f"frase {i}\n" for i in range(20_000)))
    _, _, held_out = shard(tmp_path, [old], **keys)
    _, _, more = shard(tmp_path, [write(tmp_path / "a", "nueva\n" * 1234), old], **keys)
    assert held_out and set(held_out.splitlines()) <= set(more.splitlines())


@pytest.mark.parametrize(
    ("kind", "expected", "number"),
    [
        ("off", ["uno\ndos\n", "uno\ndos\n", "uno\ntres\n"], None),
        ("documents", ["uno\ndos\n", "uno\ntres\n"], 1),
        ("lines", ["uno\ndos\n", "tres\n"], 3),
    ],
)
def test_duplicates_are_left_out_and_counted_on_request(
    tmp_path: Path, kind: str, expected: list[str], number: int | None
) -> None:
    path = write(tmp_path / "t", "uno\ndos\n\nuno\ndos\n\nuno\ntres\n")
    counts, (text,), _ = shard(tmp_path, [path], deduplicate=kind)
    assert text == "".join(f"{document}\n" for document in expected)
    duplicates = {name: n for name, n in counts.items() if name.startswith("duplicate")}
    assert duplicates == ({} if number is None else {f"duplicate_{kind}": number})


def test_killed_sharding_leaves_no_shards_and_is_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "".join(f"frase {i}\n\n" for i in range(3000)))
    settings = Corpus(source="x", shards=3, held_out=0.2)
    text, held_out = tmp_path / "corpus", tmp_path / "heldout"

    def run(kill_at: int) -> None:
        def on_progress(done: int, total: int, lines: int) -> None:
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        with files.atomic(held_out) as b, files.atomic(text) as a:
            corpus.shard([str(path)], a, b, settings, on_progress)

    if (child := os.fork()) == 0:
        run(kill_at=2000)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not text.exists() and not held_out.exists()
    run(kill_at=-1)
    _, parts, expected = shard(tmp_path, [path], held_out=0.2, shards=3)
    assert [part.read_text() for part in sorted(text.iterdir())] == parts
    assert (held_out / "part-00000.txt").read_text() == expected


def test_file_names_need_not_be_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/Espa\xf1a.txt")
    Path(name).write_text("uno\n", encoding="utf-8")
    assert shard(tmp_path, [name])[0]["lines"] == 1


def test_max_lines_counts_lines_of_all_files(tmp_path: Path) -> None:
    names = [write(tmp_path / "a", "1\n2"), write(tmp_path / "b", "3\n4\n5\n")]
    counts, parts, _ = shard(tmp_path, names, max_lines=4)
    assert parts == ["1\n2\n\n3\n4\n\n"]
    assert counts["lines"] == 4


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to train on"):
        shard(tmp_path, [write(tmp_path / "t", "\n \n\n")])


def test_directory_stands_for_its_text_files(tmp_path: Path) -> None:
    """Except for the vocabulary, and what is in the run directory."""
    data, run = tmp_path / "data", tmp_path / "data" / "runs"
    for name in ("a.txt", "sub/b.txt", "vocab.txt", "tokenizer.json", "runs/corpus/part-00000.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    found = corpus.find_sources([str(data), str(data / "*.txt")], run)
    assert found == [str(data / name) for name in ("a.txt", "sub/b.txt", "vocab.txt")]
    assert corpus.find_sources([str(data)], run) == [str(data / n) for n in ("a.txt", "sub/b.txt")]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.txt", "no such file"), ("nowhere*.txt", "has no text"), ("empty", "has no text")],
)
def test_source_without_text_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        corpus.find_sources([str(tmp_path / name)], tmp_path / "run")
