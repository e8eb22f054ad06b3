"""`model.init_from`: training starts from a run, from models of transformers, from TensorFlow."""

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
from electra_wrap.card import model_card
from electra_wrap.data import tokenization, vocab
from electra_wrap.engines import engine_of
from electra_wrap.errors import UsageError
from electra_wrap.pipeline import execute
from electra_wrap.profile import NETWORKS, toml
from electra_wrap.run import Run


def start(source: Run, path: Path, init_from: Any, *overrides: str) -> Run:
    """Return a run of a profile that inherits larger sizes, and lowercases."""
    values = source.profile.model_dump()
    values["model"] |= {"hidden_size": 128, "num_hidden_layers": 3, "embedding_size": 48}
    values["tokenizer"] |= {"lowercase": True, "vocab_size": 500}
    values["train"] |= {"steps": 2, "evaluate_every": None}
    path.mkdir(exist_ok=True)
    (path / "base.toml").write_text(toml(values), encoding="utf-8")
    names = init_from.items() if isinstance(init_from, dict) else [("", init_from)]
    given = [f"model.init_from{'.' * bool(name)}{name}={value}" for name, value in names]
    given = ["model_name=domain", *given, *overrides]
    return Run(profiles.load(str(path / "base.toml"), given), path / "run")


def weights(directory: Path) -> dict[str, np.ndarray]:
    """Return all weights of two models of transformers."""
    models = {network: load_file(directory / network / "model.safetensors") for network in NETWORKS}
    return {f"{network} {key}": v for network in NETWORKS for key, v in models[network].items()}


def assert_equal(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def of_models(directory: Path) -> dict[str, str]:
    return {network: str(directory / network) for network in NETWORKS}


@pytest.mark.parametrize("kind", ["run", "two models"])
def test_weights_and_all_that_follows_from_them_are_taken(
    learned: Run, tmp_path: Path, kind: str
) -> None:
    directory = shutil.copytree(learned.directory, tmp_path / "source")
    run = start(learned, tmp_path, directory if kind == "run" else of_models(directory / "hf"))
    execute(run, until="vocab")
    assert_equal(run.initial, learned.exported)
    assert run.vocabulary.read_bytes() == learned.vocabulary.read_bytes()
    for network in NETWORKS:
        assert run.profile.model.shape(network) == learned.profile.model.shape(network)
    assert not run.profile.tokenizer.lowercase
    card, name = model_card(run, "discriminator", 2), "source" if kind == "run" else "discriminator"
    assert "base_model" not in card and f"started from the weights of `{name}`" in card


def test_training_starts_where_the_source_ended_and_reads_it_once(
    learned: Run, tmp_path: Path
) -> None:
    source = shutil.copytree(learned.exported, tmp_path / "source")
    execute(run := start(learned, tmp_path, source), until="train")
    before, after = learned.model.evaluations, run.model.evaluations
    assert after[0] == before[6], "the same held-out text, examples and masks"
    assert sorted(after) == [0, 2] and after[2] != after[0] and not run.initial.exists()
    shutil.rmtree(source)
    assert execute(start(learned, tmp_path, source), until="train") == 0
    execute(run := start(learned, tmp_path, source, "train.steps=3"), until="train")
    assert sorted(run.model.evaluations) == [0, 2, 3]
    with pytest.raises(UsageError, match=r"hidden_size = 256, but .* have 64"):
        execute(start(learned, tmp_path, source, "model.hidden_size=256"), until="train")
    other = shutil.copytree(learned.exported, tmp_path / "other")
    damage(other, lambda tensors: tensors[LAYER].fill(0))
    with pytest.raises(UsageError, match=r"3 steps, and model\.init_from was '.*' and is '.*';"):
        execute(start(learned, tmp_path, other, "train.steps=4"), until="train")


@pytest.fixture(scope="session")
def longer(learned: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the native engine from a TensorFlow checkpoint with 1,024 positions."""
    path = tmp_path_factory.mktemp("longer")
    values = test_weights.variables(hidden=64, generator_hidden=16, embedding=24, vocabulary=300)
    positions = "electra/embeddings/position_embeddings"
    values[positions] = np.concatenate([values[positions], values[positions][::-1]])
    untied = test_weights.variables(hidden=64, generator_hidden=16, embedding=16, tied=False)
    test_weights.checkpoints({path / "checkpoint": values, path / "untied": untied})
    keys = (f"tokenizer.source={learned.vocabulary}", "model.max_seq_length=600")
    execute(run := start(learned, path, path / "checkpoint", *keys), until="evaluate")
    return run


def test_training_starts_from_a_tensorflow_checkpoint(longer: Run, tmp_path: Path) -> None:
    model, embeddings = longer.profile.model, "discriminator electra.embeddings"
    assert (model.max_seq_length, model.max_position_embeddings) == (600, 1024)
    assert sorted(longer.model.evaluations) == [0, 2]
    engine_of(longer).export(longer, 2, tmp_path / "hf")
    assert weights(tmp_path / "hf")[f"{embeddings}.position_embeddings.weight"].shape == (1024, 24)
    untied = longer.directory.with_name("untied")
    run = start(longer, tmp_path, untied, f"tokenizer.source={longer.vocabulary}")
    with pytest.raises(UsageError, match="has other embeddings than the discriminator"):
        execute(run, dry_run=True)


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream")
def test_each_engine_starts_from_a_run_of_the_other(longer: Run, tmp_path: Path) -> None:
    theirs = start(longer, tmp_path, longer.directory, "engine=upstream")
    execute(theirs, until="train")
    assert sorted(theirs.model.evaluations) == [0]
    engine_of(longer).export(longer, 2, tmp_path / "native")
    engine_of(theirs).export(theirs, 0, tmp_path / "upstream")
    assert_equal(tmp_path / "upstream", tmp_path / "native")
    ours = start(theirs, tmp_path / "ours", theirs.directory, "engine=native")
    execute(ours, until="vocab")
    before, after = weights(tmp_path / "upstream"), weights(ours.initial)
    changes = [np.abs(after[n] - before[n]).max() for n in before if n.endswith("weight")]
    assert before.keys() == after.keys() and 0 < min(changes) < max(changes) < 0.01


def test_models_of_a_hub(learned: Run, server: Server, tmp_path: Path, cli: Any) -> None:  # noqa: F811
    """The real client reads from a server that imitates a hub, and the commit is recorded."""
    for path in learned.exported.glob("*/*"):
        if path.name != "vocab.txt":  # newer tokenizers have tokenizer.json alone
            for revision in ("main", "0" * 40):
                name = f"ana/{path.parent.name}/resolve/{revision}/{path.name}"
                server.url(name, path.read_bytes())
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": f"{tmp_path}/hub"}
    start(learned, tmp_path, "")
    given = [f"--set=model.init_from.{network}=hf://ana/{network}" for network in NETWORKS]
    arguments = ("run", "--until=vocab", "--profile=./base.toml", *given)
    offline = {**hub, "HF_HUB_OFFLINE": "1"}
    failed = cli(*arguments, "--run-dir=q", env=offline)
    assert failed.returncode == 3 and len(failed.stderr.splitlines()) == 2, failed.stderr
    done = cli(*arguments, "--run-dir=r", env=hub)
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "r")
    assert_equal(run.initial, learned.exported)
    assert run.vocabulary.read_bytes() == learned.vocabulary.read_bytes()
    pinned = {network: f"hf://ana/{network}@{'0' * 40}" for network in NETWORKS}
    assert run.profile.model_dump()["model"]["init_from"] == pinned
    assert "\nbase_model: ana/generator\n" in model_card(run, "generator", 2)


#: What a profile sets, and the message.
CONTRADICTIONS = {
    "model.hidden_size=256": r"model\.hidden_size = 256, but .* have 64; remove the key",
    "model.size=base": "model.size = 'base', but .* have 'small'",
    "model.generator_hidden_size=0.25": "= 0.25, but .* have 0.5",
    "model.max_position_embeddings=1024": "= 1024, but .* have 512",
    "tokenizer.lowercase=true": "lowercase = True, but .* have False",
    "tokenizer={source='train',vocab_size=300}": "'train', but .* have a vocabulary already",
    "tokenizer.source=other.txt": "token 7 of .* is '.*', but '.*' in model",
    "tokenizer.source=fewer.txt": "has 200 tokens, but the vocabulary .* has 300",
}


@pytest.mark.parametrize("setting", CONTRADICTIONS)
def test_contradiction_names_both_values(
    learned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = vocab.read(learned.vocabulary)
    Path("fewer.txt").write_text("\n".join(tokens[:200]), encoding="utf-8")
    tokens[7], tokens[8] = tokens[8], tokens[7]
    Path("other.txt").write_text("\n".join(tokens), encoding="utf-8")
    refuse(start(learned, tmp_path, learned.directory, setting), CONTRADICTIONS[setting])


def refuse(run: Run, message: str) -> None:
    """Assert that a run is refused before any work, and that a plan has the same error."""
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=message) as error:
            execute(run, dry_run=dry_run)
        assert "\n" not in str(error.value)
    assert {path.name for path in run.directory.iterdir()} <= {".lock", "logs"}


def damage(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of the generator in an `hf/` directory."""
    tensors = dict(load_file(path := directory / "generator" / "model.safetensors"))
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def configure(directory: Path, **values: Any) -> None:
    path = directory / "generator" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


LAYER = "electra.encoder.layer.0.output.dense.weight"
EMBEDDINGS = "electra.embeddings.word_embeddings.weight"
HEAD, POSITIONS = "generator_lm_head.weight", "electra.embeddings.position_ids"
FILE = "generator/model.safetensors"

BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no generator": (lambda d: shutil.rmtree(d / "generator"), "there is no .*/generator; correct"),
    "other vocabulary": (lambda d: configure(d, vocab_size=299), "vocab_size is 300, but 299"),
    "activation": (lambda d: configure(d, hidden_act="relu"), "hidden_act is gelu, but relu"),
    "configuration": (lambda d: configure(d, hidden_size=[]), "has no ELECTRA for transformers"),
    "incomplete": (lambda d: damage(d, lambda t: t.pop(LAYER)), f"{LAYER}: missing in"),
    "a classifier": (
        lambda d: damage(d, lambda t: t.update(classifier=t[LAYER])), "classifier: .*foreign to",
    ),
    "not finite": (
        lambda d: damage(d, lambda t: t[LAYER].fill(np.nan)), f"{LAYER} has values .* not finite",
    ),
    "another shape": (
        lambda d: damage(d, lambda t: t.update({LAYER: t[LAYER].T.copy()})), "does not fit .*dense",
    ),
    "other embeddings": (
        lambda d: damage(d, lambda t: t[EMBEDDINGS].fill(1)), "has other embeddings than",
    ),
    "NaN embeddings": (
        lambda d: damage(d, lambda t: t[EMBEDDINGS].fill(np.nan)), "values .* not finite",
    ),
    "untied head": (
        lambda d: damage(d, lambda t: t.update({HEAD: t[EMBEDDINGS] + 1})), "output weight of its",
    ),
    "positions": (
        lambda d: damage(d, lambda t: t.update({POSITIONS: np.arange(512)[::-1].copy()})),
        "numbers positions in another order",
    ),
    "pickle": (lambda d: (d / FILE).rename(d / "model.bin"), r"no model\.safetensors; save"),
    "truncated": (lambda d: (d / FILE).write_bytes(b"\x08" + bytes(99_999)), "no model of transf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_refused_before_any_work(learned: Run, tmp_path: Path, case: str) -> None:
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    change, message = BAD_MODELS[case]
    change(models)
    refuse(start(learned, tmp_path, of_models(models)), message)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_the_tokenizer_of_the_weights_decides_on_case(learned: Run, tmp_path: Path) -> None:
    """Not the defaults of a class: PreTrainedTokenizerFast writes no do_lower_case."""
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    for lowercase, accents in ((True, None), (True, False), (False, None)):
        normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
        normalizer |= {"lowercase": lowercase, "strip_accents": accents}
        for network in NETWORKS:
            (models / network / "tokenizer_config.json").unlink(missing_ok=True)
            change = {"normalizer": normalizer}
            rewrite(models / network / "tokenizer.json", lambda v, c=change: v.update(c))
        execute(run := start(learned, tmp_path, models), dry_run=True)
        found = run.profile.tokenizer
        assert found.lowercase == lowercase
        assert found.strip_accents == (lowercase if accents is None else accents)


def test_other_division_of_text_is_refused(learned: Run, tmp_path: Path) -> None:
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    path = models / "discriminator" / "tokenizer.json"
    rewrite(path, lambda values: values["pre_tokenizer"].update(type="WhitespaceSplit"))
    run = start(learned, tmp_path, models)
    with pytest.raises(UsageError, match=r"vocab.txt divides '.*' into '.*' where upstream's has"):
        execute(run)
    assert not run.examples[0].exists()
    (models / "discriminator" / "tokenizer.json").unlink()
    config = models / "discriminator" / "tokenizer_config.json"
    rewrite(
        config,
        lambda v: v.update(tokenizer_class="BertJapaneseTokenizer", word_tokenizer_type="mecab"),
    )
    with pytest.raises(UsageError, match=r"discriminator cannot be loaded .*fugashi"):
        execute(start(learned, tmp_path / "japanese", models))


def test_tokenizer_of_a_vocabulary_must_be_that_of_the_profile(
    learned: Run, tmp_path: Path
) -> None:
    source = f"tokenizer.source={learned.exported / 'discriminator' / 'tokenizer.json'}"
    text = Path(learned.profile.corpus.sources[0])
    run = Run(tiny(text, source, "tokenizer.lowercase=true"), tmp_path / "run")
    with pytest.raises(UsageError, match=r"= True, but the tokenizer of .* has False; set tok"):
        execute(run, until="vocab")


def test_spare_rows_of_embeddings_stay(learned: Run, tmp_path: Path) -> None:
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    for network in NETWORKS:
        tensors = dict(load_file(path := models / network / "model.safetensors"))
        for name in (EMBEDDINGS, "generator_lm_head.bias"):
            if name in tensors:
                tensors[name] = np.concatenate([tensors[name], tensors[name][:8]])
        save_file(tensors, path, {"format": "pt"})
        # Published configurations often lack architectures.
        rewrite(models / network / "config.json", lambda v: v.pop("architectures"))
        rewrite(models / network / "config.json", lambda v: v.update(vocab_size=308))
    execute(run := start(learned, tmp_path, models, "train.steps=1", "train.warmup_steps=0"))
    after, config = weights(run.exported), run.exported / "generator" / "config.json"
    assert after[f"discriminator {EMBEDDINGS}"].shape[0] == 308
    assert json.loads(config.read_text())["vocab_size"] == 308
    execute(start(learned, tmp_path, models, "train.steps=2", "train.warmup_steps=0"))


def test_words_may_take_the_place_of_unused_tokens(
    learned: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    tokens = vocab.read(learned.vocabulary)
    unused = [*tokens[:298], "[unused1]", "[unused2]"]
    rules = learned.profile.tokenizer.normalization
    for network in NETWORKS:
        tokenization.write_tokenizer(models / network, unused, max_length=32, **rules)
    (own := tmp_path / "own.txt").write_text("\n".join(tokens), encoding="utf-8")
    run = start(learned, tmp_path, models, f"tokenizer.source={own}")
    execute(run, until="vocab")
    assert "new tokens in place of [unusedN]: 2\n" in capsys.readouterr().err
    assert vocab.read(run.vocabulary) == tokens


def test_one_model_is_refused(learned: Run, tmp_path: Path) -> None:
    refuse(start(learned, tmp_path, "hf://ana/electra"), "give a run, .* or two models of")


def test_generator_that_upstream_has_not(learned: Run, tmp_path: Path) -> None:
    """It has 4 attention heads, not hidden size / 64. The native engine trains it."""
    models = shutil.copytree(learned.exported, tmp_path / "hf")
    configure(models, num_attention_heads=4)
    run = start(learned, tmp_path, models)
    execute(run, until="vocab")
    assert run.profile.model.shape("generator").num_attention_heads == 4
    with pytest.raises(UsageError, match=r'upstream does not support it; set engine = "native"'):
        execute(start(learned, tmp_path / "theirs", models, "engine=upstream"))
