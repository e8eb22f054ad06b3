"""Vocabularies: validated and reproducible, with tokenizer files that match training."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SPANISH, child
from test_sources import Server, server  # noqa: F401

from electra_wrap.data import vocab
from electra_wrap.errors import UsageError

GOOD = [*vocab.SPECIAL_TOKENS, "a", "##a", "pájaro"]
CASED = {"lowercase": False, "strip_accents": False}


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes(("\n".join(lines) + end).encode())
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """An empty directory for shards."""
    path = tmp_path / "corpus"
    path.mkdir()
    return path


@pytest.mark.parametrize("end", ["\n", ""])
def test_each_line_is_a_token(tmp_path: Path, end: str) -> None:
    assert vocab.read(write(tmp_path / "v", GOOD, end)) == GOOD


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([*GOOD, "a"], "'a' is on lines 6 and 9"),
        ([*GOOD, ""], "line 9 is ''"),
        ([*GOOD, " b"], "line 9 is ' b'"),
        ([*GOOD, "b\r"], "line 9 is 'b"),
        ([t for t in GOOD if t != "[MASK]"], r"\[MASK\] is missing"),
        (GOOD[1:] + GOOD[:1], r"\[PAD\] is on line 8"),
    ],
)
def test_malformed_vocabularies_are_refused(
    tmp_path: Path, tokens: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        vocab.read(write(tmp_path / "v", tokens))


def test_binary_file_is_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a UTF-8 vocabulary"):
        vocab.read(tmp_path / "v")


def test_training_is_reproducible(tmp_path: Path, corpus: Path) -> None:
    write(corpus / "part-00000.txt", SPANISH * 3)
    results = []
    for _ in range(3):
        vocab.train(corpus, tmp_path / "v", vocab_size=150, sample_bytes=None, **CASED)
        results.append(vocab.read(tmp_path / "v"))
    tokens = results[0]
    assert results == [tokens] * 3
    assert tokens[:5] == list(vocab.SPECIAL_TOKENS) and len(tokens) == 150
    assert any("á" in token for token in tokens)


def test_sample_is_from_everywhere_in_all_shards(tmp_path: Path, corpus: Path) -> None:
    for number, words in enumerate((("alba", "barco"), ("cielo", "duna"))):
        lines = [f"{words[line > 10_000]} número {line}" for line in range(20_000)]
        write(corpus / f"part-{number:05d}.txt", lines)
    every, some = list(vocab.sample(corpus, None)), list(vocab.sample(corpus, 80_000))
    assert len(every) == 40_000 and set(some) < set(every) and len(set(some)) == len(some)
    assert 80_000 < sum(len(line.encode()) for line in some) < 90_000
    firsts = Counter(line.split()[0] for line in some)
    assert set(firsts) == {"alba", "barco", "cielo", "duna"}
    assert max(firsts.values()) < 1.2 * min(firsts.values())
    vocab.train(corpus, tmp_path / "v", vocab_size=100, sample_bytes=80_000, **CASED)
    assert {*firsts, "número"} <= set(vocab.read(tmp_path / "v"))


def test_word_cache_computes_each_word_once_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab, "MAX_WORDS", 3)
    computed: list[str] = []

    def compute(word: str) -> list[int]:
        computed.append(word)
        return [ord(c) for c in word]

    words = vocab.WordCache(compute)
    assert words.ids("a b a a") == [97, 98, 97, 97] and computed == ["a", "b"]
    text = "a b c d a e ab  b"
    assert words.ids(text) == [ord(c) for c in text if c != " "] and len(words) <= 3
    assert computed[2:] == ["c", "d", "a", "e", "ab", "", "b"]


def test_measure_counts_tokens_unknown_and_cut_ones(corpus: Path) -> None:
    write(corpus / "part-00000.txt", ["ab b", "", "x [MASK]", "ab ab ab ab ab ab ab ab"])
    tokens = [*vocab.SPECIAL_TOKENS, "a", "b", "##b", "[", "]"]
    fit = vocab.measure(corpus, tokens, max_seq_length=8, **CASED)
    # a ##b | b | [UNK] | [ [UNK] ] | 8 × a ##b, of which an example of 8 has six tokens
    assert fit == {"tokens_per_word": 23 / 12, "unknown_share": 2 / 23, "cut_share": 10 / 23}


def test_fetch_copies_a_file_with_the_right_sha256(tmp_path: Path) -> None:
    source = write(tmp_path / "v", GOOD)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    vocab.fetch(str(source), tmp_path / "copy", digest)
    assert vocab.read(tmp_path / "copy") == GOOD
    with pytest.raises(UsageError, match=f"has sha256 {digest}, the profile says {'0' * 64}"):
        vocab.fetch(str(source), tmp_path / "other", "0" * 64)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("lowercase", "strip_accents", "first"),
    [(False, False, "Los pájaros"), (True, False, "los pájaros"), (True, True, "los pajaros")],
)
def test_transformers_tokenizes_as_in_training(
    tmp_path: Path, lowercase: bool, strip_accents: bool, first: str
) -> None:
    words = {w for line in SPANISH for w in line.replace(".", " .").split()}
    words |= {w.lower() for w in words} | {"los", "pajaros", "estan", "hablando", "##a"}
    tokens = [*vocab.SPECIAL_TOKENS, *sorted(words - {"##a"}), "##a", "aa"]
    normalization = {"lowercase": lowercase, "strip_accents": strip_accents}
    vocab.write_tokenizer(tmp_path, tokens, max_length=64, **normalization)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    texts = (SPANISH[0], "a" * 150, "a" * 201)
    answer = json.loads(child("hf_tokens.py", tmp_path, *texts, HF_HUB_OFFLINE="1"))
    assert " ".join(answer["auto"][0][:2]) == first
    assert answer["fast"][0] == answer["auto"][0]
    assert answer["auto"][1][0] == "aa", "words have up to 200 characters, as upstream's"
    assert answer["auto"][2] == ["[UNK]"]
    assert answer["max_length"] == 64


def test_vocabulary_is_fetched_from_a_hub(cli: Any, server: Server, tmp_path: Path) -> None:  # noqa: F811
    url = server.url("ana/bert/resolve/main/vocab.txt", "\n".join(GOOD).encode())
    hub = {"HF_ENDPOINT": url.partition("/ana")[0], "HF_HOME": str(tmp_path / "hf")}
    write(tmp_path / "t.txt", ["hola"])
    arguments = ("run", "--until", "vocab", "--set", "corpus.source=t.txt", "--set")
    done = cli(*arguments, "tokenizer.source=hf://ana/bert", "--run-dir", "r", env=hub)
    assert done.returncode == 0, done.stderr
    assert vocab.read(tmp_path / "r" / "vocab.txt") == GOOD
    missing = cli(*arguments, "tokenizer.source=hf://ana/nada", "--run-dir", "q", env=hub)
    assert missing.returncode == 2 and "hf://ana/nada" in missing.stderr.splitlines()[-1]
    offline = {**hub, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    unreachable = cli(*arguments, "tokenizer.source=hf://ana/bert", "--run-dir", "q", env=offline)
    assert unreachable.returncode == 3
    assert "give the path of a local copy" in unreachable.stderr.splitlines()[-1]
    for failed in (missing, unreachable):
        assert all(line.startswith("electra_wrap: ") for line in failed.stderr.splitlines())


@pytest.mark.skipif("ELECTRA_WRAP_SHARED" not in os.environ, reason="needs ELECTRA_WRAP_SHARED")
def test_multilingual_vocabulary_has_119547_tokens() -> None:
    tokens = vocab.read(Path(os.environ["ELECTRA_WRAP_SHARED"]) / "mbert-cased-vocab.txt")
    assert len(tokens) == 119_547
