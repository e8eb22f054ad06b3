"""The corpus: complete documents, equal shards, clean lines, and a held-out part."""

import bz2
import gzip
import os
import signal
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny

from electra_wrap import files
from electra_wrap.data import corpus
from electra_wrap.errors import UsageError
from electra_wrap.pipeline import execute
from electra_wrap.profile import Corpus
from electra_wrap.run import Run


def shard(tmp_path: Path, names: list[Any], **keys: Any) -> tuple[dict[str, int], list[str], str]:
    """Return the counts, the text of each shard, and the held-out text."""
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    settings = Corpus(source="x", **{"shards": 1, **keys})
    for name in ("text", "heldout"):
        (out / name).mkdir(parents=True)
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
    keys: dict[str, Any] = {"shards": 3, "blank_lines_separate_documents": blank}
    _, parts, _ = shard(tmp_path, [write(tmp_path / "t", text)], **keys)
    assert max(map(len, parts)) < 1.05 * min(map(len, parts))
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


def test_text_that_cannot_be_divided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no text to train on"):
        shard(tmp_path, [write(tmp_path / "t", "\n \n\n")])
    path = write(tmp_path / "t", "una\ndos\n")
    with pytest.raises(UsageError, match=r"all text is held out; lower corpus\.held_out"):
        shard(tmp_path, [path], held_out=0.999)
    execute(Run(tiny(path, "corpus.held_out=0.001"), tmp_path / "run"), until="corpus")
    assert "no text is held out, so the model is not evaluated" in capsys.readouterr().err


def test_lines_are_those_of_upstreams_reader(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\n  dos \x0b tres\u2028cuatro\x85cinco\t\r\n\r\n\n\nseis".encode() + b"\xff\n"
    counts, parts, _ = shard(tmp_path, [write(tmp_path / "t", raw)])
    assert parts == ["uno\ndos tres cuatro cinco\n\nseis\ufffd\n\n"] and counts["invalid_utf8"] == 1


@pytest.mark.parametrize(
    ("kind", "line", "repaired"),
    [
        ("invalid_utf8", b"ma\xf1ana ser\xe1", "ma�ana ser�"),
        ("control_characters", b"uno\x00dos \x1b[1mtres", "unodos [1mtres"),
    ],
)
def test_each_policy_for_bad_lines(tmp_path: Path, kind: str, line: bytes, repaired: str) -> None:
    path = write(tmp_path / "t", b"antes\n" + line + b"\ndespu\xc3\xa9s\n")
    counts, (text,), _ = shard(tmp_path, [path])
    assert text == f"antes\n{repaired}\ndespués\n\n"
    assert counts[kind] == 1 and counts["skipped_lines"] == 0
    counts, (text,), _ = shard(tmp_path, [path], bad_lines="skip")
    assert text == "antes\ndespués\n\n" and counts[kind] == counts["skipped_lines"] == 1
    with pytest.raises(UsageError, match=rf"/t: line 2 .* one of the {corpus.COUNTS[kind]}"):
        shard(tmp_path, [path], bad_lines="stop")


def test_harmless_irregularities_are_always_repaired_and_counted(tmp_path: Path) -> None:
    raw = "\ufeffuno\r\ndos\r\n\r\n\r\n\n\ufefftres\n".encode()
    kinds = ("byte_order_marks", "crlf_lines", "empty_documents", "documents")
    for policy in ("repair", "skip", "stop"):
        path = write(tmp_path / "t", raw)
        counts, parts, _ = shard(tmp_path, [path], bad_lines=policy)
        assert parts == ["uno\ndos\n\ntres\n\n"]
        assert [counts[kind] for kind in kinds] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16; convert it"),
        (lambda text: gzip.compress(text.encode()), "compressed by gzip; name it .gz"),
        (lambda text: bz2.compress(text.encode()), "compressed by bzip2; name it .bz2"),
    ],
)
def test_files_in_other_formats_are_refused(tmp_path: Path, encode: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"/t is {message}"):
        shard(tmp_path, [write(tmp_path / "t", encode("hola"))])


@pytest.mark.parametrize("strip_accents", [False, True])
def test_decomposed_accents_are_counted_and_kept(
    tmp_path: Path, strip_accents: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a warning where they are other tokens than composed ones."""
    lines = ["el pájaro", unicodedata.normalize("NFD", "el pájaro"), "el gato"]
    path = write(tmp_path / "t", "\n".join(lines))
    uncased = ("tokenizer.lowercase=true", "tokenizer.strip_accents=true")
    profile = tiny(path, "corpus.held_out=0", *(uncased if strip_accents else ()))
    run = Run(profile, tmp_path / "run")
    execute(run, until="corpus")
    assert run.results("corpus")["decomposed_lines"] == 1
    assert list(corpus.lines(run.corpus)) == [f"{line}\n".encode() for line in lines]
    assert ("warning: decomposed accents become [UNK]" in capsys.readouterr().err) != strip_accents


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
    ("kind", "expected", "duplicates"),
    [
        ("off", "uno\ndos\n\nuno\ndos\n\nuno\ntres\n\n", {}),
        ("documents", "uno\ndos\n\nuno\ntres\n\n", {"duplicate_documents": 1}),
        ("lines", "uno\ndos\n\ntres\n\n", {"duplicate_lines": 3}),
    ],
)
def test_duplicates_are_left_out_and_counted_on_request(
    tmp_path: Path, kind: str, expected: str, duplicates: dict[str, int]
) -> None:
    path = write(tmp_path / "t", "uno\ndos\n\nuno\ndos\n\nuno\ntres\n")
    counts, (text,), _ = shard(tmp_path, [path], deduplicate=kind)
    assert text == expected
    assert {name: n for name, n in counts.items() if name.startswith("duplicate")} == duplicates


def test_killed_sharding_leaves_no_shards_and_is_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "t", "".join(f"frase {i}\n\n" for i in range(3000)))
    settings = Corpus(source="x", shards=3, held_out=0.2)
    text, held_out = tmp_path / "corpus", tmp_path / "heldout"

    def run(on_progress: corpus.OnProgress) -> None:
        with files.atomic(held_out, directory=True) as b, files.atomic(text, directory=True) as a:
            corpus.shard([str(path)], a, b, settings, on_progress)

    if (child := os.fork()) == 0:
        run(lambda done, note, _: note == "2,000 lines" and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not text.exists() and not held_out.exists()
    run(lambda *progress: None)
    _, parts, expected = shard(tmp_path, [path], held_out=0.2, shards=3)
    assert [part.read_text() for part in sorted(text.iterdir())] == parts
    assert (held_out / "part-00000.txt").read_text() == expected


def test_file_names_need_not_be_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/Espa\xf1a.txt")
    Path(name).write_text("uno\n", encoding="utf-8")
    assert shard(tmp_path, [name])[0]["lines"] == 1


def test_max_lines_counts_lines_of_all_files(tmp_path: Path) -> None:
    names = [write(tmp_path / "a", "1\n2"), write(tmp_path / "b", "3\n4\n5\n")]
    assert shard(tmp_path, names, max_lines=4)[1] == ["1\n2\n\n3\n4\n\n"]


def test_directory_stands_for_its_text_files(tmp_path: Path) -> None:
    """Except for the vocabulary, and what is in the run directory."""
    data, run = tmp_path / "data", tmp_path / "data" / "runs"
    for name in ("a.txt", "sub/b.txt", "vocab.txt", "tokenizer.json", "runs/corpus/part-00000.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    found = corpus.find_sources([str(data), str(data / "*.txt")], run)
    assert found == [str(data / name) for name in ("a.txt", "sub/b.txt", "vocab.txt")]
    assert corpus.find_sources([str(data)], run) == [str(data / n) for n in ("a.txt", "sub/b.txt")]


def test_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("t", "no such file"), ("t*", "has no text"), ("empty", "has no text")):
        with pytest.raises(UsageError, match=message):
            corpus.find_sources([str(tmp_path / name)], tmp_path / "run")
