"""The weight mapping: logits of the converted networks equal those computed from the checkpoint's variables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import child

from electra_wrap import process, vocab, weights
from electra_wrap.profile import NETWORKS, Shape

VOCABULARY = 90


def variables(hidden: int, generator_hidden: int, embedding: int, layers: int = 2, tied: bool = True) -> dict[str, Any]:
    """Random values for every variable of a checkpoint; none at its initial value, so that each one matters."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name: str, n: int, m: int) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (n, m), (m,)

    def norm(name: str, n: int) -> None:
        shapes[f"{name}/gamma"], shapes[f"{name}/beta"] = (n,), (n,)

    for scope, width in (("electra", hidden), ("generator", generator_hidden)):
        e = embedding if scope == "electra" or tied else generator_hidden
        if scope == "electra" or not tied:
            shapes[f"{scope}/embeddings/word_embeddings"] = (VOCABULARY, e)
            shapes[f"{scope}/embeddings/position_embeddings"] = (512, e)
            shapes[f"{scope}/embeddings/token_type_embeddings"] = (2, e)
            norm(f"{scope}/embeddings/LayerNorm", e)
        if e != width:
            dense(f"{scope}/embeddings_project", e, width)
        for i in range(layers):
            layer = f"{scope}/encoder/layer_{i}"
            for part in ("self/query", "self/key", "self/value", "output/dense"):
                dense(f"{layer}/attention/{part}", width, width)
            norm(f"{layer}/attention/output/LayerNorm", width)
            dense(f"{layer}/intermediate/dense", width, 4 * width)
            dense(f"{layer}/output/dense", 4 * width, width)
            norm(f"{layer}/output/LayerNorm", width)
    dense("discriminator_predictions/dense", hidden, hidden)
    dense("discriminator_predictions/dense_1", hidden, 1)
    dense("generator_predictions/dense", generator_hidden, e)
    norm("generator_predictions/LayerNorm", e)
    shapes["generator_predictions/output_bias"] = (VOCABULARY,)
    values = {
        name: (random.normal(0, 0.2, shape) + name.endswith("gamma")).astype(np.float32)
        for name, shape in shapes.items()
    }
    slots = {f"{name}/adam_m": np.zeros_like(value) for name, value in list(values.items())[:3]}
    return {**values, **slots, "global_step": np.int64(3)}


def checkpoints(values: dict[Path, dict[str, Any]]) -> None:
    """Write a checkpoint into each directory."""
    for directory, arrays in values.items():
        directory.mkdir()
        np.savez(directory / "values.npz", **arrays)
    child("write_checkpoint.py", *values)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    values = variables(128, 64, 32)
    directory = tmp_path_factory.mktemp("good") / "c"
    checkpoints({directory: values})
    return directory, values


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 128, "generator_hidden": 64, "embedding": 32},  # projections in both, as small
        {"hidden": 128, "generator_hidden": 64, "embedding": 128},  # in the generator alone, as base and large
        {"hidden": 128, "generator_hidden": 64, "embedding": 128, "tied": False},
    ],
    ids=["small", "base", "untied"],
)
def test_logits_equal_the_oracles(tmp_path: Path, sizes: dict[str, Any]) -> None:
    values = variables(**sizes)
    checkpoints({tmp_path / "c": values})
    process.call("electra_wrap.weights", {"checkpoint": str(tmp_path / "c"), "out": str(tmp_path / "hf")})
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCABULARY, (3, 20))
    mask = (np.arange(20) < np.array([[20], [13], [2]])).astype(np.int64)
    types = (np.arange(20) >= np.array([[9], [20], [1]])).astype(np.int64) * mask
    np.savez(tmp_path / "in.npz", ids, mask, types)
    child("hf_logits.py", tmp_path / "hf", tmp_path / "in.npz", tmp_path / "out.npz", HF_HUB_OFFLINE="1")
    found = np.load(tmp_path / "out.npz")
    exact = {k: v.astype(np.float64) for k, v in values.items()}
    for network in NETWORKS:
        expected = getattr(oracle, network)(exact, ids, mask, types)
        assert expected.std() > 0.1
        assert np.abs(found[network] - expected).max() < 5e-5, network


def test_every_variable_is_used_once_and_none_is_left(good: tuple[Path, dict[str, Any]]) -> None:
    shapes = {name: value.shape for name, value in good[1].items()}
    used: set[str] = set()
    for network in NETWORKS:
        _, _, mapping = weights.describe(network, shapes)
        for side in ("tensorflow", "pytorch"):
            names = [getattr(row, side) for row in mapping]
            assert len(names) == len(set(names))
        used |= {row.tensorflow for row in mapping}
    assert {name for name in shapes if name not in used} == {
        "global_step",
        *(name for name in shapes if name.endswith("adam_m")),
    }


def test_the_shape_is_read_from_the_checkpoint(good: tuple[Path, dict[str, Any]]) -> None:
    shapes = {name: value.shape for name, value in good[1].items()}
    assert weights.describe("discriminator", shapes)[:2] == (Shape(32, 128, 2, 2, 512), VOCABULARY)
    assert weights.describe("generator", shapes)[:2] == (Shape(32, 64, 2, 1, 256), VOCABULARY)


def test_convert_writes_models_and_tokenizer(cli: Any, good: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tokens = [*vocab.SPECIAL_TOKENS, *(f"w{i}" for i in range(VOCABULARY - 5))]
    (tmp_path / "v.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    done = cli("convert", str(good[0]), "--out", "hf", "--vocab", "v.txt")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "hf")), done.stderr
    assert sorted(p.name for p in (tmp_path / "hf" / "generator").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ]
    config = json.loads((tmp_path / "hf" / "discriminator" / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["hidden_size"]) == (VOCABULARY, 128)
    again = cli("convert", str(good[0]), "--out", "hf")
    assert again.returncode == 2 and "exists" in again.stderr and again.stderr.count("\n") == 1


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lambda v: v.pop("electra/encoder/layer_1/output/dense/bias"), {}, "lacks electra/encoder/layer_1/output"),
        (lambda v: v.pop("electra/embeddings/position_embeddings"), {}, "lacks electra/embeddings/position"),
        (lambda v: v.update({"extra/kernel": np.zeros(3)}), {}, "unknown variables extra/kernel"),
        (lambda v: v.update({"electra/embeddings/LayerNorm/beta": np.full(32, np.nan)}), {}, "not finite"),
        (lambda v: None, {"expected": {"generator": {"hidden_size": 128}}}, "hidden_size is 64, the profile says 128"),
        (lambda v: [v.pop(k) for k in list(v) if k.startswith("generator")], {}, "has no generator"),
        (
            lambda v: [v.update({f"bert{k[7:]}": v.pop(k)}) for k in list(v) if k[:8] == "electra/"],
            {},
            "has no discriminator",
        ),
        (lambda v: None, {}, ""),
    ]
    values = {}
    for number, (change, _, _) in enumerate(cases):
        arrays = values[tmp_path / str(number)] = variables(128, 64, 32)
        change(arrays)
    checkpoints(values)
    jobs = [(str(directory), keys) for directory, (_, keys, _) in zip(values, cases, strict=True)]
    errors = json.loads(child("convert_each.py", stdin=json.dumps(jobs)))
    for (_, _, says), error, directory in zip(cases, errors, values, strict=True):
        assert (error is None) == (says == "") and says in (error or ""), (says, error)
        assert (directory / "hf" / "discriminator").exists() == (error is None)


def test_no_checkpoint_is_one_line(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        done = cli("convert", name, "--out", "hf")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "checkpoint" in done.stderr


def test_a_row_is_checked_by_eye() -> None:
    """The mapping is data: these are what a reader would look for first."""
    mapping = {row.tensorflow: row for row in weights.rows("generator", 3, projection=True)}
    assert dataclasses.astuple(mapping["generator/encoder/layer_2/attention/self/key/kernel"])[1:] == (
        "electra.encoder.layer.2.attention.self.key.weight",
        True,
    )
    assert mapping["electra/embeddings/LayerNorm/gamma"].pytorch == "electra.embeddings.LayerNorm.weight"
    assert mapping["generator/embeddings_project/bias"].pytorch == "electra.embeddings_project.bias"
