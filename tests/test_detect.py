"""`detect`: reading texts, replacement by the generator, predictions, tables."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
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

from electra_wrap import inference, run, subprocesses
from electra_wrap.data import vocab
from electra_wrap.errors import StageFailed
from electra_wrap.subprocesses import call_each
from electra_wrap.tools import detect

Cli = Callable[..., Any]
Results = list[dict[str, Any]]

#: Positions of the models; each sentence fits.
LENGTH = 80

LETTERS = "abcdefghijklmnopqrstuvwxyzáéíñóúABCDELMNQ.,:¿?¡!—"
WORDS = ["El", "Los", "niño", "una", "en", "de"]
TOKENS = [*vocab.SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS[:32]), *WORDS]

#: Special tokens, control characters, emoji, other scripts, long words, no tokens.
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
    """The hf/ of a run directory, with random weights."""
    hf = tmp_path_factory.mktemp("models") / "hf"
    child("write_models.py", hf, str(LENGTH), stdin="\n".join(TOKENS))
    return hf


@pytest.fixture(scope="session")
def replace(models: Path) -> Iterator[Callable[..., Results]]:
    """A function that calls `inference.replace` with texts and a seed, always in one child."""
    jobs: collections.deque[dict[str, Any]] = collections.deque()

    def call(*texts: str, seed: int = 0) -> Results:
        jobs.append({"model_dir": str(models), "texts": texts, "seed": seed})
        return list(next(results))

    waiting = iter(jobs.popleft, None)
    module, offline = inference.__name__, subprocesses.OFFLINE
    with contextlib.closing(call_each(module, "replace", waiting, env=offline)) as results:
        yield call


@pytest.fixture(scope="session")
def replaced(replace: Callable[..., Results]) -> list[Results]:
    """Results for each of 400 seeds: of a word and a sentence, and for 10 seeds of all texts."""
    texts = ("niño", SPANISH[0])
    more = (*SPANISH[1:], *UNUSUAL)
    # Of all texts, 400 results would take minutes.
    return [replace(*texts, *(more if seed < 10 else ()), seed=seed) for seed in range(400)]


def test_file_gives_one_json_object_per_line(cli: Cli, models: Path, tmp_path: Path) -> None:
    texts = [f"{SPANISH[0]} {number}" for number in range(2 * inference.BATCH_SIZE)]
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n \r\n".join(texts).encode())
    done = cli("detect", "--model", str(models), "--file", "texts.txt", "--json")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == texts
    assert done.stderr == ""


def test_last_line_counts_and_truncation_is_reported_once(cli: Cli, models: Path) -> None:
    """The same texts as arguments with --json, and from stdin as tables."""
    texts = [*SPANISH, "en de una " * 40, "en", "una " * 100]
    arguments = ("detect", "--model", str(models), "--replace", "--seed", "5")
    as_json = cli(*arguments, "--json", *texts)
    as_tables = cli(*arguments, stdin="\n\n".join(texts))
    changed = found = alarms = 0
    results = json.loads(as_json.stdout)
    for result in results:
        columns = (result["original"], result["tokens"], result["replaced"])
        for before, after, predicted in zip(*columns, strict=True):
            changed += before != after
            found += before != after and predicted
            alarms += before == after and predicted
    assert changed > found > 0 < alarms
    counts = f"{changed} replaced, {found} found, {alarms} false alarms"
    assert as_tables.stdout.splitlines()[-1] == f"{len(texts)} texts: {counts}"

    read = [result["text"][: result["cut"]] for result in results[-3:]]
    assert read == [("en de una " * 26)[:-1], "en", ("una " * 78)[:-1]]
    message = "electra_wrap: texts truncated to the model's 78 tokens: 2\n"
    assert as_json.stderr == as_tables.stderr == message


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((), " \n\n", "stdin has no text"),
        (("",), "", "the command has no text"),
        (("--file", "latin1.txt"), "", "text 2 of latin1.txt is not UTF-8"),
        (("--file", "nowhere.txt"), "", "nowhere.txt"),
        (("--file", "latin1.txt", "x"), "", "leave out one"),
        (("--seed", "1", "x"), "", "--replace only"),
        (("--replace", "x"), "", "has no generator"),
        (("--replace", "x", "--model", "other"), "", "use two models of one training"),
        (("x", "--model", "nowhere"), "", "give a run directory"),
        (("x", "--model", "new-run"), "", "new-run has no exported model yet; `run` exports it"),
    ],
)
def test_error_is_one_line(
    cli: Cli, models: Path, tmp_path: Path, arguments: tuple[str, ...], stdin: str, message: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("sí\n".encode() + "año\n".encode("latin-1"))
    shutil.copytree(models / "discriminator", tmp_path / "alone" / "discriminator")
    (tmp_path / "other").symlink_to(models / "other")
    (tmp_path / "new-run").mkdir()
    (tmp_path / "new-run" / run.MANIFEST).write_text("{}")
    done = cli("detect", "--model", "alone", "--json", *arguments, stdin=stdin)
    assert done.returncode in (2, 3) and message in done.stderr and done.stderr.count("\n") == 1


def _index_outside(model: Path, config: dict[str, Any]) -> None:
    (model / "model.safetensors").rename(model.parent / "evil.bin")
    names = dict.fromkeys(("electra.embeddings.LayerNorm.weight",), "../evil.bin")
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["MARK"]),)


def _pickle(model: Path, config: dict[str, Any]) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def _adapter(model: Path, config: dict[str, Any]) -> None:
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")


def _many_layers(model: Path, config: dict[str, Any]) -> None:
    config |= {"num_hidden_layers": 300_000, "hidden_size": 1, "num_attention_heads": 1}


def _many_tokens(model: Path, config: dict[str, Any]) -> None:
    config["vocab_size"] = 2**50


def _no_heads(model: Path, config: dict[str, Any]) -> None:
    config["num_attention_heads"] = 0


def _odd_activation(model: Path, config: dict[str, Any]) -> None:
    config["hidden_act"] = "os.system"


def _odd_header(model: Path, config: dict[str, Any]) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(bytes([255] * 8) + content[8:])


def _no_size(model: Path, config: dict[str, Any]) -> None:
    config["hidden_size"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_index_outside, "no ELECTRA for transformers"),
        (_pickle, "no ELECTRA for transformers"),
        (_adapter, "is an adapter of another model"),
        (_many_layers, "has 300,000 layers and"),
        (_many_tokens, "parameters, but model.safetensors has"),
        (_no_size, "hidden_size"),
        (_no_heads, "cannot be loaded"),
        (_odd_activation, "cannot be loaded ('os.system"),
        (_odd_header, "cannot be loaded"),
    ],
)
def test_model_of_another_form_is_refused(
    cli: Cli,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., None],
    message: str,
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    model = tmp_path / "model"
    shutil.copytree(models / "discriminator", model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    change(model, config)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = cli("detect", "--model", "model", "una")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "mark").exists()


def test_code_that_a_model_names_is_not_loaded(cli: Cli, models: Path, tmp_path: Path) -> None:
    """Neither beside the model nor on a hub."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(models / "discriminator", model)
    code = f"open({str(mark)!r}, 'w')\nclass Evil: pass\n"
    (model / "evil.py").write_text(code, encoding="utf-8")
    evil = {
        "config.json": {
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForPreTraining": "evil.Evil"},
            "quantization_config": {"quant_method": "evil"},
            "_attn_implementation": "ana/evil",
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    for name, values in evil.items():
        config = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(config | values), encoding="utf-8")
    results = [
        cli("detect", "--model", model, "una") for model in (models / "discriminator", "model")
    ]
    assert results[1].returncode == 0, results[1].stderr
    assert results[0].stdout == results[1].stdout and not mark.exists()


def test_texts_are_read_batch_by_batch(models: Path) -> None:
    """So that memory does not grow with the file."""
    read: list[str] = []
    texts = (read.append(text) or text for text in SPANISH)
    arguments = {"model": str(models / "discriminator")}
    for number, _ in enumerate(inference.infer("detect", arguments, texts, 2)):
        assert len(read) == number - number % 2 + 2


def test_child_that_dies_while_it_is_sent_a_job_is_a_failed_stage() -> None:
    jobs = [{"more": "than a pipe holds" * 10_000}]
    with pytest.raises(StageFailed, match="ended with code 1"):
        list(call_each("electra_wrap.nothing", "replace", jobs))


def test_replacements_depend_on_text_and_seed_alone(
    replace: Callable[..., Results], replaced: list[Results]
) -> None:
    for result in reversed(replaced[3]):
        (again,) = replace(result["text"], seed=3)
        assert {**again, "probabilities": 0} == {**result, "probabilities": 0}
    assert len({json.dumps(results[1]["masked"]) for results in replaced}) > 50


def test_only_masked_tokens_are_replaced(replaced: list[Results]) -> None:
    for result in (result for results in replaced for result in results):
        original, tokens = result["original"], result["tokens"]
        sampled = dict(zip(result["masked"], result["sampled"], strict=True))
        assert tokens == [sampled.get(position, token) for position, token in enumerate(original)]
        pairs = enumerate(zip(original, tokens, strict=True))
        assert result["changed"] == [position for position, (a, b) in pairs if a != b]
        assert len(tokens) == len(result["probabilities"]) == len(result["replaced"])
        ordinary = [p for p, token in enumerate(original) if token not in vocab.SPECIAL_TOKENS]
        assert set(result["masked"]) <= set(ordinary)
        share = max(1, round(0.15 * (len(original) + 2)))
        assert len(result["masked"]) == min(len(ordinary), share)
    assert any(
        len(result["changed"]) < len(result["masked"]) for results in replaced for result in results
    )


def test_samples_follow_the_generators_softmax(
    models: Path, replaced: list[Results], tmp_path: Path
) -> None:
    """400 samples of a masked token. They fail the test at another temperature."""
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
    assert frequent.sum() > 3
    assert abs(counts[~frequent].sum() - expected[~frequent].sum()) < 40
    assert chi_square < frequent.sum() + 4 * (2 * frequent.sum()) ** 0.5


def test_positions_are_masked_equally_often(replaced: list[Results]) -> None:
    masked = collections.Counter(p for results in replaced for p in results[1]["masked"])
    number = len(replaced[0][1]["tokens"])
    expected = sum(masked.values()) / number
    assert all(abs(masked[p] - expected) < 5 * expected**0.5 for p in range(number))


def test_batch_gives_the_results_of_single_texts(models: Path) -> None:
    texts = [*SPANISH, *UNUSUAL]
    arguments = {"model": str(models / "discriminator")}
    batch = inference.infer("detect", arguments, texts, len(texts))
    single = inference.infer("detect", arguments, texts, 1)
    for one, other in zip(batch, single, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-5)


def show(results: Results, width: int = 80) -> list[str]:
    """Return the printed lines, without colors."""
    file = io.StringIO()
    detect.show(results, Console(file=file, width=width, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_table_shows_original_and_verdict_without_color() -> None:
    text, cut = "Los pájaros cantan en la casa", 22
    result = {"text": text, "cut": cut, "tokens": ["Los", "pája", "beben", "en"]}
    result |= {"probabilities": [0.012, 0.9, 0.987, 0.45], "replaced": [0, 1, 1, 0]}
    replaced = result | {"original": ["Los", "pája", "cantan", "la"], "changed": [2, 3]}
    assert [" ".join(line.split()) for line in show([replaced]) + show([result])] == [
        "Los pájaros cantan en",
        "token original replaced?",
        "Los 1.2%",
        "pája 90.0% false alarm",
        "beben cantan 98.7% found",
        "en la 45.0% missed",
        "2 replaced, 1 found, 1 false alarms",
        "",
        "Los pájaros cantan en",
        "token replaced?",
        "Los 1.2%",
        "pája 90.0% replaced",
        "beben 98.7% replaced",
        "en 45.0%",
        "2 of 4 tokens are predicted to be replaced",
        "",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_output_fits_the_terminal_and_controls_nothing(replaced: list[Results], width: int) -> None:
    for line in show([result for results in replaced[:5] for result in results], width):
        assert cell_len(line) <= width
        assert not re.search(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]", line)
