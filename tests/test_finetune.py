"""Fine-tuning: labels are learned where they belong, by the weights that are given, from the training file alone."""

from __future__ import annotations

import json
import random
import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import child
from safetensors.numpy import load_file

from electra_wrap import finetune, vocab
from electra_wrap.errors import UsageError

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

#: A vocabulary of letters: each word has as many tokens.
TOKENS = [*vocab.SPECIAL_TOKENS, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
LENGTH = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    child("tiny_discriminator.py", directory, str(len(TOKENS)))
    vocab.write_tokenizer(directory, TOKENS, lowercase=False, strip_accents=False, max_length=LENGTH)
    return directory


def sentence(draw: random.Random, most: int = 6) -> list[str]:
    return ["".join(draw.choices("abcdxyz", k=draw.randint(1, 5))) for _ in range(draw.randint(3, most))]


def tune(cli: Cli, model: Path, task: str, train: Path, test: Path, *more: str) -> Any:
    files = ("--train", str(train), "--test", str(test))
    done = cli("finetune", "--model", str(model), "--task", task, *files, "--json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_tag_belongs_to_the_first_token_of_its_word(cli: Cli, model: Path, tmp_path: Path) -> None:
    """A word's first letter decides its tag; words have up to five tokens, and one sentence is too long."""
    draw = random.Random(0)
    training, test = [sentence(draw) for _ in range(400)], [sentence(draw) for _ in range(50)]
    test += [["abcde"] * 12]  # of which [CLS] and [SEP] leave room for nine, and one token of the tenth

    def conll(path: Path, sentences: list[list[str]]) -> Path:
        return write(path, [line for words in sentences for line in [*(f"{w}\t{tag(w)}" for w in words), ""]])

    def tag(word: str) -> str:
        return "early" if word[0] < "d" else "late"

    files = conll(tmp_path / "train", training), conll(tmp_path / "test", test)
    found = tune(cli, model, "tagging", *files, "--learning-rate", "0.01", "--epochs", "3", "--out", "out")
    assert found["accuracy"] > 0.99 and found["macro_f1"] > 0.99 and found["labels"] == ["early", "late"]
    assert found["cut"] == 2 and found["scored"] + 2 == sum(map(len, test)) and found["most_frequent_accuracy"] < 0.7
    answers = json.loads(child("finetuned.py", tmp_path / "out", stdin=json.dumps(test[:5])))
    assert answers == [list(map(tag, words)) for words in test[:5]]


def test_the_test_file_has_no_part_in_training(cli: Cli, model: Path, tmp_path: Path) -> None:
    """What was learned is the same, bit for bit, whether the test says the same or the opposite of the training."""
    draw = random.Random(0)
    texts = [[*words, draw.choice(["xxx", "zzz"])] for words in (sentence(draw) for _ in range(300))]
    names = {"xxx": "one label", "zzz": "otra etiqueta, ñ"}
    lines = [f"{names[words[-1]]}\t{' '.join(words)}" for words in texts]
    opposite = [f"{names['zzz' if words[-1] == 'xxx' else 'xxx']}\t{' '.join(words)}" for words in texts]
    training = write(tmp_path / "train", lines)
    same = tune(cli, model, "classification", training, training, "--out", "same")
    test = write(tmp_path / "test", opposite)
    other = tune(cli, model, "classification", training, test, "--out", "deep/other")
    assert same["accuracy"] > 0.95 and other["accuracy"] == pytest.approx(1 - same["accuracy"])
    assert (same["epochs"], same["learning_rate"]) == (32, pytest.approx(24e-4)), "600 steps; 3e-4 for small"
    assert same["seen"] == other["seen"] == len(texts)
    weights = [tmp_path / name / "model.safetensors" for name in ("same", "deep/other")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert {*tmp_path.iterdir()} == {tmp_path / name for name in ("train", "test", "same", "deep")}


def test_training_begins_with_the_weights_that_were_learned_or_with_none_of_them(
    cli: Cli, model: Path, tmp_path: Path
) -> None:
    """Steps too small to change anything leave the body as it was."""
    lines = write(tmp_path / "lines", [f"{label}\t{word}" for label, word in zip("ab" * 8, "xyz" * 6, strict=False)])
    for out, more in (("learned", ()), ("random", ("--from-scratch",))):
        keys = ("--epochs", "1", "--learning-rate", "1e-30", "--out", out, *more)
        tune(cli, model, "classification", lines, lines, *keys)
    before, learned, fresh = (
        {name: value for name, value in load_file(path / "model.safetensors").items() if name.startswith("electra.")}
        for path in (model, tmp_path / "learned", tmp_path / "random")
    )
    assert len(before) > 20 and before.keys() == learned.keys() == fresh.keys()
    for name, value in before.items():
        np.testing.assert_allclose(learned[name], value, rtol=0, atol=1e-20, err_msg=name)
        assert fresh[name].shape == value.shape and not np.allclose(fresh[name], value, atol=0.01), name


@pytest.mark.parametrize(
    ("task", "training", "test", "says"),
    [
        ("classification", b"a\tx\nno tab\n", b"a\tx\n", r"train, line 2: not label<TAB>text"),
        ("classification", b"a\tx\n\tno label\n", b"a\tx\n", r"train, line 2: not label<TAB>text"),
        ("classification", b"a\tx\na\t \n", b"a\tx\n", r"train, line 2: not label<TAB>text"),
        ("classification", b"a\tx\nb\ty\n", b"a\tx\nb\t\xe1rbol\n", r"test, line 2: not UTF-8"),
        ("classification", b"a\tx\n\na\ty\n", b"a\tx\n", r"train has one label only, 'a'"),
        ("classification", b"a\tx\nb\ty\n", b"a\tx\n\nc\ty\n", r"test, line 3: the label 'c' is not in .*train"),
        ("classification", b"a\tx\nb\ty\n", b"\n \n", r"test is empty"),
        ("tagging", b"x\ta\ny\tb\n", b"x\tb\n\ny\ta\nz\tc\n", r"test, line 4: the label 'c' is not in .*train"),
        ("tagging", b"x\ta\ny\n", b"x\ta\n", r"train, line 2: not token<TAB>tag"),
        ("tagging", b"x\tN\ta\ny\tb\n", b"x\ta\n", r"train, line 1: not token<TAB>tag"),
    ],
)
def test_wrong_files_are_told_with_the_line(tmp_path: Path, task: str, training: bytes, test: bytes, says: str) -> None:
    files = tmp_path / "train", tmp_path / "test"
    for path, content in zip(files, (training, test), strict=True):
        path.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        finetune.label_numbers(*(finetune.read(path, task) for path in files), tuple(map(str, files)))


def test_files_of_other_systems_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("\ufeffEl\tdet\r\npájaro\u2028\tn\r\n\r\n\r\nEl\tdet".encode())
    read = finetune.read(tmp_path / "file", "tagging")
    assert [(one.words, one.labels, one.lines) for one in read] == [
        (["El", "pájaro"], ["det", "n"], [1, 2]),
        (["El"], ["det"], [5]),
    ]


def test_what_is_there_is_not_overwritten(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lines = write(tmp_path / "lines", ["a\tx", "b\ty"])
    command = ("finetune", "--model", str(model), "--task", "classification", "--train", str(lines), "--test")
    done = cli(*command, str(lines), "--out", "out")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "out exists; choose another --out" in done.stderr and not [*(tmp_path / "out").iterdir()]
    done = cli(*command, "nowhere", "--out", "new")
    assert done.returncode == 2 and "nowhere cannot be read" in done.stderr and not (tmp_path / "new").exists()


def test_macro_f1_is_the_mean_over_labels() -> None:
    """Of 0, two of three are found; 1 is found twice, once wrongly; 2 is found where it is not, 3 is not found."""
    found = finetune.scores(np.array([0, 0, 0, 1, 3]), np.array([0, 0, 1, 1, 2]))
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (4 / 5 + 2 / 3 + 0 + 0) / 4})
