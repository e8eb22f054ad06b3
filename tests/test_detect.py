"""`detect`: texts in, what the generator does to them, what the discriminator finds of it, one screen."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPANISH, child
from rich.cells import cell_len
from rich.console import Console

from electra_wrap import check, process, screen, vocab
from electra_wrap.errors import StageFailed

Cli = Callable[..., Any]

CHECK, REPLACE = "electra_wrap.check", {"task": "replace"}

#: Positions of the models; each sentence fits in.
LENGTH = 80

LETTERS = "abcdefghijklmnopqrstuvwxyzáéíñóúABCDELMNQ.,:¿?¡!—"
TOKENS = [*vocab.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:32]), "El", "Los", "niño", "una", "en", "de"]

#: No text of these may break anything.
UNUSUAL = [
    "x [MASK] y [SEP] z",
    "una\x00\x1b[31m\x07 de\tla\u202enoche\u2066",
    "👩‍👩‍👧 🙂 漢字",
    "שלום עולם",
    "مرحبا",
    "a" * 10_000,
    "en de una " * 1000,
    "[MASK]",
    "\u200b",
]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory's hf/, with random weights."""
    hf = tmp_path_factory.mktemp("models") / "hf"
    child("write_models.py", hf, str(LENGTH), stdin="\n".join(TOKENS))
    return hf


@pytest.fixture(scope="session")
def ask(models: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Return a function that asks `detect` or, with a seed, `replace` about texts; all in one child."""
    jobs: collections.deque[dict[str, Any]] = collections.deque()

    def call(*texts: str, seed: int | None = None) -> list[dict[str, Any]]:
        job = {"task": "detect", "model": str(models / "discriminator")}
        jobs.append({"texts": texts} | (job if seed is None else {**REPLACE, "model_dir": str(models), "seed": seed}))
        return list(next(answers))

    with contextlib.closing(process.calls(CHECK, iter(jobs.popleft, None), env=check.ENVIRONMENT)) as answers:
        yield call


@pytest.fixture(scope="session")
def replaced(ask: Callable[..., list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """What `replace` does to texts with each of 400 seeds: to one word, a sentence, and at first to all others."""
    first, more = ("niño", SPANISH[0]), (*SPANISH[1:], *UNUSUAL)
    return [ask(*first, *more, seed=seed) if seed < 10 else ask(*first, seed=seed) for seed in range(400)]


def test_a_file_of_many_texts_is_answered_line_by_line(cli: Cli, models: Path, tmp_path: Path) -> None:
    texts = [f"{sentence} {number}" for number, sentence in enumerate(SPANISH * (check.BATCH // 4))]
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(texts).encode())
    done = cli("detect", "--model", str(models), "--file", "texts.txt", "--json")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == texts and done.stderr == ""


def test_the_last_line_counts_and_what_was_cut_is_said_once(cli: Cli, models: Path) -> None:
    """The same texts as arguments, with JSON, and from stdin, with a screen whose counts must be those of the JSON."""
    texts = [*SPANISH, "en de una " * 40, "en", "una " * 100]
    arguments = ("detect", "--model", str(models), "--replace", "--seed", "5")
    by_arguments, by_stdin = cli(*arguments, "--json", *texts), cli(*arguments, stdin="\n\n".join(texts))
    changed = found = alarms = 0
    results = json.loads(by_arguments.stdout)
    for one in results:
        for before, after, verdict in zip(one["original"], one["tokens"], one["replaced"], strict=True):
            changed += before != after
            found += before != after and verdict
            alarms += before == after and verdict
    assert changed > found > 0 < alarms
    last = by_stdin.stdout.splitlines()[-1]
    assert last == f"in all, {len(texts)} texts: {changed} replaced, {found} found; {alarms} false alarms"

    assert [one["text"][: one["cut"]] for one in results[-3:]] == [("en de una " * 26)[:-1], "en", ("una " * 78)[:-1]]
    said = "electra_wrap: 2 texts were longer than the 78 tokens that the model reads, and cut there\n"
    assert by_arguments.stderr == by_stdin.stderr == said


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        ((), " \n\n", "stdin has no text"),
        (("",), "", "the command has no text"),
        (("--file", "latin1.txt"), "", "line 2 of latin1.txt is not UTF-8"),
        (("--file", "nowhere.txt"), "", "nowhere.txt"),
        (("--file", "latin1.txt", "x"), "", "leave out one"),
        (("--seed", "1", "x"), "", "--replace only"),
        (("--replace", "x"), "", "has no generator"),
        (("--replace", "x", "--model", "other"), "", "take both from one training"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    cli: Cli, models: Path, tmp_path: Path, arguments: tuple[str, ...], stdin: str, says: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("sí\n".encode() + "año\n".encode("latin-1"))
    shutil.copytree(models / "discriminator", tmp_path / "alone" / "discriminator")
    (tmp_path / "other").symlink_to(models / "other")
    done = cli("detect", "--model", "alone", "--json", *arguments, stdin=stdin)
    assert done.returncode in (2, 3) and says in done.stderr and done.stderr.count("\n") == 1


def test_the_next_text_is_read_when_the_last_is_answered(models: Path) -> None:
    """So a file of any size takes the memory of one batch."""
    read: list[str] = []
    results = check.ask(
        {"task": "detect", "model": str(models / "discriminator")}, (read.append(s) or s for s in SPANISH), 2
    )
    for number, _ in enumerate(results):
        assert len(read) == number - number % 2 + 2


def test_a_child_that_dies_is_a_failed_stage() -> None:
    with pytest.raises(StageFailed, match="ended with code 1"):
        list(process.calls("electra_wrap.nothing", [{"more": "than a pipe holds" * 10_000}]))


def test_replace_is_repeatable_and_heeds_the_seed(ask: Callable[..., Any], replaced: list[Any]) -> None:
    """One by one and in another order: a text's replacements are those of its seed."""
    for one in reversed(replaced[3]):
        (again,) = ask(one["text"], seed=3)
        assert {**again, "probabilities": 0} == {**one, "probabilities": 0}
    assert len({json.dumps(results[1]["masked"]) for results in replaced}) > 50


def test_the_generator_changes_what_is_masked_and_nothing_else(replaced: list[Any]) -> None:
    for one in (one for results in replaced for one in results):
        after = dict(zip(one["masked"], one["sampled"], strict=True))
        assert one["tokens"] == [after.get(place, token) for place, token in enumerate(one["original"])]
        differ = [
            place for place, pair in enumerate(zip(one["original"], one["tokens"], strict=True)) if len({*pair}) > 1
        ]
        assert one["changed"] == differ
        assert len(one["tokens"]) == len(one["probabilities"]) == len(one["replaced"])
        ordinary = [place for place, token in enumerate(one["original"]) if token not in vocab.SPECIAL_TOKENS]
        assert set(one["masked"]) <= set(ordinary)
        wanted = max(1, round(0.15 * (len(one["original"]) + 2)))
        assert len(one["masked"]) == min(len(ordinary), wanted)
    assert any(len(one["changed"]) < len(one["masked"]) for results in replaced for one in results)


def test_samples_have_the_generators_softmax(models: Path, replaced: list[Any], tmp_path: Path) -> None:
    """400 samples of a masked token: at another temperature they are others."""
    ids = np.array([[TOKENS.index(token) for token in ("[CLS]", "[MASK]", "[SEP]")]])
    np.savez(tmp_path / "in.npz", ids, np.ones_like(ids), np.zeros_like(ids))
    child("hf_logits.py", models, tmp_path / "in.npz", tmp_path / "out.npz", stdin="[]")
    logits = np.load(tmp_path / "out.npz")["generator"][0, 1].astype(np.float64)
    softmax = np.exp(logits - logits.max())
    expected = 400 * softmax / softmax.sum()
    seen = collections.Counter(results[0]["sampled"][0] for results in replaced)
    counts = np.array([seen[token] for token in TOKENS])
    frequent = expected > 5
    chi_square = (((counts - expected) ** 2 / expected)[frequent]).sum()
    assert frequent.sum() > 3 and abs(counts[~frequent].sum() - expected[~frequent].sum()) < 40
    assert chi_square < frequent.sum() + 4 * (2 * frequent.sum()) ** 0.5


def test_places_are_masked_equally_often(replaced: list[Any]) -> None:
    masked = collections.Counter(place for results in replaced for place in results[1]["masked"])
    number = len(replaced[0][1]["tokens"])
    expected = sum(masked.values()) / number
    assert all(abs(masked[place] - expected) < 5 * expected**0.5 for place in range(number))


def test_a_batch_gives_what_one_by_one_gives(ask: Callable[..., Any]) -> None:
    for one in ask(*SPANISH, *UNUSUAL):
        (alone,) = ask(one["text"])
        assert one["tokens"] == alone["tokens"]
        assert one["probabilities"] == pytest.approx(alone["probabilities"], abs=2e-5)


def shown(results: list[dict[str, Any]], width: int, generated: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    screen.show(results, generated, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def result(*tokens: str, changed: dict[int, str] | None = None, found: tuple[int, ...] = ()) -> dict[str, Any]:
    changed = changed or {}
    return {
        "text": " ".join(tokens),
        "original": [changed.get(place, token) for place, token in enumerate(tokens)],
        "masked": [0, *changed],
        "changed": [*changed],
        "tokens": [*tokens],
        "probabilities": [0.987 if place in found else 0.012 for place in range(len(tokens))],
        "replaced": [int(place in found) for place in range(len(tokens))],
        "cut": None,
    }


def test_without_colour_the_marks_say_it() -> None:
    one = result("Los", "pája", "##ros", "beben", "en", "casa", changed={3: "cantan", 5: "la"}, found=(1, 3))
    assert [line.rstrip() for line in shown([one], 80).splitlines()[-7:]] == [
        "generator  Los pája##ros *beben* en *casa*",
        "",
        "=                cantan       la",
        "Los  pája ##ros  *beben*  en  *casa*",
        "1%   99%! 1%     99%!     1%  1%",
        "",
        "2 replaced, 1 found; 1 false alarm",
    ]


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (result("a", "b"), "0 replaced: what the generator put in was there before; 0 false alarms"),
        (result("[MASK]") | {"masked": []}, "0 replaced: no token can be masked; 0 false alarms"),
    ],
)
def test_that_nothing_changed_is_said(one: dict[str, Any], says: str) -> None:
    assert shown([one], 80).splitlines()[-1] == says


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_wider_than_the_terminal(replaced: list[Any], width: int) -> None:
    """And none has what a terminal would obey; columns and pieces of words stay together."""
    long = result("Los", "x" * 100, *["##漢字"] * 60, "fin", changed={1: "y" * 100})
    for one in [*(one for results in replaced[:5] for one in results), long]:
        text = shown([one], width)
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    pieces = result(*["uno", "##dos", "##tres"] * 20)
    rows = shown([pieces], width).splitlines()
    assert not any(row.startswith("##") for row in rows[5:])


def test_each_token_is_above_its_probability(replaced: list[Any]) -> None:
    for one in replaced[0]:
        columns: list[str] = []
        lines = shown([one | {"masked": [], "changed": []}], 60).splitlines()
        for tokens, percents in itertools.pairwise(lines):
            if re.fullmatch(r"(\d+%!? *)+", percents):
                columns += [tokens[found.start() :].split()[0] for found in re.finditer(r"\d+%", percents)]
        assert columns == one["tokens"]
