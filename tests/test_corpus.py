"""The corpus: whole documents, equal shards, nothing that is not text."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest

from electra_wrap import corpus
from electra_wrap.errors import UsageError
from electra_wrap.profile import Corpus


def shard(tmp_path: Path, files: list[Any], **keys: Any) -> tuple[dict[str, int], list[str], str]:
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    names = [str(file) for file in files]
    counts = corpus.shard(names, out, Corpus(source="x", **{"shards": 3, **keys}))
    parts = [p.read_bytes().decode() for p in sorted((out / "corpus").iterdir())]
    return counts, parts, "".join(p.read_bytes().decode() for p in (out / "heldout").iterdir())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_document_arrives_whole_and_once(tmp_path: Path) -> None:
    documents = [f"a{i}\nb{i} ñ\n" for i in range(50)]
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", "\n".join(documents))])
    assert sorted("".join(parts).split("\n\n")[:-1]) == sorted(d.strip() for d in documents)
    assert (counts["lines"], counts["documents"], counts["words"]) == (100, 50, 150)
    assert counts["bytes"] == sum(len(p.encode()) for p in parts)


@pytest.mark.parametrize("blank", [True, False])
def test_one_big_file_gives_equal_work_to_every_process(tmp_path: Path, blank: bool) -> None:
    """Upstream divides by file: one file, or one endless document, left all processes but one idle."""
    text = "".join(f"una frase cualquiera número {i}\n" for i in range(30_000))
    _, parts, _ = shard(tmp_path, [write(tmp_path / "t", text)], blank_lines_separate_documents=blank)
    sizes = [len(p) for p in parts]
    assert max(sizes) < 1.05 * min(sizes)
    assert ("\n\n" in parts[0]) == blank


def test_held_out_text_is_apart_and_stays_the_same_when_the_corpus_grows(tmp_path: Path) -> None:
    documents = [f"documento {i}\nsegunda línea {i}\n\n" for i in range(400)]
    small = write(tmp_path / "small", "".join(documents[:200]))
    large = write(tmp_path / "large", "".join(documents[::-1]))
    counts, parts, held_out = shard(tmp_path, [small], held_out=0.2)
    _, more_parts, more_held_out = shard(tmp_path, [large], held_out=0.2, shards=5)
    assert 20 < counts["held_out_lines"] / 2 < 60
    assert not set(held_out.split("\n\n")[:-1]) & set("".join(parts).split("\n\n"))
    assert set(held_out.split("\n\n")) <= set(more_held_out.split("\n\n"))
    assert sorted("".join(more_parts) + more_held_out) == sorted("".join(documents))


def test_a_line_is_what_upstreams_reader_calls_a_line(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\n  dos \x0b tres\u2028cuatro\x85cinco\t\r\n\r\n\n\nseis".encode() + b"\xff\n"
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", raw)], shards=1)
    assert parts == ["uno\ndos tres cuatro cinco\n\nseis\ufffd\n\n"]
    assert counts["invalid_utf8"] == 1


BAD = {
    "invalid_utf8": b"ma\xf1ana ser\xe1 otro d\xeda\n",
    "control_characters": b"uno\x00dos \x1b[1mtres\n",
    "enormous_lines": b"palabra " * 15_000 + b"fin\n",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_counted_and_repaired_skipped_or_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "t", b"antes\n" + BAD[kind] + b"despu\xc3\xa9s\n")
    repaired = {
        "invalid_utf8": "ma�ana ser� otro d�a\n",
        "control_characters": "unodos [1mtres\n",
        "enormous_lines": "palabra " * 12_499 + "palabra\n" + "palabra " * 2500 + "fin\n",
    }[kind]
    counts, (text,), _ = shard(tmp_path, [path], shards=1)
    assert text == f"antes\n{repaired}después\n\n" and counts[kind] == 1 and counts["skipped_lines"] == 0
    counts, (text,), _ = shard(tmp_path, [path], shards=1, bad_lines="skip")
    assert text == "antes\ndespués\n\n" and counts[kind] == counts["skipped_lines"] == 1
    with pytest.raises(UsageError, match=rf"/t: line 2 of the corpus is one of the {corpus.FINDINGS[kind]}"):
        shard(tmp_path, [path], shards=1, bad_lines="stop")


@pytest.mark.parametrize("line", ["ñ" * 50_000, "ñ" * 50_001, "x" + "一" * 70_000, "palabra " * 12_500, "x" * 100_000])
def test_an_enormous_line_is_cut_between_characters_and_ends_no_document(tmp_path: Path, line: str) -> None:
    counts, (text,), _ = shard(tmp_path, [write(tmp_path / "t", f"antes\n{line}\ndespués\n")], shards=1)
    first, *pieces, last = text.removesuffix("\n\n").split("\n")
    assert (first, last) == ("antes", "después") and "" not in pieces
    assert "".join(pieces) == line.strip() or " ".join(pieces) == line.strip()
    assert counts["invalid_utf8"] == 0 and counts["documents"] == 1


def test_what_is_no_damage_is_mended_and_counted(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\ndos\r\n\r\n\r\n\n\ufefftres\n".encode()
    for policy in ("repair", "skip", "stop"):
        counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", raw)], shards=1, bad_lines=policy)
        assert parts == ["uno\ndos\n\ntres\n\n"]
        assert [counts[k] for k in ("byte_order_marks", "crlf_lines", "empty_documents", "documents")] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("hola".encode("utf-16"), "is UTF-16; convert it"),
        (gzip.compress(b"hola"), "is compressed by gzip; name it .gz"),
        (bz2.compress(b"hola"), "is compressed by bzip2; name it .bz2"),
    ],
)
def test_what_is_no_text_is_told(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        shard(tmp_path, [write(tmp_path / "t", content)])


def test_a_long_document_is_held_out_whole_or_not_at_all(tmp_path: Path) -> None:
    documents = [f"{i}\n" * 2500 for i in range(20)]
    _, parts, held_out = shard(tmp_path, [write(tmp_path / "t", "\n".join(documents))], held_out=0.3)
    assert held_out and not set(held_out.split()) & set("".join(parts).split())


def test_text_in_front_does_not_change_what_is_held_out(tmp_path: Path) -> None:
    """Without blank lines, a thousand lines of a file are a document: of that file, not of what came before."""
    keys: dict[str, Any] = {"held_out": 0.3, "blank_lines_separate_documents": False}
    old = write(tmp_path / "b", "".join(f"frase {i}\n" for i in range(20_000)))
    _, _, held_out = shard(tmp_path, [old], **keys)
    _, _, more = shard(tmp_path, [write(tmp_path / "a", "nueva\n" * 1234), old], **keys)
    assert held_out and set(held_out.splitlines()) <= set(more.splitlines())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ["uno\ndos\n", "uno\ndos\n", "uno\ntres\n"]),
        ({"deduplicate": "documents"}, ["uno\ndos\n", "uno\ntres\n"]),
        ({"deduplicate": "lines"}, ["uno\ndos\n", "tres\n"]),
    ],
)
def test_duplicates_are_left_out_where_that_is_asked_for(tmp_path: Path, keys: Any, expected: list[str]) -> None:
    path = write(tmp_path / "t", "uno\ndos\n\nuno\ndos\n\nuno\ntres\n")
    counts, (text,), _ = shard(tmp_path, [path], shards=1, **keys)
    assert text == "".join(f"{document}\n" for document in expected)
    left_out = counts["duplicate_documents"], counts["duplicate_lines"]
    assert left_out == {None: (0, 0), "documents": (1, 0), "lines": (0, 3)}[keys.get("deduplicate")]


def test_what_is_nearly_the_same_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    long = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo"
    path = write(tmp_path / "t", f"{long}.\n\n{long}!\n\nDe los de lanza en astillero, adarga antigua y rocín flaco.\n")
    counts, (text,), _ = shard(tmp_path, [path], shards=1, deduplicate="documents", similarity=0.8)
    assert counts["duplicate_documents"] == 1 and "hidalgo." in text and "hidalgo!" not in text and "rocín" in text


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
@pytest.mark.parametrize(("blank", "deduplicate"), [(True, "off"), (False, "off"), (True, "lines")])
def test_sharding_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, blank: bool, deduplicate: str
) -> None:
    monkeypatch.setattr(corpus, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(corpus, "MAX_PIECE_LINES", 7)
    text = "".join(f"documento {i}\n" * (i % 17) + "\n" for i in range(1, 200)).encode() + b"palabra " * 30_000
    files = []
    for i in range(2):
        content = text[i * 999 :]
        files.append(str(write(tmp_path / f"{i}{suffix}", gzip.compress(content) if suffix == ".gz" else content)))
    keys = Corpus(
        source="x",
        shards=3,
        held_out=0.2,
        max_lines=3000,
        blank_lines_separate_documents=blank,
        deduplicate=deduplicate,
    )
    expected = corpus.shard(files, tmp_path / "undisturbed", keys, ["identity"])
    killed = 0

    def dangerous(function: Any) -> Any:
        def call(*arguments: Any) -> None:
            if random.random() < (0.002 if deduplicate == "off" else 0.0005):
                os.kill(os.getpid(), signal.SIGKILL)
            function(*arguments)

        return call

    status = 1
    while status:
        random = Random(killed)
        if (child := os.fork()) == 0:
            # Between lines, and between what is written to the shards and what is written of them.
            monkeypatch.setattr(corpus._Sharder, "_add", dangerous(corpus._Sharder._add))
            monkeypatch.setattr(corpus, "write_json", dangerous(corpus.write_json))
            corpus.shard(files, tmp_path / "killed", keys, ["identity"])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        killed += status == signal.SIGKILL
    assert (
        killed > (5 if deduplicate == "off" else 0)
        and corpus.shard(files, tmp_path / "killed", keys, ["identity"]) == expected
    )
    for path in (tmp_path / "undisturbed").rglob("*.txt"):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "undisturbed")).read_bytes() == path.read_bytes()
    other = corpus.shard(files[:1], tmp_path / "killed", keys, ["another"])
    assert other["lines"] < expected["lines"], "what is there is of another corpus"


def test_an_enormous_line_at_the_end_of_a_file_takes_nothing_of_the_next(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", "uno\n" + "x" * 100_000), write(tmp_path / "b", "dos\ntres\n")]
    for policy, middle in (("repair", "x" * 100_000 + "\n"), ("skip", "")):
        counts, (text,), _ = shard(tmp_path, files, shards=1, bad_lines=policy)
        assert text == f"uno\n{middle}\ndos\ntres\n\n" and counts["documents"] == 2
    counts, (text,), _ = shard(tmp_path, files, shards=1, max_lines=3)
    assert text.endswith("\n\ndos\n\n")


@pytest.mark.parametrize("lost", ["corpus/part-00001.txt", "file", "names", "bit", "state"])
def test_what_is_not_as_it_was_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """After a kill, a shard or a source is not what it was; or a glob would match something more, which comes late."""
    monkeypatch.setattr(corpus, "SAVE_EVERY", 0.0)
    memory = fsspec.filesystem("memory")
    for name in ("b", "c"):
        memory.pipe(f"/lost-{lost}/{name}.txt", "".join(f"{name} {i}\n\n" for i in range(300)).encode())
    keys, names = Corpus(source="x", shards=3), [f"memory://lost-{lost}/*.txt"]
    if (child := os.fork()) == 0:
        real = corpus._Sharder._add

        def add(self: Any, raw: bytes, name: str) -> None:
            if raw == b"b 200\n":
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, raw, name)

        monkeypatch.setattr(corpus._Sharder, "_add", add)
        corpus.shard(names, tmp_path / "work", keys, 1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert json.loads((tmp_path / "work" / "state.json").read_text())["offset"] > 1000
    if lost == "names":
        expected = corpus.shard(names, tmp_path / "again", keys)
        memory.pipe(f"/lost-{lost}/a.txt", b"a\n")
    else:
        if lost == "file":
            memory.pipe(f"/lost-{lost}/b.txt", memory.cat(f"/lost-{lost}/b.txt").upper() + b"x\n")
        elif lost == "bit":
            shard_file = tmp_path / "work" / "corpus" / "part-00000.txt"
            shard_file.write_bytes(shard_file.read_bytes().replace(b"9", b"8", 1))
        elif lost == "state":
            state = json.loads((tmp_path / "work" / "state.json").read_text())
            state["sizes"] = state["sizes"][:-1]
            (tmp_path / "work" / "state.json").write_text(json.dumps(state))
        else:
            (tmp_path / "work" / lost).unlink()
        expected = corpus.shard(names, tmp_path / "again", keys)
    assert corpus.shard(names, tmp_path / "work", keys, 1) == expected
    for path in (tmp_path / "again").rglob("*.txt"):
        assert path.read_bytes() == (tmp_path / "work" / path.relative_to(tmp_path / "again")).read_bytes()


def test_a_file_name_need_not_be_unicode(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/Espa\xf1a.txt"
    Path(os.fsdecode(name)).write_text("uno\n", encoding="utf-8")
    assert corpus.shard([os.fsdecode(name)], tmp_path / "work", Corpus(source="x", shards=1))["lines"] == 1
    assert json.loads((tmp_path / "work" / "state.json").read_text())["names"] == [os.fsdecode(name)]


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"identity": 1, "names": 3}', '{"identity": 1, "names": [], "x": 1}']
)
def test_a_damaged_state_is_as_good_as_none(tmp_path: Path, state: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "state.json").write_text(state, encoding="utf-8")
    counts = corpus.shard([str(write(tmp_path / "a", "uno\n"))], tmp_path / "work", Corpus(source="x", shards=1), 1)
    assert counts["lines"] == 1


def test_max_lines_and_file_ends(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", "1\n2"), write(tmp_path / "b", "3\n4\n5\n")]
    counts, parts, _ = shard(tmp_path, files, max_lines=4, shards=1)
    assert parts == ["1\n2\n\n3\n4\n\n"]
    assert counts["lines"] == 4


def test_compressed_text_is_read_and_a_cut_archive_refused(tmp_path: Path) -> None:
    archive = gzip.compress(b"hola\nmundo\n" * 5000)
    counts, _, _ = shard(tmp_path, [write(tmp_path / "t.gz", archive)])
    assert counts["lines"] == 10_000
    with pytest.raises(UsageError, match=r"t\.gz: cannot be read as text"):
        shard(tmp_path, [write(tmp_path / "t.gz", archive[:-20])])


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text to train on"):
        shard(tmp_path, [write(tmp_path / "t", "\n \n\n")])


def test_only_text_is_taken_from_a_directory(tmp_path: Path) -> None:
    """The corpus directory may be the data directory: vocabulary and records are not text to train on."""
    run = tmp_path / "data" / "runs"
    for name in ("a.txt", "sub/b.txt", "vocab.txt", "tokenizer.json", "runs/corpus/part-00000.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", encoding="utf-8")
    found = corpus.find([str(tmp_path / "data"), str(tmp_path / "data" / "*.txt")], run)
    assert [str(Path(p).relative_to(tmp_path / "data")) for p in found] == ["a.txt", "sub/b.txt", "vocab.txt"]
    assert [Path(p).name for p in corpus.find([str(tmp_path / "data")], run)] == ["a.txt", "b.txt"]


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no text"):
        corpus.find(["nowhere*.txt"], tmp_path)
