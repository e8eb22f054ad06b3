"""Vocabularies: validated and reproducible, with tokenizer files that match training."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import SPANISH, child

from electra_wrap.data import vocab
from electra_wrap.errors import UsageError

GOOD = [*vocab.SPECIAL_TOKENS, "a", "##a", "pájaro"]


def write(path: Path, tokens: list[str], end: str = "\n") -> Path:
    path.write_bytes(("\n".join(tokens) + end).encode())
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


def test_a_binary_file_is_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a UTF-8 vocabulary"):
        vocab.read(tmp_path / "v")


def test_training_is_reproducible(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "part-00000.txt").write_text("\n".join(SPANISH * 3), encoding="utf-8")
    results = set()
    for i in range(3):
        vocab.train(
            tmp_path / "corpus",
            tmp_path / f"v{i}",
            vocab_size=150,
            sample_bytes=None,
            lowercase=False,
            strip_accents=False,
        )
        results.add((tmp_path / f"v{i}").read_text(encoding="utf-8"))
    assert len(results) == 1
    tokens = vocab.read(tmp_path / "v0")
    assert tokens[:5] == list(vocab.SPECIAL_TOKENS) and len(tokens) == 150
    assert any("á" in token for token in tokens)


def test_a_sample_is_from_everywhere_in_all_shards(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, words in enumerate((("alba", "barco"), ("cielo", "duna"))):
        lines = [f"{words[line > 10_000]} número {line}" for line in range(20_000)]
        write(corpus / f"part-{number:05d}.txt", lines)
    every, some = list(vocab.sample(corpus, None)), list(vocab.sample(corpus, 80_000))
    assert len(every) == 40_000 and set(some) < set(every) and len(set(some)) == len(some)
    assert 80_000 < sum(len(line.encode()) for line in some) < 90_000
    firsts = Counter(line.split()[0] for line in some)
    assert set(firsts) == {"alba", "barco", "cielo", "duna"}
    assert max(firsts.values()) < 1.2 * min(firsts.values())
    vocab.train(
        corpus,
        tmp_path / "v",
        vocab_size=100,
        sample_bytes=80_000,
        lowercase=False,
        strip_accents=False,
    )
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


def test_measure_counts_tokens_unknown_and_cut_ones(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write(
        tmp_path / "corpus" / "part-00000.txt", ["ab b", "", "x [MASK]", "ab ab ab ab ab ab ab ab"]
    )
    tokens = [*vocab.SPECIAL_TOKENS, "a", "b", "##b", "[", "]"]
    fit = vocab.measure(
        tmp_path / "corpus", tokens, lowercase=False, strip_accents=False, max_seq_length=8
    )
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
    vocab.write_tokenizer(
        tmp_path, tokens, lowercase=lowercase, strip_accents=strip_accents, max_length=64
    )
    (tmp_path / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    texts = (SPANISH[0], "a" * 150, "a" * 201)
    answer = json.loads(child("hf_tokens.py", tmp_path, *texts, HF_HUB_OFFLINE="1"))
    assert " ".join(answer["auto"][0][:2]) == first
    assert answer["fast"][0] == answer["auto"][0]
    assert answer["auto"][1][0] == "aa", "words have up to 200 characters, as upstream's"
    assert answer["auto"][2] == ["[UNK]"]
    assert answer["max_length"] == 64


class Hub(BaseHTTPRequestHandler):
    """Imitates a hub with one file of one repository."""

    content = "\n".join(GOOD).encode() + b"\n"

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(self.content)

    def answer(self, body: bytes) -> None:
        found = self.path == "/someone/bert/resolve/main/vocab.txt"
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content) if found else 0))
        self.end_headers()
        if found:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()
    server.server_close()


def test_a_vocabulary_is_fetched_from_a_hub(cli: Any, hub: dict[str, str], tmp_path: Path) -> None:
    profile = tmp_path / "p.toml"
    profile.write_text(
        "description='d'\nlanguage='es'\nmodel_name='m'\ncorpus={source='t.txt'}\n"
        "train={steps=9,warmup_steps=1}\n[tokenizer]\nsource='hf://someone/bert'\n",
        encoding="utf-8",
    )
    (tmp_path / "t.txt").write_text("hola\n", encoding="utf-8")
    arguments = ["run", "--until", "vocab", "--run-dir", "r", "--profile", str(profile)]
    done = cli(*arguments, env=hub)
    assert done.returncode == 0, done.stderr
    assert vocab.read(tmp_path / "r" / "vocab.txt") == GOOD
    other = "tokenizer.source=hf://someone/else"
    missing = cli(*arguments, "--set", other, "--run-dir", "q", env=hub)
    assert missing.returncode == 2 and "hf://someone/else" in missing.stderr.splitlines()[-1]
    offline = {**hub, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    unreachable = cli(*arguments, "--run-dir", "q", env=offline)
    assert unreachable.returncode == 3
    assert "--set tokenizer.source=PATH/vocab.txt" in unreachable.stderr.splitlines()[-1]
    for failed in (missing, unreachable):
        assert all(line.startswith("electra_wrap: ") for line in failed.stderr.splitlines())


@pytest.mark.skipif("ELECTRA_WRAP_SHARED" not in os.environ, reason="needs ELECTRA_WRAP_SHARED")
def test_the_multilingual_vocabulary_has_119547_tokens() -> None:
    tokens = vocab.read(Path(os.environ["ELECTRA_WRAP_SHARED"]) / "mbert-cased-vocab.txt")
    assert len(tokens) == 119_547
