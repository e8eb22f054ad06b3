"""The weight mapping: logits of the converted networks equal those computed from the checkpoint's variables."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import child

from electra_wrap import process, vocab, weights
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS, Shape

VOCABULARY = 90


def variables(
    hidden: int,
    generator_hidden: int,
    embedding: int,
    layers: int = 2,
    tied: bool = True,
    vocabulary: int = VOCABULARY,
    deviation: float = 0.2,
) -> dict[str, Any]:
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
            shapes[f"{scope}/embeddings/word_embeddings"] = (vocabulary, e)
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
    shapes["generator_predictions/output_bias"] = (vocabulary,)
    values = {
        name: (random.normal(0, deviation, shape) + name.endswith("gamma")).astype(np.float32)
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


def call(**job: Any) -> Any:
    """Convert as the command line does: in a process of its own."""
    return process.call("electra_wrap.weights", job)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    values = variables(128, 64, 32)
    directory = tmp_path_factory.mktemp("good") / "c"
    checkpoints({directory: values})
    return directory, values


SIZES = {
    "small": {"hidden": 128, "generator_hidden": 64, "embedding": 32},  # projections in both, as small
    "base": {"hidden": 128, "generator_hidden": 64, "embedding": 128},  # in the generator alone, as base and large
    "untied": {"hidden": 128, "generator_hidden": 64, "embedding": 128, "tied": False},
}

#: Largest absolute difference of a logit or key between transformers in float32 and the oracle in float64.
TOLERANCE = 5e-5


def inputs(path: Path, vocabulary: int = VOCABULARY, batch: int = 3, length: int = 20) -> list[np.ndarray]:
    """Token ids, mask and segments: padded ones, of one and of two segments."""
    random = np.random.default_rng(1)
    ends, borders = random.integers(2, length + 1, (batch, 1)), random.integers(1, length + 1, (batch, 1))
    ends[0], borders[0] = length, length // 2
    mask = (np.arange(length) < ends).astype(np.int64)
    arrays = [random.integers(0, vocabulary, (batch, length)), mask, (np.arange(length) >= borders) * mask]
    np.savez(path, *arrays)
    return arrays


def largest_differences(values: dict[str, Any], arrays: list[np.ndarray], found: Any) -> dict[str, float]:
    exact = {k: v.astype(np.float64) for k, v in values.items()}
    differences = {}
    for network in NETWORKS:
        logits, keys = getattr(oracle, network)(exact, *arrays)
        assert logits.std() > 0.01
        differences[network] = float(np.abs(found[network] - logits).max())
        differences[f"{network} keys"] = float(np.abs(found[f"{network}_keys"] - keys).max())
    return differences


def mutations(values: dict[str, Any]) -> list[tuple[str, dict[str, str | None]]]:
    """Every way to swap two rows of the mapping that have the same shape, and to drop one."""
    shapes = {name: value.shape for name, value in values.items()}
    found: list[tuple[str, dict[str, str | None]]] = []
    for network in NETWORKS:
        mapping = weights.describe(network, shapes).mapping
        found += [(network, {row.pytorch: None}) for row in mapping]
        found += [
            (network, {a.pytorch: b.pytorch, b.pytorch: a.pytorch})
            for a, b in itertools.combinations(mapping, 2)
            if shapes[a.tensorflow] == shapes[b.tensorflow] and a.transposed == b.transposed
        ]
    return found


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(sizes, id=name, marks=() if name == "small" else pytest.mark.slow) for name, sizes in SIZES.items()],
)
def test_the_networks_equal_the_oracle_and_no_row_can_be_wrong(tmp_path: Path, sizes: dict[str, Any]) -> None:
    values = variables(**sizes)
    checkpoints({tmp_path / "c": values})
    call(task="convert", checkpoint=str(tmp_path / "c"), out=str(tmp_path / "hf"))
    arrays = inputs(tmp_path / "in.npz")
    tried = mutations(values)
    assert len(tried) > 500
    output = child(
        "hf_logits.py",
        *(tmp_path / name for name in ("hf", "in.npz", "out.npz")),
        stdin=json.dumps(tried),
        HF_HUB_OFFLINE="1",
    )
    differences = largest_differences(values, arrays, np.load(tmp_path / "out.npz"))
    assert max(differences.values()) < TOLERANCE, differences
    unseen = [m for m, difference in zip(tried, json.loads(output), strict=True) if difference < 10 * TOLERANCE]
    assert not unseen, f"{len(unseen)} of {len(tried)} wrong mappings would go unseen: {unseen[:5]}"


@pytest.mark.slow
def test_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    values = {tmp_path / name: variables(**sizes) for name, sizes in SIZES.items()}
    checkpoints(values)
    for directory in values:
        call(task="convert", checkpoint=str(directory), out=str(directory / "hf"))
        both = {network: str(directory / "hf" / network) for network in NETWORKS}
        call(task="convert_back", **both, out=str(directory / "back"), step=7)
        assert (directory / "back" / "model.ckpt-7.index").is_file()
    child("read_checkpoint.py", *(directory / "back" for directory in values))
    for directory, before in values.items():
        after = np.load(directory / "back" / "values.npz")
        names = {name for name in before if not weights.NOT_WEIGHTS.search(name)}
        assert set(after) == {"global_step", *names, *(f"{n}/{slot}" for n in names for slot in weights.SLOTS)}
        assert after["global_step"] == 7
        for name in names:
            assert after[name].dtype == np.float32 and after[name].tobytes() == before[name].tobytes()
            assert not after[f"{name}/adam_v"].any() and after[f"{name}/adam_m"].shape == before[name].shape


def test_every_variable_is_used_once_and_none_is_left(good: tuple[Path, dict[str, Any]]) -> None:
    shapes = {name: value.shape for name, value in good[1].items()}
    used: set[str] = set()
    for network in NETWORKS:
        mapping = weights.describe(network, shapes).mapping
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
    shapes["electra/embeddings/position_embeddings"] = (48, 32)
    keys = [*(field.name for field in dataclasses.fields(Shape)), "vocab_size", "max_position_embeddings"]
    expected = {"discriminator": [32, 128, 2, 2, 512, VOCABULARY, 48], "generator": [32, 64, 2, 1, 256, VOCABULARY, 48]}
    for network in NETWORKS:
        config = weights.describe(network, shapes).config
        assert [config[key] for key in keys] == expected[network]
    assert weights.describe("discriminator", shapes, heads=4).config["num_attention_heads"] == 4
    with pytest.raises(UsageError, match="128 is not divisible by 3 heads"):
        weights.describe("discriminator", shapes, heads=3)


def test_convert_writes_models_and_tokenizer(cli: Any, good: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tokens = [*vocab.SPECIAL_TOKENS, *(f"w{i}" for i in range(VOCABULARY - 5))]
    (tmp_path / "v.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    done = cli("convert", str(good[0]), "--out", "hf", "--vocab", "v.txt", "--max-length", "64")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "hf")), done.stderr
    assert sorted(p.name for p in (tmp_path / "hf" / "generator").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ]
    config = json.loads((tmp_path / "hf" / "discriminator" / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["hidden_size"]) == (VOCABULARY, 128)
    tokenizer = json.loads((tmp_path / "hf" / "generator" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["model_max_length"] == 64
    again = cli("convert", str(good[0]), "--out", "hf")
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    before = (tmp_path / "hf" / "generator" / "model.safetensors").stat().st_ino
    assert cli("convert", str(good[0]), "--out", "hf", "--force").returncode == 0
    assert (tmp_path / "hf" / "generator" / "model.safetensors").stat().st_ino != before
    assert not (tmp_path / "hf" / "generator" / "vocab.txt").exists(), "replaced, not mixed"
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["discriminator", "generator"]


def test_the_file_is_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.float32([7.5]), "ñ": np.ones((1, 1, 2))}
    weights._save(tmp_path / "x.safetensors", {k: v.shape for k, v in tensors.items()}, tensors.values())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], value) for name, value in tensors.items())


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    released = tmp_path / "released"
    released.mkdir()
    (released / "electra_small.index").touch()
    assert weights.find(str(released)) == weights.find(f"{released}/electra_small") == f"{released}/electra_small"
    for step in (90, 100):
        (tmp_path / f"model.ckpt-{step}.index").touch()
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-90"\n', encoding="utf-8")
    assert weights.find(str(tmp_path)) == f"{tmp_path}/model.ckpt-90"
    assert weights.find(str(tmp_path), 100) == weights.find(f"{tmp_path}/model.ckpt-100.index")
    for step, says in ((7, "no checkpoints of step 7"), (None, "2 checkpoints .model.ckpt-100, model.ckpt-90.")):
        (tmp_path / "checkpoint").unlink(missing_ok=True)
        with pytest.raises(UsageError, match=says):
            weights.find(str(tmp_path), step)


def truncate(directory: Path) -> None:
    path = directory / "model.ckpt-3.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-2000])


#: What is done to the variables, to the files, the keys of the call, and what the error says.
BROKEN: list[tuple[Any, Any, dict[str, Any], str]] = [
    (lambda v: v.pop("electra/encoder/layer_1/output/dense/bias"), None, {}, "lacks electra/encoder/layer_1/output"),
    (lambda v: v.pop("electra/embeddings/position_embeddings"), None, {}, "lacks electra/embeddings/position"),
    (lambda v: v.update({"extra/kernel": np.zeros(3)}), None, {}, "not ELECTRA's: extra/kernel"),
    (lambda v: v.update({"generator_ltr/x": np.zeros(3)}), None, {}, "two towers"),
    (lambda v: v.update({"generator_predictions/output_bias": np.full(90, np.nan)}), None, {}, "not finite"),
    (None, None, {"expected": {"generator": {"hidden_size": 128}}}, "hidden_size is 64, the profile says 128"),
    (lambda v: [v.pop(k) for k in list(v) if k.startswith("generator")], None, {}, "has no generator"),
    (
        lambda v: [v.update({f"bert{k[7:]}": v.pop(k)}) for k in list(v) if k[:8] == "electra/"],
        None,
        {},
        "has no discriminator",
    ),
    (None, truncate, {}, "not a whole checkpoint"),
    (None, lambda d: (d / "model.ckpt-3.data-00000-of-00001").unlink(), {}, "not a whole checkpoint"),
    (None, lambda d: (d / "model.ckpt-3.index").unlink(), {}, "no checkpoint"),
    (None, lambda d: (d / "model.ckpt-3.index").write_text("text", encoding="utf-8"), {}, "not a whole checkpoint"),
    (None, None, {"vocabulary": "v.txt"}, "has 6 tokens, the checkpoint 90"),
    (None, lambda d: (d / "hf" / "generator").mkdir(parents=True), {}, "exists; choose another --out"),
    (None, lambda d: (d / "hf").write_text("", encoding="utf-8"), {}, "mend that and run again"),
    (lambda v: v.update({"generator_predictions/temperature": np.float32(1)}), None, {}, ""),
]


def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("\n".join([*vocab.SPECIAL_TOKENS, "a"]), encoding="utf-8")
    values = {}
    for number, (change, _, _, _) in enumerate(BROKEN):
        arrays = values[tmp_path / str(number)] = variables(128, 64, 32)
        if change:
            change(arrays)
    checkpoints(values)
    jobs = []
    for directory, (_, touch, keys, _) in zip(values, BROKEN, strict=True):
        if touch:
            touch(directory)
        paths = {"vocabulary": str(tmp_path / keys["vocabulary"])} if "vocabulary" in keys else {}
        jobs.append((str(directory), {**keys, **paths}))
    before = [sorted(directory.rglob("*")) for directory in values]
    errors = json.loads(child("convert_each.py", stdin=json.dumps(jobs)))
    for (_, _, _, says), error, directory, files in zip(BROKEN, errors, values, before, strict=True):
        assert (error is None) == (says == "") and says in (error or ""), (says, error)
        assert "\n" not in (error or "")
        if error is None:
            assert (directory / "hf" / "generator" / "model.safetensors").is_file()
        else:
            left = {p for p in directory.rglob("*") if p not in files}
            assert left <= {directory / "hf"}, left


def test_networks_that_are_not_one_electra_do_not_go_back(good: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    call(task="convert", checkpoint=str(good[0]), out=str(tmp_path / "hf"))
    discriminator, generator = (str(tmp_path / "hf" / network) for network in NETWORKS)
    call(task="convert", checkpoint=str(good[0]), out=str(tmp_path / "heads"), heads={"discriminator": 4})
    for pair, says in (
        ((str(tmp_path / "heads" / "discriminator"), generator), "upstream has no discriminator .* with 4 heads"),
        ((generator, discriminator), "missing in or foreign to a discriminator"),
        ((discriminator, str(tmp_path)), "no generator of transformers"),
    ):
        job = dict(zip(NETWORKS, pair, strict=True))
        with pytest.raises(UsageError, match=says):
            call(task="convert_back", **job, out=str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_no_checkpoint_is_one_line(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (["nowhere"], ["empty"], ["a", "b"], ["a", "--to-tf"], ["a", "b", "--to-tf"]):
        done = cli("convert", *arguments, "--out", "hf")
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_row_is_checked_by_eye() -> None:
    """The mapping is data: these are what a reader would look for first."""
    mapping = {row.tensorflow: row for row in weights.rows("generator", 3, projection=True)}
    assert dataclasses.astuple(mapping["generator/encoder/layer_2/attention/self/key/kernel"])[1:] == (
        "electra.encoder.layer.2.attention.self.key.weight",
        True,
    )
    assert mapping["electra/embeddings/LayerNorm/gamma"].pytorch == "electra.embeddings.LayerNorm.weight"
    assert mapping["generator/embeddings_project/bias"].pytorch == "electra.embeddings_project.bias"
