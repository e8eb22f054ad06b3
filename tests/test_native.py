"""The native engine: equal to upstream's graph, reproducible, and resumable."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_weights
from conftest import SPANISH, TESTS, child, tiny
from safetensors.numpy import load_file

from electra_wrap import engines, events, metrics, subprocesses, weights
from electra_wrap.data import tfrecords, vocab
from electra_wrap.engine import Checkpoint
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError
from electra_wrap.native import engine, examples
from electra_wrap.native.batches import Batches, Masking
from electra_wrap.native.checkpoints import checkpoint_path, checkpoint_steps
from electra_wrap.native.examples import Store
from electra_wrap.pipeline.execute import execute
from electra_wrap.profile import NETWORKS, Model
from electra_wrap.run import Run
from electra_wrap.upstream import engine as upstream_engine
from electra_wrap.upstream import records as upstream_records
from electra_wrap.upstream.hparams import hparams


def native(corpus: Path, directory: Path, *overrides: str, **options: Any) -> Run:
    """Return a run of the native engine that has its examples."""
    run = Run(tiny(corpus, 'engine="native"', *overrides, **options), directory)
    execute(run, until="examples")
    return run


def make_vocabulary(path: Path, *texts: str) -> list[str]:
    """Write a vocabulary of the characters of the texts, at the start and inside of words."""
    characters = sorted(set("".join(texts)) - {" ", "\n"})
    tokens = [*vocab.SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return tokens


#: A shape with projections in both networks.
SHAPE = {"hidden": 64, "generator_hidden": 32, "embedding": 24}
START, STEPS = 3, 20


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with examples and a model at step 3, with nonzero slots, made by upstream.

    The directory `theirs` beside the model's has upstream's checkpoint.
    """
    directory = tmp_path_factory.mktemp("continued")
    tokens = make_vocabulary(directory / "vocab.txt", *SPANISH)
    words = " ".join(SPANISH).split()
    # Many documents are shorter than an example.
    documents = (" ".join(words[i % 50 : i % 50 + 1 + i % 9]) for i in range(400))
    (directory / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    run = native(
        directory / "text.txt",
        directory / "run",
        f"tokenizer.source={directory / 'vocab.txt'}",
        f"model.embedding_size={SHAPE['embedding']}",
        "train.warmup_steps=8",
        "train.learning_rate=0.01",
        FLOAT32,
        steps=START + STEPS,
    )
    values = test_weights.variables(**SHAPE, vocabulary=len(tokens))
    random = np.random.default_rng(1)
    for name in [name for name in values if name != "global_step" and "/adam_" not in name]:
        shape = values[name].shape
        values[f"{name}/adam_m"] = random.normal(0, 0.01, shape).astype(np.float32)
        values[f"{name}/adam_v"] = random.uniform(0, 0.001, shape).astype(np.float32)
    run.model_dir.parent.mkdir()
    theirs = run.model_dir.with_name("theirs")
    test_weights.checkpoints({theirs: values})
    test_weights.to_transformers(theirs, checkpoint_path(run.model_dir, START), slots=True)
    return run


#: What upstream's graph gave for those steps: samples, losses, and norms of gradients, weights and
#: slots.
REFERENCE = TESTS / "reference.json"
EXPECTED = json.loads(REFERENCE.read_text(encoding="utf-8"))

LOSSES, STATE = ("loss", "generator", "discriminator"), ("model", *weights.SLOTS)

#: The softmax does not depend on a key's bias: its gradient is rounding.
IGNORED = "attention.self.key.bias"


def parameters(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield network, TensorFlow's and transformers' name of each parameter with a gradient."""
    for network in NETWORKS:
        shape = run.profile.model.shape(network)
        projection = shape.embedding_size != shape.hidden_size
        mapping = weights.mapping(network, shape.num_hidden_layers, projection=projection)
        for variable, pytorch in mapping.items():
            if not pytorch.endswith(IGNORED):
                yield network, variable, pytorch


def end_of_training(
    run: Run, losses: np.ndarray, gradients: dict[str, np.ndarray], end: Path
) -> dict[str, np.ndarray]:
    """Return losses, the first step's gradients, and the last weights and slots, by name."""
    values = {f"loss {name}": losses[:, i] for i, name in enumerate(LOSSES)}
    for network, _, name in parameters(run):
        values[f"gradient {network}.{name}"] = gradients[f"{network}.{name}"]
    for network, file in itertools.product(NETWORKS, STATE):
        tensors = load_file(end / network / f"{file}.safetensors")
        values |= {
            f"{file} {network}.{name}": tensor
            for name, tensor in tensors.items()
            if not name.endswith(IGNORED)
        }
    return values


def train_native(run: Run, out: Path) -> dict[str, np.ndarray]:
    """Train the native engine with the recorded samples, if there are any; return its results."""
    np.save(out / "samples.npy", np.array(EXPECTED["samples"]))
    recording = os.environ.get("ELECTRA_WRAP_RECORD")
    child("native_steps.py", run.directory, out, *([] if recording else [out / "samples.npy"]))
    steps = np.load(out / "steps.npz")
    losses = np.stack([steps[f"{name}_loss"] for name in LOSSES], 1)
    return end_of_training(run, losses, dict(np.load(out / "gradients.npz")), out / "end")


def train_upstream(run: Run, upstream: Path, out: Path) -> dict[str, np.ndarray]:
    """Train upstream on the batches, masks and samples of `train_native`; return its results."""
    hparams_file, theirs = out / "hparams.json", out / "theirs"
    hparams_file.write_text(json.dumps(hparams(run.profile, run.vocab_size)), encoding="utf-8")
    theirs.mkdir()
    arguments = (hparams_file, out / "steps.npz", theirs)
    child("upstream_steps.py", upstream, run.directory, "theirs", *arguments)
    test_weights.to_transformers(run.model_dir.with_name("theirs"), theirs / "end", slots=True)
    found = np.load(theirs / "gradients.npz")
    gradients = {
        f"{network}.{name}": found[v].T if weights.is_transposed(v) else found[v]
        for network, v, name in parameters(run)
    }
    losses = np.load(theirs / "losses.npz")["losses"]
    return end_of_training(run, losses, gradients, theirs / "end")


def summary(run: Run, values: dict[str, np.ndarray], samples: np.ndarray) -> dict[str, Any]:
    """Summarize a training in few numbers."""
    norms = {}
    for name in (f"{network}.{name}" for network, _, name in parameters(run)):
        state = [values[f"{file} {name}"] for file in STATE]
        tensors = [values[f"gradient {name}"], *state, *(tensor[:1] for tensor in state)]
        norms[name] = [float(np.linalg.norm(tensor)) for tensor in tensors]
    losses = np.stack([values[f"loss {name}"] for name in LOSSES], 1)
    return {"samples": samples.tolist(), "losses": losses.tolist(), "norms": norms}


def assert_as_recorded(run: Run, values: dict[str, np.ndarray], samples: np.ndarray) -> None:
    found = summary(run, values, samples)
    assert found["samples"] == EXPECTED["samples"]
    assert np.array(found["losses"]) == pytest.approx(np.array(EXPECTED["losses"]), rel=1e-5)
    assert found["norms"].keys() == EXPECTED["norms"].keys()
    for name, norms in EXPECTED["norms"].items():
        assert found["norms"][name] == pytest.approx(norms, rel=2e-4), name


@pytest.mark.upstream
def test_twenty_steps_equal_upstreams_graph(upstream: Path, continued: Run, tmp_path: Path) -> None:
    """From the same checkpoint: losses, gradients, weights and slots."""
    ours = train_native(continued, tmp_path)
    theirs = train_upstream(continued, upstream, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # the largest difference, as a share of the largest value
        assert np.abs(ours[name] - value).max() < 3e-5 * np.abs(value).max(), name
    steps = np.load(tmp_path / "steps.npz")
    positions = steps["positions"].reshape(-1, 4)
    assert any(len(set(row[row > 0])) < (row > 0).sum() for row in positions), "some repeat"
    assert (positions == 0).any(), "some examples have fewer"
    assert (steps["sampled"] == 0).any(), "[PAD] is sampled"
    if os.environ.get("ELECTRA_WRAP_RECORD"):
        recorded = summary(continued, theirs, steps["sampled"])
        REFERENCE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    else:
        assert_as_recorded(continued, theirs, steps["sampled"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_twenty_steps_equal_the_recorded_ones(
    continued: Run, tmp_path: Path, precision: str
) -> None:
    """The same without upstream. `ELECTRA_WRAP_RECORD=1 tox -e upstream` records them again."""
    ignored = shutil.ignore_patterns(f"step-{START + STEPS}")
    shutil.copytree(continued.directory, tmp_path / "run", ignore=ignored)
    run = Run(continued.profile, tmp_path / "run")
    change_settings(run, precision=precision)
    values = train_native(run, tmp_path)
    sampled = np.load(tmp_path / "steps.npz")["sampled"]
    if precision == "float32":
        assert_as_recorded(continued, values, sampled)
    else:
        found = summary(continued, values, sampled)
        difference = np.abs(np.array(found["losses"]) / np.array(EXPECTED["losses"]) - 1)
        # Rounding differs between processors: at most 1.6% on one with avx512_bf16, 3.7% with AMX.
        assert 0 < difference.mean() < 0.01 and difference.max() < 0.06


@pytest.mark.parametrize("text", ["many documents", "no document boundary", "odd"])
@pytest.mark.upstream
def test_examples_equal_those_of_the_script(
    upstream: Path, corpus_text: Path, tmp_path: Path, text: str
) -> None:
    """In the same order: the store made of the script's records has the same bytes."""
    source = corpus_text
    has_documents = json.dumps(text != "no document boundary")
    overrides = [f"corpus.blank_lines_separate_documents={has_documents}", "train.seed=7"]
    if text == "odd":  # lines without tokens, with more than an example has, with special tokens
        lines = ["\u200b\u200d", "una [MASK] y [SEP] [PAD]", "##s", "x " * 100, "", "", "\u200b"]
        lines += ["[UNK]", "ñandú"]
        source = tmp_path / "odd.txt"
        text = "\n".join([*lines * 30, *SPANISH, *reversed(lines)])
        source.write_text(text, encoding="utf-8")
    run = native(source, tmp_path / "run", *overrides)
    execute(Run(tiny(source, *overrides), run.directory), until="examples")
    for name, records in zip(engine.EXAMPLES, upstream_engine.EXAMPLES, strict=True):
        ours, imported = run.directory / name, tmp_path / name
        if name == "heldout_examples" and not len(Store(ours)):
            continue
        number = engine.import_records(run, run.directory / records, imported)
        assert number == len(Store(ours)) > 0
        for file in ("tokens.bin", "index.bin", "store.json"):
            assert (imported / file).read_bytes() == (ours / file).read_bytes(), file


def write_records(directory: Path, run: Run, segments: list[tuple[list[int], list[int]]]) -> None:
    """Write a file of records with these first and second segments."""
    tokens = {token: number for number, token in enumerate(vocab.read(run.vocabulary))}
    directory.mkdir()
    writer = tfrecords.RecordWriter(str(directory / "pretrain_data.tfrecord-0-of-1"))
    for first, second in segments:
        example = upstream_records.Example(tokens, first, second, 32)
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()


def test_records_are_imported_or_refused(corpus_text: Path, tmp_path: Path) -> None:
    run = native(corpus_text, tmp_path / "run")
    cls, sep = (vocab.read(run.vocabulary).index(token) for token in ("[CLS]", "[SEP]"))
    write_records(tmp_path / "good", run, [([7, 8], [9]), ([10], [])])
    assert engine.import_records(run, tmp_path / "good", tmp_path / "store") == 2
    ids, lengths = Store(tmp_path / "store").read(np.arange(2), 8)
    assert ids.tolist() == [[cls, 7, 8, sep, 9, sep, 0, 0], [cls, 10, sep, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [4, 3]
    write_records(tmp_path / "empty", run, [([], [])])
    with pytest.raises(UsageError, match="without a token"):
        engine.import_records(run, tmp_path / "empty", tmp_path / "refused")
    write_records(tmp_path / "large", run, [([run.vocab_size], [])])
    with pytest.raises(UsageError, match=f"up to id {run.vocab_size}.*correct the profile"):
        engine.import_records(run, tmp_path / "large", tmp_path / "refused")


@pytest.mark.upstream
def test_training_uses_existing_records(upstream: Path, corpus_text: Path, tmp_path: Path) -> None:
    built = Run(tiny(corpus_text, "corpus.held_out=0"), tmp_path / "built")
    execute(built, until="examples")
    records = built.directory / "pretrain_tfrecords"
    vocabulary = f"tokenizer.source={built.vocabulary}"
    run = native(records, tmp_path / "run", vocabulary)
    text = native(corpus_text, tmp_path / "text", vocabulary, "corpus.held_out=0")
    found = []
    for directory in (run.directory, text.directory):
        store = Store(directory / "examples")
        ids, lengths = store.read(np.arange(len(store)), 32)
        found.append(sorted(np.column_stack([ids, lengths]).tolist()))
    assert found[0] == found[1] and len(found[0]) > 100
    theirs = Run(tiny(records, vocabulary), tmp_path / "theirs")
    execute(theirs, until="examples")
    assert theirs.digest(theirs.directory / "pretrain_tfrecords") == built.digest(records)
    with pytest.raises(UsageError, match="has examples of 32 tokens"):
        native(records, tmp_path / "other", vocabulary, "model.max_seq_length=16")


@pytest.mark.upstream
def test_run_changes_engines_during_training(
    upstream: Path, corpus_text: Path, tmp_path: Path
) -> None:
    """Upstream to native to upstream: weights and Adam's slots are handed over bit for bit."""

    def load(engine_name: str, steps: int) -> Run:
        overrides = (f'engine="{engine_name}"', "train.learning_rate=0.01")
        return Run(tiny(corpus_text, *overrides, steps=steps), tmp_path / "run")

    def train(engine_name: str, steps: int) -> Run:
        run = load(engine_name, steps)
        execute(run, until="train")
        return run

    def variables(model_dir: Path) -> dict[str, np.ndarray]:
        child("read_checkpoint.py", model_dir)
        return dict(np.load(model_dir / "values.npz"))

    train("upstream", 4)
    run = load("native", 4)
    before = variables(run.model_dir)
    theirs, ours = (Checkpoint(name, 4, run.model_dir) for name in ("upstream", "native"))
    upstream_engine.export(run, theirs, tmp_path / "out", optimizer=True)
    engine.import_checkpoint(run, tmp_path / "out", 4)
    engine.export(run, ours, tmp_path / "back", optimizer=True)
    again = Run(run.profile.model_copy(update={"model_name": "again"}), run.directory)
    again.model_dir.mkdir()
    upstream_engine.import_checkpoint(again, tmp_path / "back", 4)
    after = variables(again.model_dir)
    assert set(before) == set(after)
    assert all((before[name] == after[name]).all() for name in before)
    assert any(np.abs(v).max() > 0 for name, v in after.items() if name.endswith("adam_v"))
    shutil.rmtree(checkpoint_path(run.model_dir, 4))

    assert engines.find_checkpoint(train("native", 7)) == Checkpoint("native", 7, run.model_dir)
    run = train("upstream", 9)
    assert engines.find_checkpoint(run) == Checkpoint("upstream", 9, run.model_dir)
    results = run.results(run.train_record)
    assert (results["engine"], results["device"]) == ("upstream", "cpu")
    assert (results["from_step"], results["step"]) == (7, 9)
    end = variables(run.model_dir)
    assert end["global_step"] == 9 and set(end) == set(before)
    execute(run, until="check")
    names = [path.name for path in run.model_dir.iterdir()]
    assert not [name for name in names if "partial" in name or "exported" in name]


@pytest.mark.upstream
@pytest.mark.parametrize("probability", [0.15, 0.25])
def test_masks_equal_upstreams(upstream: Path, tmp_path: Path, probability: float) -> None:
    """With the same draws: candidates, positions, labels and masked ids, at every length."""
    tokens = make_vocabulary(tmp_path / "vocab.txt", "abc")
    random = np.random.default_rng(0)
    length = 256
    sizes = np.concatenate([np.arange(3, length + 1)] * 2)
    ids = random.integers(0, len(tokens), (len(sizes), length))
    ids *= np.arange(length) < sizes[:, None]
    ids[:, 0] = tokens.index("[CLS]")
    model = Model(mask_prob=probability, max_seq_length=length)
    masking = Masking(model, tokens)
    draws, coins = random.random((2, len(sizes), model.max_predictions_per_seq))
    coins = coins.astype(np.float32)
    ids[:, 1] = tokens.index("a")  # a candidate in each
    positions, found_weights = masking.choose(ids, sizes, draws)
    np.savez(tmp_path / "in.npz", ids=ids, sizes=sizes, positions=positions, coins=coins)
    files = [tmp_path / name for name in ("vocab.txt", "in.npz", "out.npz")]
    child("upstream_masks.py", upstream, *files, str(probability))
    theirs = np.load(tmp_path / "out.npz")
    assert (theirs["weights"] == found_weights).all()
    assert (theirs["positions"] == positions).all()
    assert (theirs["masked"] == masking.apply(ids, positions, coins)).all()
    labels = np.take_along_axis(ids, positions, 1) * (found_weights > 0)
    assert (theirs["labels"] == labels).all()
    # The candidates are upstream's, and all are equally likely.
    for row in (0, 7, 100, len(sizes) - 1):
        candidates, many = np.isfinite(theirs["candidates"][row]), np.full(2000, row)
        draws = random.random((2000, model.max_predictions_per_seq))
        chosen, counted = masking.choose(ids[many], sizes[many], draws)
        times = np.bincount(chosen[counted > 0], minlength=length)
        assert ((times > 0) == candidates).all()
        expected, freedom = times.sum() / candidates.sum(), candidates.sum() - 1
        chi_square = ((times[candidates] - expected) ** 2 / expected).sum()
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.fixture(scope="module")
def parts() -> Any:
    return json.loads(child("native_parts.py"))


def test_learning_rates_equal_upstreams(parts: Any) -> None:
    expected = [0, 0.9 / 4, 0.8 / 2, 0.7 * 3 / 4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
    assert parts["rates"] == pytest.approx(expected)


def test_initial_values_have_tensorflows_distributions(parts: Any) -> None:
    kinds = set()
    for name, (deviation, largest, shape) in parts["initial"].items():
        if name.endswith("LayerNorm.weight"):
            assert (deviation, largest) == (0, 1)
        elif name.endswith("bias"):
            assert largest == 0
        elif "embeddings_project" in name or "dense_prediction" in name:
            bound = np.sqrt(6 / sum(shape))
            assert 0.9 * bound < largest <= bound
            assert deviation == pytest.approx(bound / np.sqrt(3), rel=0.15)
        else:  # truncated at two deviations, a normal distribution has 0.8796 of its deviation
            assert 0.037 < largest <= 0.04 and deviation == pytest.approx(0.8796 * 0.02, rel=0.05)
            kinds.add(name.split(".")[-2])
    embeddings = {"word_embeddings", "position_embeddings", "token_type_embeddings"}
    assert {*embeddings, "query", "dense"} <= kinds


def test_masked_lm_equals_cross_entropy(parts: Any) -> None:
    assert parts["loss"][0] == pytest.approx(parts["loss"][1], rel=1e-5)
    assert max(parts["gradients"]) < 1e-5


def test_samples_have_the_generators_distribution(parts: Any) -> None:
    """With evenly spaced draws, each token is drawn in proportion to its probability, give or take
    one."""
    times, expected = np.array(parts["times"]), np.array(parts["expected"])
    assert np.abs(times - expected).max() <= 1.1 and not times[[0, 7, -1]].any()
    assert parts["ends"][0] == parts["ends"][1] == 1, "never a token of probability 0"
    assert parts["ends"][3] == 1298


def test_dropout_is_independent_and_has_its_rate(parts: Any) -> None:
    """Of 2**20 values: within five standard deviations, which are 0.0003 and 0.001."""
    found = parts["dropout"]
    rate = 6554 / 65536
    assert found["rates"] == pytest.approx([rate] * 4, abs=0.0015)
    assert len(set(found["rates"])) == 4
    assert found["kept"] == pytest.approx([0, 1 / (1 - rate)], rel=1e-6)
    assert found["bfloat16"] == [pytest.approx(rate, abs=0.0015), pytest.approx(1.109375)]
    assert np.abs(found["correlations"]).max() < 0.005
    assert found["restored"], "a checkpoint has the state of PyTorch's generator"


#: Scalars by step.
Steps = dict[int, dict[str, float]]


def start(run: Run, *argv: str) -> subprocess.Popen[str]:
    """Start a trainer; by default, as `run` does."""
    argv = argv or (sys.executable, "-m", "electra_wrap.native.train", str(run.directory))
    environment = subprocesses.child_environment({"OMP_NUM_THREADS": "2"})
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)


def parse_steps(output: str, kind: type = events.Step) -> Steps:
    """Return the scalars in a trainer's output, except those that depend on the machine."""
    found: Any = map(events.parse, output.splitlines())
    return {
        event.step: {name: v for name, v in event.scalars.items() if "memory" not in name}
        for event in found
        if isinstance(event, kind)
    }


def parse_evaluation(output: str) -> dict[str, float]:
    """Return the metrics of the one evaluation in a child's output."""
    (scalars,) = parse_steps(output, events.Evaluation).values()
    return scalars


def finish(run: Run, *argv: str) -> Steps:
    """Train to the end; return the scalars of each step."""
    trainer = start(run, *argv)
    try:
        output, _ = trainer.communicate(timeout=300)
    finally:
        trainer.kill()  # processes that wait for each other would do so for ever
    assert trainer.returncode == 0, output
    return parse_steps(output)


def change_settings(run: Run, **train: Any) -> None:
    """Change keys of the section `train` in a run directory's profile."""
    profile = run.profile.model_dump()
    profile["train"] |= train
    (run.directory / "profile.json").write_text(json.dumps(profile), encoding="utf-8")


NO_DROPOUT = str(TESTS / "children" / "native_no_dropout.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FLOAT32 = 'train.precision="float32"'
TWELVE = (
    FLOAT32,
    "train.save_every=4",
    "train.keep=0",
    "train.batch_size=8",
    "model.num_hidden_layers=1",
)


@pytest.fixture(scope="module")
def uninterrupted(corpus_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Steps]:
    run = native(corpus_text, tmp_path_factory.mktemp("uninterrupted") / "run", *TWELVE, steps=12)
    return run, finish(run)


def copy(run: Run, directory: Path) -> Run:
    """Return another run with the same data, and no model."""
    shutil.copytree(run.directory, directory, ignore=shutil.ignore_patterns("models"))
    return Run(run.profile, directory)


@pytest.fixture(scope="module")
def in_bfloat16(
    uninterrupted: tuple[Run, Steps], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Steps]:
    run = copy(uninterrupted[0], tmp_path_factory.mktemp("bfloat16") / "run")
    change_settings(run, precision="bfloat16")
    run = Run.open(run.directory)
    return run, finish(run)


@pytest.mark.parametrize("precision", ["uninterrupted", "in_bfloat16"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resumed_training_equals_uninterrupted_training(
    request: pytest.FixtureRequest, tmp_path: Path, number: signal.Signals, precision: str
) -> None:
    """Bit for bit, with dropout: SIGKILL loses the steps since a checkpoint, SIGTERM saves one."""
    uninterrupted: tuple[Run, Steps] = request.getfixturevalue(precision)
    run = copy(uninterrupted[0], tmp_path / "run")
    change_settings(run, save_every=2)
    trainer = start(run)
    assert trainer.stdout
    output = ""
    while '"step": 7,' not in output:  # saving step 6 waited until step 4 was written
        output += trainer.stdout.readline()
    trainer.send_signal(number)
    output += trainer.communicate()[0]
    stopped = number == signal.SIGTERM
    assert trainer.returncode == (subprocesses.INTERRUPTED if stopped else -number)
    saved = checkpoint_steps(run.model_dir)[-1]
    assert saved == max(parse_steps(output)) if stopped else saved >= 4
    for partial in run.model_dir.glob("*.partial"):
        shutil.rmtree(partial)
    rest = finish(run)
    assert min(rest) == saved + 1
    assert parse_steps(output) | rest == uninterrupted[1] and len(uninterrupted[1]) == 12
    ours, theirs = (
        checkpoint_path(each.model_dir, 12) / "model.safetensors"
        for each in (run, uninterrupted[0])
    )
    assert ours.read_bytes() == theirs.read_bytes()


SLOW_SAVING = str(TESTS / "children" / "native_slow_saving.py")


def test_training_goes_on_while_a_checkpoint_is_written(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    """What is written is the state at its step, and a kill leaves the checkpoint before."""
    run = copy(uninterrupted[0], tmp_path / "run")
    trainer = start(run, sys.executable, SLOW_SAVING, str(run.directory), "3")
    assert trainer.stdout
    output = ""
    while '"step": 9,' not in output:
        output += trainer.stdout.readline()
    trainer.kill()
    output += trainer.communicate()[0]
    assert max(parse_steps(output.partition("saved")[0])) > 4
    assert checkpoint_steps(run.model_dir) == [4]
    shutil.rmtree(run.model_dir / "step-8.partial")
    rest = finish(run)
    assert {step: uninterrupted[1][step] for step in rest} == rest and min(rest) == 5


def test_error_while_a_checkpoint_is_written_ends_training(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    run = copy(uninterrupted[0], tmp_path / "run")
    trainer = start(run, sys.executable, SLOW_SAVING, str(run.directory), "-1")
    output = trainer.communicate()[0]
    failures = [e for e in map(events.parse, output.splitlines()) if isinstance(e, events.Failure)]
    assert trainer.returncode == 1 and "No space left on device" in failures[0].message
    assert checkpoint_steps(run.model_dir) == []


def test_random_states_are_restored_or_the_loss_is_reported(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    run = copy(uninterrupted[0], tmp_path / "run")
    former = checkpoint_path(uninterrupted[0].model_dir, 8)
    checkpoint = checkpoint_path(run.model_dir, 8)
    shutil.copytree(former, checkpoint)
    (checkpoint / "random_states_0.pt").write_bytes(b"damaged")
    trainer = start(run)
    assert "random_states_0.pt cannot be read" in trainer.communicate()[0]
    assert trainer.returncode == 1
    (checkpoint / "random_states_0.pt").unlink()
    trainer = start(run)
    output = trainer.communicate()[0]
    assert trainer.returncode == 0 and "random_states_0.pt is missing: the former" in output
    assert parse_steps(output)[9] != uninterrupted[1][9]


@pytest.mark.parametrize(
    ("program", "header", "problem"),
    [("cc", "Python.h", None), ("", "Python.h", "no C compiler"), ("clang", "", "Python.h is")],
)
def test_lack_of_a_compiler_or_of_headers_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, header: str, problem: str | None
) -> None:
    for name in filter(None, (program, header)):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine.sysconfig, "get_path", lambda name: str(tmp_path))
    found = engine.find_compiler_problem()
    assert found is None if problem is None else problem in str(found)


def test_evaluation_does_not_change_training(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    """Bit for bit, with dropout. And two processes evaluate as one does."""
    run = copy(uninterrupted[0], tmp_path / "run")
    change_settings(run, evaluate_every=7, keep=1)
    output = start(run).communicate(timeout=300)[0]
    assert parse_steps(output) == uninterrupted[1]
    assert checkpoint_steps(run.model_dir) == [7, 12], "the latest evaluated checkpoint is kept"
    checkpoint = str(checkpoint_path(run.model_dir, 7))
    argv = ["-m", "electra_wrap.native.evaluate", str(run.directory), checkpoint]
    two_processes = start(run, *TORCHRUN, *argv).communicate(timeout=300)[0]
    evaluation = parse_steps(output, events.Evaluation)[7]
    assert parse_evaluation(two_processes) == pytest.approx(evaluation, rel=1e-5)


def test_other_precision_is_logged(
    uninterrupted: tuple[Run, Steps], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(uninterrupted[0], tmp_path / "run")
    for steps, precision in ((2, "bfloat16"), (3, "float32"), (4, "float32")):
        change_settings(run, steps=steps, precision=precision)
        execute(Run.open(run.directory), until="train")
    output = "".join(capsys.readouterr())
    assert output.count("continues in") == 1
    assert "continues in float32; the steps before were in bfloat16" in output


def test_training_goes_on_without_held_out_examples(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    run = copy(uninterrupted[0], tmp_path / "run")
    change_settings(run, evaluate_every=1, steps=2)
    shutil.rmtree(run.directory / "heldout_examples")
    examples.write(run.directory / "heldout_examples", [], run.vocab_size)
    assert len(Store(run.directory / "heldout_examples")) == 0
    assert set(finish(run)) == {1, 2}


@pytest.mark.upstream
def test_evaluation_equals_upstreams(
    upstream: Path, uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    """Of the same checkpoint, held-out examples, masks and samples, by upstream's do_eval."""
    run = uninterrupted[0]
    batches = tmp_path / "batches.npz"
    checkpoint = checkpoint_path(run.model_dir, 12)
    output = child("native_evaluation.py", run.directory, checkpoint, batches)
    ours = parse_evaluation(output)
    engine.export(run, Checkpoint("native", 12, run.model_dir), tmp_path / "exported")
    (tmp_path / "models").mkdir()
    theirs = tmp_path / "models" / "theirs"
    test_weights.to_tensorflow(tmp_path / "exported", theirs, step=12)
    shutil.copy(run.vocabulary, tmp_path)
    settings = tmp_path / "hparams.json"
    settings.write_text(json.dumps(hparams(run.profile, run.vocab_size)), encoding="utf-8")
    arguments = (settings, batches, theirs / "model.ckpt-12")
    output = child("upstream_evaluation.py", upstream, tmp_path, "theirs", *arguments)
    values = json.loads(output.splitlines()[-1])
    assert {name: values[their_name] for their_name, name in metrics.UPSTREAM.items()} == {
        name: pytest.approx(ours[name], rel=1e-5, abs=1e-6) for name in metrics.UPSTREAM.values()
    }
    assert 0.3 < ours["discriminator/auc"] < 1 and len(np.load(batches)["ids"]) > 1


@pytest.mark.slow
def test_processes_and_micro_batches_do_not_change_the_loss(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    """Also in the middle: from one process and one micro-batch to two of each."""
    one_process = [sys.executable]
    found: dict[str, Steps] = {}
    for name, micro_batches, launcher in (
        ("one", 1, one_process),
        ("micro", 2, one_process),
        ("two", 2, TORCHRUN),
    ):
        run = copy(uninterrupted[0], tmp_path / name)
        if name == "two":  # continues after an odd number of steps
            checkpoint = tmp_path / "one" / "models" / run.profile.model_name / "step-3"
            shutil.copytree(checkpoint, run.model_dir / "step-3")
        change_settings(run, micro_batches=micro_batches, save_every=3)
        found[name] = finish(run, *launcher, NO_DROPOUT, str(run.directory))
    assert len(found["micro"]) == 12 and len(found["two"]) == 9
    for name in ("micro", "two"):
        for step, scalars in found[name].items():
            assert scalars == pytest.approx(found["one"][step], rel=1e-5), (name, step)
    assert found["one"] != uninterrupted[1], "dropout was on there"


def test_loss_that_is_not_finite_is_reported(corpus_text: Path, tmp_path: Path) -> None:
    run = native(corpus_text, tmp_path / "run", "train.learning_rate=1e30", *TWELVE[1:])
    expected = r"diverged at step \d: the loss is .*finite.*; the whole log is"
    with pytest.raises(StageFailed, match=expected):
        execute(run, until="train")
    assert checkpoint_steps(run.model_dir) == []


def test_batch_that_cannot_be_divided_is_refused(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    run = copy(uninterrupted[0], tmp_path / "run")
    run.launch = " ".join([*TORCHRUN[:-1], "--nproc-per-node=3"])
    with pytest.raises(UsageError, match=r"^train.batch_size = 8 is not divisible by 3 processes"):
        engine.train(run, [], print)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ('torchrun "', "No closing quotation; quote it"),
        ("tortchrun --nnodes 2", "there is no such command; give another"),
        (" ", "there is no such command; give another"),
    ],
)
def test_launch_is_checked_before_any_work(
    corpus_text: Path, tmp_path: Path, launch: str, message: str
) -> None:
    run = Run(tiny(corpus_text, 'engine="native"'), tmp_path / "run", launch=launch)
    with pytest.raises(UsageError, match=f"^--launch .*{message}"):
        execute(run)
    assert not run.corpus.exists()


def test_launch_finds_a_program_beside_python(
    uninterrupted: tuple[Run, Steps], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a virtual environment that is not activated."""
    environment = tmp_path / "environment"
    environment.mkdir()
    launcher = environment / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$0 $*"\nexec {sys.executable} "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(environment / "python"))
    run = copy(uninterrupted[0], tmp_path / "run")
    change_settings(run, steps=2)
    run.launch = "launcher -u"
    engine.prepare(run)
    engine.train(run, [], print)
    assert f"{launcher} -u -m electra_wrap.native.train" in run.log_file("train").read_text()
    assert checkpoint_steps(run.model_dir) == [2]


def test_model_files_are_readable_as_the_umask_allows(
    uninterrupted: tuple[Run, Steps], tmp_path: Path
) -> None:
    """Some libraries write files that only their owner can read."""
    mask = os.umask(0o022)
    os.umask(mask)
    run = copy(uninterrupted[0], tmp_path / "run")
    change_settings(run, steps=2)
    run = Run.open(run.directory)
    execute(run, until="convert")
    checkpoint = checkpoint_path(run.model_dir, 2)
    written = [*checkpoint.rglob("*"), *run.exported.rglob("*")]
    assert sum(file.name == "model.safetensors" for file in written) == 3
    for file in written:
        if file.is_file():
            assert oct(file.stat().st_mode & 0o777) == oct(0o666 & ~mask), file


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_has_the_same_loss(uninterrupted: tuple[Run, Steps], tmp_path: Path) -> None:
    """In one graph, as CUDA graphs need it; in two processes, and nearly so in bfloat16."""
    found = []
    ways: list[tuple[list[str], dict[str, Any]]] = [
        ([sys.executable], {"compile": False}),
        (TORCHRUN, {"compile": True}),
        ([sys.executable], {"compile": True, "precision": "bfloat16"}),
    ]
    for number, (launcher, settings) in enumerate(ways):
        run = copy(uninterrupted[0], tmp_path / str(number))
        change_settings(run, steps=3, **settings)
        found.append(finish(run, *launcher, NO_DROPOUT, str(run.directory)))
    for step, scalars in found[0].items():
        assert found[1][step] == pytest.approx(scalars, rel=1e-5)
        loss, rounded = scalars["loss/total"], found[2][step]["loss/total"]
        assert rounded == pytest.approx(loss, rel=0.01) and rounded != loss


def test_store_returns_what_was_written(uninterrupted: tuple[Run, Steps]) -> None:
    run = uninterrupted[0]
    tokens = vocab.read(run.vocabulary)
    encode = vocab.line_encoder(tokens, **run.profile.tokenizer.normalization)
    built = [
        example
        for number, shard in enumerate(sorted(run.corpus.iterdir()))
        for example in examples.build(run.profile, tokens, encode, shard, number)
    ]
    store = Store(run.directory / "examples")
    ids, lengths = store.read(np.arange(len(store)), 32)
    assert ids.tolist() == [[*e.ids, *[0] * (32 - len(e.ids))] for e in built]
    assert lengths.tolist() == [example.first_length for example in built]
    assert store.sizes(np.arange(len(store))).tolist() == [len(example.ids) for example in built]


def batches_of(store: Path, batch_size: int, **options: int) -> Batches:
    model = Model(max_seq_length=32)
    tokens = list(vocab.SPECIAL_TOKENS)
    return Batches(Store(store), model, tokens, batch_size=batch_size, seed=5, **options)


def test_every_example_comes_once_an_epoch(uninterrupted: tuple[Run, Steps]) -> None:
    """However a batch is divided."""
    store = uninterrupted[0].directory / "examples"
    undivided = batches_of(store, 12)
    epochs, size = 3, len(Store(store))
    order = np.concatenate([undivided.examples(step) for step in range(-(-epochs * size // 12))])
    for epoch in range(epochs):
        part = order[epoch * size : (epoch + 1) * size]
        assert (np.sort(part) == np.arange(size)).all() and (part != np.arange(size)).any()
    assert (order[:size] != order[size : 2 * size]).any()
    divided = [batches_of(store, 12, micro_batches=3, processes=2, process=i) for i in (0, 1)]
    for step in (0, 40, 41):  # 41 spans two epochs or more
        pieces = [batches[3 * step + micro] for micro in range(3) for batches in divided]
        for name, value in undivided[step].items():
            found = [piece[name] for piece in pieces]
            assert ((np.concatenate(found) if value.ndim else found[0]) == value).all(), name


def test_batch_with_nothing_to_mask_is_reported(tmp_path: Path) -> None:
    """[CLS] and [SEP] are never masked."""
    empty, good = examples.Example([2, 3], 2), examples.Example([2, 9, 3], 3)
    examples.write(tmp_path / "good", [empty] * 4 + [good] * 4, 20)
    assert batches_of(tmp_path / "good", 8)[0]["positions"].any()
    examples.write(tmp_path / "empty", [empty] * 8, 20)
    with pytest.raises(StageFailed, match="no example of step 1 has a token that could be masked"):
        batches_of(tmp_path / "empty", 4)[0]


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(engine.versions("train")) == {"torch", "transformers", "accelerate"}
    monkeypatch.setitem(engine._PACKAGES, "train", ("no-such-package",))
    with pytest.raises(EnvironmentProblem, match="no-such-package is not installed; install"):
        engine.versions("train")
