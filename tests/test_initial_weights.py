"""`model.init_from`: training starts from a run, from models of transformers, from TensorFlow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_weights
from conftest import tiny
from safetensors.numpy import load_file, save_file
from test_sources import Server, server  # noqa: F401

from electra_wrap import profiles
from electra_wrap.data import vocab
from electra_wrap.engines import find_checkpoint
from electra_wrap.errors import UsageError
from electra_wrap.monitor import evaluation
from electra_wrap.native.checkpoints import checkpoint_path
from electra_wrap.pipeline.convert import convert
from electra_wrap.pipeline.execute import execute
from electra_wrap.profile import NETWORKS, toml
from electra_wrap.run import Run

pytestmark = pytest.mark.slow  # together they take minutes

STEPS = 4
ONE_STEP = {"steps": 1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A complete run of the native engine, with a generator of another size."""
    directory = tmp_path_factory.mktemp("native") / "source"
    profile = tiny(
        corpus_text,
        'engine="native"',
        "model.generator_hidden_size=0.25",
        "model.embedding_size=24",
        "tokenizer.lowercase=true",
        steps=STEPS,
    )
    run = Run(profile, directory)
    execute(run)
    return run


@pytest.fixture(scope="module")
def upstream_run(native: Run, upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("upstream") / "source"
    shutil.copytree(native.directory, directory)
    profile = native.profile.model_copy(update={"engine": "upstream", "model_name": "theirs"})
    run = Run(profile, directory)
    execute(run)
    return run


def start(source: Run, path: Path, init_from: Any, *, sections: str = "", **keys: Any) -> Run:
    """Return a run of a profile that extends the one of `source` with larger sizes.

    `sections` is TOML.
    """
    values = source.profile.model_dump()
    values["model"] |= {"hidden_size": 128, "num_hidden_layers": 3, "embedding_size": 48}
    values["tokenizer"] |= {"lowercase": False, "vocab_size": 500}
    path.mkdir(exist_ok=True)
    (path / "base.toml").write_text(toml(values), encoding="utf-8")
    own = {"extends": "base", "model_name": "domain", **keys}
    own["model"] = {"init_from": init_from, **keys.get("model", {})}
    (path / "domain.toml").write_text(f"{toml(own)}\n{sections}", encoding="utf-8")
    return Run(profiles.load(str(path / "domain.toml")), path / "run")


def of_models(directory: Path) -> dict[str, str]:
    return {network: str(directory / network) for network in NETWORKS}


KINDS: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: str(run.directory),
    "hf": lambda run: str(run.exported),
    "models": lambda run: of_models(run.exported),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_where_the_source_ended(native: Run, tmp_path: Path, kind: str) -> None:
    run = start(native, tmp_path, KINDS[kind](native), train={"steps": 3})
    execute(run)
    before, after = evaluation.evaluations(native), evaluation.evaluations(run)
    assert after[0] == before[STEPS], "the same held-out text, examples and masks"
    assert sorted(after) == [0, 3] and after[3] != after[0]
    assert run.profile.model.shape("generator") == native.profile.model.shape("generator")
    assert run.vocabulary.read_bytes() == native.vocabulary.read_bytes()
    assert run.profile.tokenizer.lowercase
    weights = load_file(checkpoint_path(run.model_dir, 0) / "generator" / "model.safetensors")
    for name, value in load_file(native.exported / "generator" / "model.safetensors").items():
        assert name == "generator_lm_head.weight" or np.array_equal(weights[name], value), name
    card = (run.exported / "discriminator" / "README.md").read_text(encoding="utf-8")
    name = {"run": "source", "hf": "hf", "models": "discriminator"}[kind]
    assert f"\nbase_model: {name}\n" in card and f"started from the weights of `{name}`" in card
    assert not (run.directory / "initial").exists()
    assert execute(Run(run.profile, run.directory)) == 0


@pytest.mark.parametrize("engine", ["native", "upstream"])
@pytest.mark.parametrize("kind", ["run", "tensorflow"])
@pytest.mark.upstream
def test_upstream_and_its_checkpoints(
    native: Run, upstream_run: Run, tmp_path: Path, engine: str, kind: str
) -> None:
    source = upstream_run.model_dir / f"model.ckpt-{STEPS}"
    init_from = str(upstream_run.directory if kind == "run" else source)
    sections = "" if kind == "run" else f'[tokenizer]\nsource = "{upstream_run.vocabulary}"\n'
    if kind == "tensorflow":
        sections += "lowercase = true\n"
    run = start(native, tmp_path, init_from, sections=sections, engine=engine, train={"steps": 2})
    execute(run, until="evaluate")
    after = evaluation.evaluations(run, engine)
    assert sorted(after) == [0, 2]
    if engine == "upstream":  # the native engine draws other masks
        before = evaluation.evaluations(upstream_run, engine)
        assert after[0] == pytest.approx(before[STEPS], rel=1e-5)


def test_slots_are_taken_along(native: Run, tmp_path: Path) -> None:
    run = start(
        native, tmp_path, str(native.directory), train=ONE_STEP, model={"init_optimizer": True}
    )
    execute(run, until="train")
    slots = load_file(checkpoint_path(run.model_dir, 0) / "generator" / "adam_v.safetensors")
    assert max(value.max() for value in slots.values()) > 0
    without = start(native, tmp_path / "other", str(native.directory), train=ONE_STEP)
    execute(without, until="train")
    assert not list(checkpoint_path(without.model_dir, 0).rglob("adam_*"))


def test_models_of_a_hub(native: Run, server: Server, tmp_path: Path, cli: Any) -> None:  # noqa: F811
    """The real client reads from a server that imitates a hub, and the commit is recorded."""
    for network in NETWORKS:
        for path in (native.exported / network).iterdir():
            if path.name != "vocab.txt":  # newer tokenizers have tokenizer.json alone
                for revision in ("main", "0" * 40):
                    server.url(f"ana/{network}/resolve/{revision}/{path.name}", path.read_bytes())
    address = f"http://127.0.0.1:{server.server_port}"
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
    values = native.profile.model_dump()
    (tmp_path / "base.toml").write_text(toml(values), encoding="utf-8")
    names = ", ".join(f'{network} = "hf://ana/{network}"' for network in NETWORKS)
    profile = f'extends = "base"\n[model]\ninit_from = {{{names}}}\n[train]\nsteps = 2\n'
    (tmp_path / "domain.toml").write_text(profile, encoding="utf-8")
    done = cli("run", "--profile", "domain.toml", "--run-dir", "r", env=hub)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "r")
    assert evaluation.evaluations(run)[0] == evaluation.evaluations(native)[STEPS]
    assert run.profile.model.init_from.discriminator == f"hf://ana/discriminator@{'0' * 40}"  # type: ignore[union-attr]
    card = (run.exported / "generator" / "README.md").read_text(encoding="utf-8")
    assert "\nbase_model: ana/generator\n" in card
    offline = {**hub, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    failed = cli("run", "--profile", "domain.toml", "--run-dir", "q", env=offline)
    assert failed.returncode == 3 and len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "q").exists()


def test_other_weights_under_the_same_name_are_refused(native: Run, tmp_path: Path) -> None:
    models = tmp_path / "hf"
    shutil.copytree(native.exported, models)
    run = start(native, tmp_path, str(models), train={"steps": 2})
    execute(run, until="train")
    file = models / "generator" / "model.safetensors"
    weights = {name: value + 1 for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    more = start(native, tmp_path, str(models), train={"steps": 3})
    with pytest.raises(UsageError, match=r"model\.init_from was"):
        execute(more, until="train")


#: What a profile sets, and the message.
CONTRADICTIONS = {
    "no source": ("", "is not there"),
    "hidden_size": ("[model]\nhidden_size = 256\n", "hidden_size = 256, but .* have 64"),
    "size": ('[model]\nsize = "base"\n', "size = 'base', but .* have 'small'"),
    "generator": ("[model]\ngenerator_hidden_size = 0.5\n", "= 0.5, but .* have 0.25"),
    "positions": ("[model]\nmax_position_embeddings = 1024\n", "= 1024, but .* have 512"),
    "casing": ("[tokenizer]\nlowercase = false\n", "lowercase = False, but .* have True"),
    "trained": ('[tokenizer]\nsource = "train"\nvocab_size = 300\n', "have a vocabulary already"),
    "tokens": ('[tokenizer]\nsource = "other.txt"\n', "token 7 of .* is '.*', but '.*' in model"),
    "fewer": ('[tokenizer]\nsource = "fewer.txt"\n', "has 200 tokens, but .* have 300"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_is_refused(native: Run, tmp_path: Path, case: str) -> None:
    sections, message = CONTRADICTIONS[case]
    tokens = vocab.read(native.vocabulary)
    (tmp_path / "fewer.txt").write_text("\n".join(tokens[:200]), encoding="utf-8")
    tokens[7], tokens[8] = tokens[8], tokens[7]
    (tmp_path / "other.txt").write_text("\n".join(tokens), encoding="utf-8")
    source = tmp_path / "nowhere" if case == "no source" else native.directory
    if sections.startswith("[model]\n"):
        key, _, value = sections.removeprefix("[model]\n").partition(" = ")
        keys = {"model": {key: json.loads(value)}}
        sections = ""
    else:
        keys = {}
    with pytest.raises(UsageError, match=message):
        start(native, tmp_path, str(source), sections=sections, **keys)
    assert not (tmp_path / "run").exists()


def damage(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of the generator in an `hf/` directory."""

    def apply(directory: Path) -> None:
        path = directory / "generator" / "model.safetensors"
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return apply


def configure(network: str, **values: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / network / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")

    return apply


def pickled(directory: Path) -> None:
    (directory / "generator" / "model.safetensors").rename(directory / "generator" / "model.bin")


LAYER = "electra.encoder.layer.0.output.dense.weight"
EMBEDDINGS = "electra.embeddings.word_embeddings.weight"

BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no generator": (lambda d: shutil.rmtree(d / "generator"), "no such generator"),
    "other vocabulary": (configure("generator", vocab_size=299), "vocab_size is 300 .*, 299"),
    "BERT": (configure("generator", architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "a classifier": (
        configure("discriminator", architectures=["ElectraForSequenceClassification"]),
        "ElectraForSequenceClassification",
    ),
    "another activation": (configure("generator", hidden_act="relu"), "hidden_act is 'relu'"),
    "damaged configuration": (configure("generator", hidden_size=[]), "config.json is damaged"),
    "incomplete": (damage(lambda t: t.pop(LAYER) is None), f"{LAYER}: missing in"),
    "not finite": (damage(lambda t: t[LAYER].fill(np.nan)), "not finite"),
    "another shape": (
        damage(lambda t: t.update({LAYER: t[LAYER].T.copy()})), r"has the shape \[64, 16\]",
    ),
    "other embeddings": (
        damage(lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS] + 1})), "has another",
    ),
    "pickle": (pickled, "no model.safetensors"),
    "truncated": (
        lambda d: (d / "generator" / "model.safetensors").write_bytes(b"\x08" + bytes(99_999)),
        "cannot be read|has no ELECTRA|layers and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_before_any_work(native: Run, tmp_path: Path, case: str) -> None:
    models = tmp_path / "hf"
    shutil.copytree(native.exported, models)
    change, message = BAD_MODELS[case]
    change(models)
    with pytest.raises(UsageError, match=message) as error:
        execute(start(native, tmp_path, of_models(models)))
    assert "\n" not in str(error.value)
    written = [path.name for path in (tmp_path / "run").glob("*")]
    assert not {"corpus", "vocab.txt", "models", "initial"} & set(written)


def test_one_model_is_refused(native: Run, tmp_path: Path) -> None:
    for init_from in (str(native.exported / "discriminator"), "hf://google/electra-small"):
        with pytest.raises(UsageError, match="a training needs two"):
            start(native, tmp_path, init_from)


def test_slots_of_a_source_without_any(native: Run, tmp_path: Path) -> None:
    run = start(native, tmp_path, str(native.exported), model={"init_optimizer": True})
    with pytest.raises(UsageError, match="init_optimizer needs a run"):
        execute(run)
    with pytest.raises(UsageError, match=r"there is no model\.init_from"):
        profiles.load("spanish-tiny", ["model.init_optimizer=true"])


def test_incomplete_tensorflow_checkpoint_is_refused(native: Run, tmp_path: Path) -> None:
    values = test_weights.variables(hidden=64, generator_hidden=16, embedding=24, vocabulary=300)
    del values["generator_predictions/output_bias"]
    test_weights.checkpoints({tmp_path / "checkpoint": values})
    sections = f'[tokenizer]\nsource = "{native.vocabulary}"\n'
    with pytest.raises(UsageError, match="generator lacks generator_predictions/output_bias"):
        start(native, tmp_path, str(tmp_path / "checkpoint"), sections=sections)


def test_generator_that_upstream_has_not(native: Run, tmp_path: Path) -> None:
    """It has 4 attention heads, not hidden size / 64. The native engine trains it."""
    models = tmp_path / "hf"
    shutil.copytree(native.exported, models)
    configure("generator", num_attention_heads=4)(models)
    run = start(native, tmp_path, str(models), train=ONE_STEP)
    execute(run, until="train")
    assert run.profile.model.shape("generator").num_attention_heads == 4
    with pytest.raises(UsageError, match=r'generator_num_attention_heads.*set engine = "native"'):
        start(native, tmp_path, str(models), engine="upstream")


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream")
def test_longer_positions_in_both_engines(corpus_text: Path, tmp_path: Path) -> None:
    """Upstream's graph has the rows of the profile, and the native engine continues its model."""
    keys = ("model.max_position_embeddings=1024", "model.num_hidden_layers=1")
    run = Run(tiny(corpus_text, *keys, steps=2), tmp_path / "run")
    execute(run, until="convert")
    for network in NETWORKS:
        weights = load_file(run.exported / network / "model.safetensors")
        assert weights["electra.embeddings.position_embeddings.weight"].shape[0] == 1024
    keys = (*keys, "model.max_seq_length=600", 'engine="native"', "model_name=long")
    other = Run(tiny(corpus_text, *keys, steps=2), tmp_path / "long")
    execute(other)
    config = json.loads((other.exported / "generator" / "config.json").read_text())
    tokenizer = json.loads((other.exported / "generator" / "tokenizer_config.json").read_text())
    assert config["max_position_embeddings"] == 1024 and tokenizer["model_max_length"] == 600
    back = Run(tiny(corpus_text, *keys, 'engine="upstream"', steps=3), tmp_path / "long")
    execute(back, until="train")
    assert (found := find_checkpoint(back)) and (found.engine, found.step) == ("upstream", 3)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"larger than model\.max_position_embeddings = 512"):
        profiles.load("spanish-tiny", ["model.max_seq_length=600"])


def test_convert_of_a_run_that_started_from_weights(native: Run, tmp_path: Path) -> None:
    run = start(native, tmp_path, str(native.directory), train={"steps": 2, "save_every": 1})
    execute(run, until="train")
    convert(run, 0, tmp_path / "out", replace=False)
    for network in NETWORKS:
        ours = load_file(tmp_path / "out" / network / "model.safetensors")
        for name, value in load_file(native.exported / network / "model.safetensors").items():
            assert name == "generator_lm_head.weight" or np.array_equal(ours[name], value)
