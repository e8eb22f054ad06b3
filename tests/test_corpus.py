"""The corpus: whole documents, equal shards, nothing that is not text."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from electra_wrap import corpus
from electra_wrap.errors import UsageError
from electra_wrap.profile import Corpus


def shard(tmp_path: Path, files: list[Any], **keys: Any) -> tuple[corpus.Counts, list[str], str]:
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    names = [str(file) for file in files]
    counts = corpus.shard(names, out, Corpus(source="", **{"shards": 3, **keys}))
    parts = [p.read_bytes().decode() for p in sorted((out / "corpus").iterdir())]
    return counts, parts, "".join(p.read_bytes().decode() for p in (out / "heldout").iterdir())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_document_arrives_whole_and_once(tmp_path: Path) -> None:
    documents = [f"a{i}\nb{i} ñ\n" for i in range(50)]
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", "\n".join(documents))])
    assert sorted("".join(parts).split("\n\n")[:-1]) == sorted(d.strip() for d in documents)
    assert (counts.lines, counts.documents, counts.words) == (100, 50, 150)
    assert counts.bytes == sum(len(p.encode()) for p in parts)


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
    assert 20 < counts.held_out_lines / 2 < 60
    assert not set(held_out.split("\n\n")[:-1]) & set("".join(parts).split("\n\n"))
    assert set(held_out.split("\n\n")) <= set(more_held_out.split("\n\n"))
    assert sorted("".join(more_parts) + more_held_out) == sorted("".join(documents))


def test_a_line_is_what_upstreams_reader_calls_a_line(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\n  dos \x0b tres\u2028cuatro\x85cinco\t\r\n\r\n\n\nseis".encode() + b"\xff\n"
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", raw)], shards=1)
    assert parts == ["uno\ndos tres cuatro cinco\n\nseis\ufffd\n\n"]
    assert counts.invalid_utf8 == 1


def test_max_lines_and_file_ends(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", "1\n2"), write(tmp_path / "b", "3\n4\n5\n")]
    counts, parts, _ = shard(tmp_path, files, max_lines=4, shards=1)
    assert parts == ["1\n2\n\n3\n4\n\n"]
    assert counts.lines == 4


def test_compressed_text_is_read_and_a_cut_archive_refused(tmp_path: Path) -> None:
    archive = gzip.compress(b"hola\nmundo\n" * 5000)
    counts, _, _ = shard(tmp_path, [write(tmp_path / "t.gz", archive)])
    assert counts.lines == 10_000
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
