"""`detect`: reading texts, replacement by the generator, predictions."""

import collections
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPANISH, child

from electra_wrap import detect, inference, subprocesses
from electra_wrap.data import tokenization

Cli = Callable[..., Any]
Results = list[dict[str, Any]]
LETTERS = "abcdefghijklmnopqrstuvwxyzáéíñóúABCDELMNQ.,:¿?¡!—"
TOKENS = [*tokenization.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:32])]
TOKENS += ["El", "Los", "niño", "una", "en", "de"]

#: Special tokens, control characters, emoji, other scripts, long words, no tokens.
UNUSUAL = ["x [MASK] y [SEP] z", "una\x00\x1b[31m\x07 de\tla\u202enoche\u2066", "👩‍👩‍👧 🙂 漢字"]
UNUSUAL += ["a" * 10_000, "en de una " * 1000, "[MASK]", "\u200b"]
SEEDS = 400


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with random weights and 80 positions, which fit each sentence."""
    directory = tmp_path_factory.mktemp("models")
    child("write_models.py", directory, "80", stdin="\n".join(TOKENS))
    return directory


@pytest.fixture(scope="session")
def replaced(models: Path) -> list[Results]:
    """The results of `replace` for each seed, and then of seed 3 for each text alone, backwards."""
    few, many = ["niño", SPANISH[0]], ["niño", *SPANISH, *UNUSUAL]
    jobs = [(many if seed < 10 else few, seed) for seed in range(SEEDS)]
    jobs += [([text], 3) for text in reversed(many)]
    model, env = str(models / "discriminator"), subprocesses.OFFLINE
    arguments = ({"model": model, "texts": texts, "seed": seed} for texts, seed in jobs)
    return list(subprocesses.call_each("electra_wrap.inference", "replace", arguments, env=env))


def test_lines_of_stdin_give_one_json_object_each(cli: Cli, models: Path) -> None:
    texts = [f"{SPANISH[0]} {number}" for number in range(2 * inference.BATCH_SIZE)]
    stdin = "\ufeff" + "\r\n \r\n".join([*texts, "en de una " * 40])
    done = cli("detect", "--model", models, "-", "--json", stdin=stdin)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["text"] for result in results[:-1]] == texts
    assert results[-1]["cut"] == len("en de una " * 26) - 1
    assert done.stderr == "electra_wrap: texts that were truncated to the model's length: 1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "a\udcf1o"), "text 2 is not UTF-8"),
        (("x", "--replace"), "generator has no ELECTRA for transformers"),
        (("x", "--model", "generator"), "does not fit ElectraForPreTraining"),
    ],
)
def test_error_is_one_line(
    cli: Cli, models: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    shutil.copytree(models / "discriminator", tmp_path / "alone" / "discriminator")
    shutil.copytree(models / "generator", tmp_path / "generator")
    done = cli("detect", "--model", "alone", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_neither_code_nor_pickles_of_a_model_run(cli: Cli, models: Path, tmp_path: Path) -> None:
    model, mark = Path(shutil.copytree(models / "discriminator", tmp_path / "m")), tmp_path / "mark"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n", "utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForPreTraining": "evil.Evil"}
    config["_attn_implementation"] = "ana/evil"
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert cli("detect", "--model", model, "una").returncode == 0
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    names = {"electra.embeddings.LayerNorm.weight": "pytorch_model.bin"}
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    done = cli("detect", "--model", model, "una")
    assert "model.safetensors" in done.stderr and done.stderr.count("\n") == 1
    assert not mark.exists()


def test_texts_are_read_batch_by_batch(models: Path) -> None:
    """So that memory does not grow with the input."""
    read: list[str] = []
    texts = (read.append(text) or text for text in 8 * SPANISH)
    next(results := inference.infer("detect", {"model": str(models / "discriminator")}, texts))
    assert len(read) == inference.BATCH_SIZE
    results.close()


def test_replacements_depend_on_text_and_seed_alone(replaced: list[Results]) -> None:
    for result, [alone] in zip(replaced[3], reversed(replaced[SEEDS:]), strict=True):
        assert {**alone, "probabilities": 0} == {**result, "probabilities": 0}
        assert alone["probabilities"] == pytest.approx(result["probabilities"], abs=2e-5)
    positions = [tuple(results[1]["masked"]) for results in replaced[:SEEDS]]
    assert len(set(positions)) > 50
    times, number = collections.Counter(sum(positions, ())), len(replaced[0][1]["tokens"])
    expected = times.total() / number
    assert all(abs(times[p] - expected) < 5 * expected**0.5 for p in range(number)), "equally often"


def test_only_masked_tokens_are_replaced(replaced: list[Results]) -> None:
    changed = masked = 0
    for result in (result for results in replaced for result in results):
        original, tokens = result["original"], result["tokens"]
        pairs = enumerate(zip(original, tokens, strict=True))
        assert result["changed"] == [position for position, (a, b) in pairs if a != b]
        assert set(result["changed"]) <= set(result["masked"])
        assert len(tokens) == len(result["probabilities"]) == len(result["replaced"])
        ordinary = [
            p for p, token in enumerate(original) if token not in tokenization.SPECIAL_TOKENS
        ]
        share = max(1, round(0.15 * (len(original) + 2)))
        assert set(result["masked"]) <= set(ordinary)
        assert len(result["masked"]) == min(len(ordinary), share)
        changed, masked = changed + len(result["changed"]), masked + len(result["masked"])
    assert 0 < changed < masked


def test_samples_follow_the_generators_softmax(
    models: Path, replaced: list[Results], tmp_path: Path
) -> None:
    """400 samples of a masked token. They fail the test at another temperature."""
    ids = np.array([[TOKENS.index(token) for token in ("[CLS]", "[MASK]", "[SEP]")]])
    np.savez(tmp_path / "in.npz", ids, np.ones_like(ids), np.zeros_like(ids))
    child("hf_logits.py", models, tmp_path / "in.npz", tmp_path / "out.npz", stdin="[]")
    logits = np.load(tmp_path / "out.npz")["generator"][0, 1].astype(np.float64)
    expected = SEEDS * np.exp(logits) / np.exp(logits).sum()
    seen = collections.Counter(results[0]["tokens"][0] for results in replaced[:SEEDS])
    counts = np.array([seen[token] for token in TOKENS])
    frequent = expected > 5
    chi_square = (((counts - expected) ** 2 / expected)[frequent]).sum()
    assert frequent.sum() > 3 and abs((counts - expected)[~frequent].sum()) < 40
    assert chi_square < frequent.sum() + 4 * (2 * frequent.sum()) ** 0.5


def test_lines_show_original_and_verdict_and_control_no_terminal(
    replaced: list[Results], capsys: pytest.CaptureFixture[str]
) -> None:
    text, cut = "Los pájaros cantan en la casa", 22
    result = {"text": text, "cut": cut, "tokens": ["Los", "pája", "beben", "en"]}
    result |= {"probabilities": [0.012, 0.9, 0.987, 0.45], "replaced": [0, 1, 1, 0]}
    detect.show(result | {"original": ["Los", "pája", "cantan", "la"], "changed": [2, 3]})
    detect.show(result)
    read, *lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert read == lines[4] == "Los pájaros cantan en"
    assert lines[:2] == ["Los 1.2%", "pája 90.0% false alarm"]
    assert lines[2:4] == ["beben for cantan 98.7% found", "en for la 45.0% missed"]
    assert lines[5:] == ["Los 1.2%", "pája 90.0% replaced", "beben 98.7% replaced", "en 45.0%"]
    for result in replaced[0]:
        detect.show(result)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u2066]", capsys.readouterr().out)
