"""Vocabularies: validated and reproducible, with tokenizer files that match training."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import SPANISH, child, python
from test_sources import Server, server  # noqa: F401
from tokenizers import Tokenizer

from electra_wrap.data import tokenization, vocab
from electra_wrap.errors import UsageError

GOOD = [*tokenization.SPECIAL_TOKENS, "a", "##a", "pájaro"]
CASED = {"lowercase": False, "strip_accents": False}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def tokenizer_json(tokens: list[str], first: int = 0, **model: str) -> bytes:
    """Return a tokenizer.json, which need not have the tokens in the order of their numbers."""
    ids = {token: number for number, token in reversed(list(enumerate(tokens, first)))}
    return json.dumps({"model": {**model, "vocab": ids}}).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """An empty directory for shards."""
    (path := tmp_path / "corpus").mkdir()
    return path


def test_tokens_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    lines = "\n".join(GOOD).encode()
    for name, content in (("a", lines), ("b", lines + b"\n"), ("c.json", tokenizer_json(GOOD))):
        (tmp_path / name).write_bytes(content)
        assert vocab.read(tmp_path / name) == GOOD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["\ufeff[PAD]", *GOOD[1:]], "begins with a byte order mark"),
        ([json.dumps({"model": {}})], r"is JSON; name it tokenizer\.json"),
        ([t for t in GOOD if t != "[MASK]"], r"\[MASK\] is missing"),
        (GOOD[1:] + GOOD[:1], r"\[PAD\] is not on line 1"),
        (tokenizer_json(GOOD, 1), "its numbers have gaps"),
        (tokenizer_json(GOOD, type="BPE"), "it is of the type BPE; give a vocab.txt"),
        (tokenizer_json(GOOD, continuing_subword_prefix="@@"), "of a word with '@@', not ##"),
        (b"\xff", "not a UTF-8 vocabulary: .*; give a vocab.txt"),
    ],
)
def test_malformed_vocabularies_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / ("v.json" if isinstance(content, bytes) else "v")
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(UsageError, match=message):
        vocab.read(path)


def test_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="v: No such file or directory; give a vocabulary"):
        vocab.read(tmp_path / "v")


#: Lines of published vocabularies: separators of Unicode that are white space, and repeated tokens.
ODD = [*GOOD[:5], "\u2028", "##\u2028", "niño", "", " a", "niño", "##a\r", "[MASK]", ""]


def test_odd_lines_keep_all_ids(tmp_path: Path) -> None:
    tokens = vocab.read(path := write(tmp_path / "v", ODD))
    last = {line.strip(): number for number, line in enumerate(ODD)}
    assert {token: number for number, token in enumerate(tokens) if token in last} == last
    assert len(set(tokens)) == len(tokens) == len(ODD)
    vocab.fetch(str(path), tmp_path / "copy", None)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes(), "upstream reads it as it is"
    tokenization.write_tokenizer(tmp_path, tokens, max_length=64, **CASED)
    assert vocab.read(tmp_path / "vocab.txt") == tokens
    ids = tokenization.line_encoder(tokens, **CASED)("niño aa \u2028 ##")
    assert ids == [10, 9, 11, 1, 1]
    assert Tokenizer.from_file(f"{tmp_path}/tokenizer.json").encode("niño aa [MASK]").ids == [
        *(2, 10, 9, 11, 12, 3)
    ]


def test_training_is_reproducible(tmp_path: Path, corpus: Path) -> None:
    write(corpus / "part-00000.txt", SPANISH * 3)
    keys: dict[str, Any] = {"vocab_size": 150, "sample_bytes": None, **CASED}
    script = "import sys, pathlib; from electra_wrap.data import vocab\n"
    script += f"vocab.train(*map(pathlib.Path, sys.argv[1:]), **{keys})"
    for seed in "123":
        python("-c", script, corpus, tmp_path / seed, env={"PYTHONHASHSEED": seed})
    tokens = vocab.read(tmp_path / "1")
    assert tokens == vocab.read(tmp_path / "2") == vocab.read(tmp_path / "3")
    assert tokens[:5] == list(tokenization.SPECIAL_TOKENS) and len(tokens) == 150
    assert any("á" in token for token in tokens)
    with pytest.raises(UsageError, match=r"= 20 is less than the \d+ characters"):
        vocab.train(corpus, tmp_path / "4", **(keys | {"vocab_size": 20}))


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
    monkeypatch.setattr(tokenization, "MAX_WORDS", 3)
    computed: list[str] = []
    words = tokenization.WordCache(lambda word: computed.append(word) or list(map(ord, word)))
    assert words.ids("a b a a") == [97, 98, 97, 97] and computed == ["a", "b"]
    text = "a b c d a e ab  b"
    assert words.ids(text) == [ord(c) for c in text if c != " "] and len(words) <= 3
    assert computed[2:] == ["c", "d", "a", "e", "ab", "", "b"]


def test_measure_counts_tokens_unknown_and_cut_ones(corpus: Path) -> None:
    write(corpus / "part-00000.txt", ["ab b", "", "x [MASK]", "ab ab ab ab ab ab ab ab"])
    tokens = [*tokenization.SPECIAL_TOKENS, "a", "b", "##b", "[", "]"]
    fit = vocab.measure(corpus, tokens, max_seq_length=8, **CASED)
    # a ##b | b | [UNK] | [ [UNK] ] | 8 × a ##b, of which an example of 8 has six tokens
    shares = {"unknown_share": 2 / 23, "too_long_share": 0, "cut_share": 10 / 23}
    assert fit == {"tokens_per_word": 23 / 12, **shares}


def test_trained_vocabulary_covers_scripts_of_thousands_of_characters(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frequency of a character falls with its rank, as in Chinese."""
    characters = list(map(chr, range(0x4E00, 0x4E00 + 5000)))
    weights = [1 / (rank + 20) ** 1.5 for rank in range(5000)]
    text = Random(0).choices(characters, weights, k=400_000)
    write(corpus / "part-00000.txt", ["".join(text[i : i + 40]) for i in range(0, len(text), 40)])
    vocab.train(corpus, tmp_path / "v", vocab_size=8000, sample_bytes=None, **CASED)
    fit = vocab.measure(corpus, vocab.read(tmp_path / "v"), max_seq_length=64, **CASED)
    assert 0 < fit["unknown_share"] < 0.001
    assert re.search(r"\d+ rare characters are left out, 0\.0\d+% of", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("tokens", "uncased"),
    [(["[A]", "##os", "1"], True), (["Los", "los"], False), (["É", "é"], False), (["中"], False)],
)
def test_vocabulary_is_uncased_if_it_has_lower_case_letters_only(
    tokens: list[str], uncased: bool
) -> None:
    assert vocab.is_uncased(tokens) == uncased


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
    tokens = [*tokenization.SPECIAL_TOKENS, *sorted(words - {"##a"}), "##a", "aa"]
    normalization = {"lowercase": lowercase, "strip_accents": strip_accents}
    tokenization.write_tokenizer(tmp_path, tokens, max_length=64, **normalization)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    texts = (SPANISH[0], "a" * 150, "a" * 201)
    answer = json.loads(child("hf_tokens.py", tmp_path, *texts, HF_HUB_OFFLINE="1"))
    assert " ".join(answer["auto"][0][:2]) == first and answer["fast"][0] == answer["auto"][0]
    assert answer["auto"][1][0] == "aa", "words have up to 200 characters, as upstream's"
    assert answer["auto"][2] == ["[UNK]"] and answer["max_length"] == 64
    assert answer["saved"] == answer["auto"]
    assert answer["saved_class"] == "ConvBertTokenizer", "a class that transformers 4 has, too"


def test_final_sigma_is_that_of_python() -> None:
    """In words of Greek letters, of cased characters, and of those that Unicode ignores there."""
    normalizer = tokenization.build_tokenizer(GOOD, lowercase=True, strip_accents=False).normalizer
    old = unicodedata.ucd_3_2_0  # later versions of Unicode do not agree on all marks
    characters = [
        c for c in map(chr, range(0x20000)) if c.isprintable() and old.category(c) != "Cn"
    ]
    seen_through = [c for c in characters if f"Α{c}Σ".lower().endswith("ς")]
    alphabets, random = ("ΑΣσςά", "ΣΣ ", "^`'’.:·´\u0301\u0345", seen_through), Random(0)
    assert len(seen_through) > 3000
    for _ in range(20_000):
        picked = random.choices(alphabets, k=random.randint(2, 14))
        text = "".join(map(random.choice, picked))
        assert normalizer.normalize_str(text) == text.lower()


def test_vocabulary_is_fetched_from_a_hub(cli: Any, server: Server, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = tokenization.build_tokenizer(GOOD, **CASED).to_str().encode()
    server.url("ana/json/resolve/main/tokenizer.json", tokenizer)
    url = server.url("ana/text/resolve/main/vocab.txt", "\n".join(GOOD).encode())
    write(tmp_path / "t.txt", ["a aa pájaro"])
    arguments = ("run", "--until=vocab", "--set=corpus.source=t.txt", "--set=corpus.held_out=0")
    for name, code, message in (
        ("json", 0, "vocab: 8 tokens"),
        ("text", 0, 'to pin it, set tokenizer.sha256 = "'),
        ("other", 2, "hf://ana/other has no vocabulary; correct tokenizer.source"),
        ("nada", 3, "hf://ana/nada cannot be fetched (404"),
        ("offline", 3, "give the path of a local copy"),
    ):
        hub = {"HF_ENDPOINT": url.partition("/ana")[0], "HF_HOME": str(tmp_path / "hf")}
        hub["HF_HUB_OFFLINE"] = str(int(name == "offline"))
        source = f"--set=tokenizer.source=hf://ana/{name}"
        done = cli(*arguments, source, f"--run-dir={name}", env=hub)
        assert done.returncode == code and message in done.stderr, done.stderr
        assert all(line.startswith("electra_wrap: ") for line in done.stderr.splitlines())
        assert code or vocab.read(tmp_path / name / "vocab.txt") == GOOD
