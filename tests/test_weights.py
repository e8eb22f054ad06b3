"""Converted networks give the logits that the variables of the checkpoint give."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
from conftest import child

from electra_wrap import convert, subprocesses, weights
from electra_wrap.checkpoints import find_prefix
from electra_wrap.data import tokenization
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS, Shape

VOCABULARY = 90


def variables(
    hidden: int,
    generator_hidden: int,
    embedding: int,
    *,
    tied: bool = True,
    vocabulary: int = VOCABULARY,
) -> dict[str, Any]:
    """Return random values, none of them initial ones, for every variable of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name: str, n: int, m: int) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (n, m), (m,)

    def norm(name: str, n: int) -> None:
        shapes[f"{name}/gamma"], shapes[f"{name}/beta"] = (n,), (n,)

    for scope, width in (("electra", hidden), ("generator", generator_hidden)):
        e = embedding if scope == "electra" or tied else generator_hidden
        if scope == "electra" or not tied:
            for table, rows in (("word", vocabulary), ("position", 512), ("token_type", 2)):
                shapes[f"{scope}/embeddings/{table}_embeddings"] = (rows, e)
            norm(f"{scope}/embeddings/LayerNorm", e)
        if e != width:
            dense(f"{scope}/embeddings_project", e, width)
        for i in range(2):
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
    random = np.random.default_rng(0)
    values = {
        name: (random.normal(0, 0.2, shape) + name.endswith("gamma")).astype(np.float32)
        for name, shape in shapes.items()
    }
    slot = {"generator_predictions/output_bias/adam_m": np.zeros(vocabulary, np.float32)}
    return {**values, **slot, "global_step": np.int64(3)}


def checkpoints(values: dict[Path, dict[str, Any]]) -> None:
    """Write a checkpoint into each directory."""
    for directory, arrays in values.items():
        directory.mkdir()
        np.savez(directory / "values.npz", **arrays)
    child("write_checkpoint.py", *values)


def to_tensorflow(exported: Path, out: Path, step: int = 0) -> None:
    """Convert the models in `exported`/NETWORK in a process of its own."""
    convert.to_tensorflow(*(exported / network for network in NETWORKS), out, step=step)


SIZES = {
    # Both networks have a projection.
    "small": {"hidden": 128, "generator_hidden": 64, "embedding": 32},
    # The generator alone has one, as in base and large.
    "base": {"hidden": 128, "generator_hidden": 64, "embedding": 128},
    "untied": {"hidden": 128, "generator_hidden": 64, "embedding": 128, "tied": False},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The values of a checkpoint of each of `SIZES`, by its directory, which has an `hf/`, too.

    One process converts all of them, because importing TensorFlow takes seconds.
    """
    path = tmp_path_factory.mktemp("converted")
    values = {str(path / name): variables(**sizes) for name, sizes in SIZES.items()}
    checkpoints({Path(directory): arrays for directory, arrays in values.items()})
    jobs = [{"checkpoint": find_prefix(name), "out": f"{name}/hf"} for name in values]
    jobs.append({**jobs[0], "out": f"{path}/heads", "heads": {"generator": 4}})
    list(subprocesses.call_each("electra_wrap.weights", "to_transformers", jobs))
    return values


#: Largest difference of a logit or key between transformers in float32 and the oracle in float64.
TOLERANCE = 5e-5


def inputs(
    path: Path, vocabulary: int = VOCABULARY, batch: int = 3, length: int = 20
) -> list[np.ndarray]:
    """Write and return token ids, mask and segments: with padding, of one and of two segments."""
    random = np.random.default_rng(1)
    ends = random.integers(2, length + 1, (batch, 1))
    borders = random.integers(1, length + 1, (batch, 1))
    ends[0], borders[0] = length, length // 2
    mask = (np.arange(length) < ends).astype(np.int64)
    ids = random.integers(0, vocabulary, (batch, length))
    arrays = [ids, mask, (np.arange(length) >= borders) * mask]
    np.savez(path, *arrays)
    return arrays


def largest_differences(
    values: dict[str, Any], arrays: list[np.ndarray], results: Any
) -> dict[str, float]:
    """Return the largest differences of the results of hf_logits.py from the oracle's."""
    exact = {k: v.astype(np.float64) for k, v in values.items()}
    differences = {}
    for network in NETWORKS:
        logits, keys = getattr(oracle, network)(exact, *arrays)
        assert logits.std() > 0.01
        differences[network] = float(np.abs(results[network] - logits).max())
        differences[f"{network} keys"] = float(np.abs(results[f"{network}_keys"] - keys).max())
    return differences


def wrong_mappings(values: dict[str, Any]) -> list[tuple[str, dict[str, str | None]]]:
    """Return every way to swap two parameters of the same shape, and to drop one."""
    shapes, wrong = {name: value.shape for name, value in values.items()}, []
    for network in NETWORKS:
        _, names = weights.describe(network, shapes)
        wrong += [(network, {pytorch: None}) for pytorch in names.values()]
        wrong += [
            (network, {names[a]: names[b], names[b]: names[a]})
            for a, b in itertools.combinations(names, 2)
            if shapes[a] == shapes[b] and weights.is_transposed(a) == weights.is_transposed(b)
        ]
    return wrong


@pytest.mark.parametrize("name", SIZES)
def test_converted_networks_equal_the_oracle_and_no_parameter_can_be_wrong(
    tmp_path: Path, converted: dict[str, Any], name: str
) -> None:
    directory, values = list(converted.items())[list(SIZES).index(name)]
    arrays = inputs(tmp_path / "in.npz")
    wrong = wrong_mappings(values)
    assert len(wrong) > 500
    files = (f"{directory}/hf", tmp_path / "in.npz", tmp_path / "out.npz")
    output = child("hf_logits.py", *files, stdin=json.dumps(wrong), HF_HUB_OFFLINE="1")
    differences = largest_differences(values, arrays, np.load(tmp_path / "out.npz"))
    assert max(differences.values()) < TOLERANCE, differences
    effects = json.loads(output)
    unnoticed = [w for w, effect in zip(wrong, effects, strict=True) if effect < 10 * TOLERANCE]
    assert not unnoticed, f"{len(unnoticed)} of {len(wrong)} wrong mappings: {unnoticed[:5]}"


def test_round_trip_is_bit_identical(converted: dict[str, Any], tmp_path: Path) -> None:
    jobs = []
    for number, directory in enumerate(converted):
        (out := tmp_path / str(number)).mkdir()
        models = {network: f"{directory}/hf/{network}" for network in NETWORKS}
        jobs.append({**models, "out": str(out), "step": 7})
    list(subprocesses.call_each("electra_wrap.weights", "to_tensorflow", jobs))
    child("read_checkpoint.py", *(job["out"] for job in jobs))
    for job, before in zip(jobs, converted.values(), strict=True):
        after = np.load(f"{job['out']}/values.npz")
        names = {name for name in before if not weights.NOT_WEIGHTS.search(name)}
        slots = {f"{name}/{slot}" for name in names for slot in weights.SLOTS}
        assert set(after) == {"global_step", *names, *slots} and after["global_step"] == 7
        for name in names:
            assert after[name].dtype == np.float32
            assert after[name].tobytes() == before[name].tobytes()
            for slot in weights.SLOTS:
                assert after[f"{name}/{slot}"].shape == before[name].shape
                assert not after[f"{name}/{slot}"].any()


def test_config_is_read_from_the_checkpoint() -> None:
    shapes = {name: np.shape(value) for name, value in variables(**SIZES["small"]).items()}
    shapes["electra/embeddings/position_embeddings"] = (48, 32)
    keys = [field.name for field in dataclasses.fields(Shape)]
    keys += ["vocab_size", "max_position_embeddings"]
    expected = {
        "discriminator": [32, 128, 2, 2, 512, VOCABULARY, 48],
        "generator": [32, 64, 2, 1, 256, VOCABULARY, 48],
    }
    for network in NETWORKS:
        config, _ = weights.describe(network, shapes)
        assert [config[key] for key in keys] == expected[network]
    assert weights.describe("discriminator", shapes, heads=4)[0]["num_attention_heads"] == 4


def test_convert_writes_models_and_a_tokenizer_and_back(
    cli: Any, converted: dict[str, Any], tmp_path: Path
) -> None:
    """Also where paths have characters that TensorFlow takes for a pattern."""
    tokens = [*tokenization.SPECIAL_TOKENS, *(f"w{i}" for i in range(VOCABULARY - 5))]
    (tmp_path / "v.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    shutil.copytree(next(iter(converted)), tmp_path / "*[1]")
    cased = cli("convert", "*[1]", "--out", "cased", "--vocab", "v.txt")
    assert "warning: v.txt has no upper-case letters; was the model trained" in cased.stderr
    done = cli("convert", "*[1]", "--out", "h[2]/hf", "--vocab", "v.txt", "--lowercase")
    assert "warning" not in done.stderr
    hf = tmp_path / "h[2]" / "hf"
    assert (done.returncode, done.stdout) == (0, "h[2]/hf\n"), done.stderr
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (hf / "generator").iterdir()} == files | {"vocab.txt"}
    config = json.loads((hf / "discriminator" / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["hidden_size"]) == (VOCABULARY, 128)
    tokenizer = json.loads((hf / "generator" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (tokenizer["model_max_length"], tokenizer["do_lower_case"]) == (512, True)
    networks = [f"h[2]/hf/{network}" for network in NETWORKS]
    back = cli("convert", "--to-tf", *networks, "--out", "back[3]", "--step", "7")
    assert back.returncode == 0, back.stderr
    assert find_prefix(f"{tmp_path}/back[3]") == f"{tmp_path}/back[3]/model.ckpt-7"


def test_find_prefix(tmp_path: Path) -> None:
    (released := tmp_path / "released").mkdir()
    (released / "electra_small.index").touch()
    prefix = f"{released}/electra_small"
    assert find_prefix(str(released)) == find_prefix(prefix) == prefix
    for step in (90, 100):
        (tmp_path / f"model.ckpt-{step}.index").touch()
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-90"\n')
    assert find_prefix(str(tmp_path), 90) == f"{tmp_path}/model.ckpt-90"
    latest = f"{tmp_path}/model.ckpt-100"
    assert find_prefix(str(tmp_path)) == find_prefix(f"{latest}.index") == latest
    for path, step, of_step in ((tmp_path, 7, " of step 7"), (tmp_path / "nowhere", None, "")):
        with pytest.raises(UsageError, match=f"{path}: there is no checkpoint{of_step}; give"):
            find_prefix(str(path), step)


class Case(NamedTuple):
    """A checkpoint that does not convert: what its error says, and what is wrong with it."""

    error: str
    put: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    rename: tuple[str, str] = ("", "")
    damage: Callable[[Path], Any] = lambda directory: None
    options: dict[str, Any] = {}  # noqa: RUF012


BIAS = "generator_predictions/output_bias"
INDEX, DATA = "model.ckpt-3.index", "model.ckpt-3.data-00000-of-00001"

BROKEN = [
    Case("lacks electra/encoder/layer_1", {"electra/encoder/layer_1/output/dense/bias": None}),
    Case("lacks electra/embeddings/position", {"electra/embeddings/position_embeddings": None}),
    Case("lacks electra/encoder/layer_2/", {"electra/encoder/layer_150000/x": np.zeros(2)}),
    Case(f"the generator lacks {BIAS};", {BIAS: None}),
    Case("not ELECTRA's: extra/kernel", {"extra/kernel": np.zeros(3)}),
    Case("has no generator", rename=("generator/", "generator_ltr/")),  # Electric
    Case("has no discriminator", rename=("electra/", "bert/")),
    Case(f"{BIAS} has values that are not finite", {BIAS: np.full(VOCABULARY, np.nan)}),
    Case("not a complete checkpoint", damage=lambda d: os.truncate(d / DATA, 200_000)),
    Case("not a complete checkpoint", damage=lambda d: (d / DATA).unlink()),
    Case("not a complete checkpoint", damage=lambda d: (d / INDEX).write_text("text")),
    Case("there is no checkpoint", damage=lambda d: (d / INDEX).unlink()),
    Case("has 6 tokens, but the weights have 90 rows", options={"vocabulary": "../other.txt"}),
    Case("3 heads do not divide the discriminator's 128", options={"heads": 3}),
    Case("has an effect with --lowercase only", options={"strip_accents": True}),
    Case("exists; choose another --out", damage=lambda d: (d / "hf/generator").mkdir(parents=True)),
    Case("exists; choose another --out", damage=lambda d: (d / "hf").touch()),
    Case("", {"generator_predictions/temperature": np.float32(1)}),  # converts
]


def test_unsuitable_checkpoints_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(
        "\n".join([*tokenization.SPECIAL_TOKENS, "a"]), encoding="utf-8"
    )
    cases = {tmp_path / str(number): case for number, case in enumerate(BROKEN)}
    values, written = variables(**SIZES["small"]), {}
    for directory, case in cases.items():
        changed = (values | case.put).items()
        written[directory] = {n.replace(*case.rename): v for n, v in changed if v is not None}
    checkpoints(written)
    for directory, case in cases.items():
        case.damage(directory)
    before = set(tmp_path.rglob("*"))
    jobs = [(str(directory), case.options) for directory, case in cases.items()]
    errors = json.loads(child("convert_each.py", stdin=json.dumps(jobs)))
    for error, (directory, case) in zip(errors, cases.items(), strict=True):
        if case.error:
            assert error and case.error in error and "\n" not in error, (case.error, error)
            assert set(directory.rglob("*")) <= before
        else:
            assert error is None
            assert (directory / "hf" / "generator" / "model.safetensors").is_file()


def test_models_that_are_not_one_electra_are_refused(
    converted: dict[str, Any], tmp_path: Path
) -> None:
    directory = Path(next(iter(converted)))
    discriminator, generator = (directory / "hf" / network for network in NETWORKS)
    other_heads = directory.with_name("heads") / "generator"
    for pair, message in (
        ((discriminator, other_heads), "upstream has no generator of 64 units, 4 heads"),
        ((generator, discriminator), "missing in or foreign to a discriminator"),
        ((discriminator, tmp_path), "has no ELECTRA for transformers"),
    ):
        with pytest.raises(UsageError, match=message):
            convert.to_tensorflow(*pair, tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_of_convert_are_one_line(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (["nowhere"], ["empty"], ["a", "b"], ["a", "--to-tf"], ["a", "b", "--to-tf"]):
        done = cli("convert", *arguments, "--out", "hf")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
