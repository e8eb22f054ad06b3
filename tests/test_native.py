"""The native engine: equal to upstream's graph, reproducible, and resumable."""

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_weights
from conftest import SPANISH, TESTS, child, tiny
from safetensors.numpy import load_file, save_file

from electra_wrap import checkpoints, events, files, metrics, subprocesses, weights
from electra_wrap.data import tfrecords, tokenization, vocab
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError
from electra_wrap.native import engine
from electra_wrap.native.batches import Batches, Masking
from electra_wrap.native.examples import Store
from electra_wrap.pipeline import execute
from electra_wrap.profile import NETWORKS, Model
from electra_wrap.run import Run
from electra_wrap.upstream import records
from electra_wrap.upstream.hparams import hparams

#: Scalars by step; and a run with those of its training.
Steps = dict[int, dict[str, float]]
Trained = tuple[Run, Steps]


def native(corpus: Path, directory: Path, *overrides: str, **options: Any) -> Run:
    """Return a run of the native engine that has its examples."""
    run = Run(tiny(corpus, "engine=native", *overrides, **options), directory)
    execute(run, until="examples")
    return run


def make_vocabulary(path: Path, *texts: str) -> list[str]:
    """Write a vocabulary of the characters of the texts, at the start and inside of words."""
    characters = sorted(set("".join(texts)) - {" ", "\n"})
    tokens = [*tokenization.SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return tokens


def checkpoint(run: Run, step: int, name: str = "model") -> Path:
    """Return a file of a checkpoint."""
    return engine.checkpoint_path(run.model_dir, step) / f"{name}.safetensors"


#: A shape with projections in both networks.
SHAPE = {"hidden": 64, "generator_hidden": 32, "embedding": 24}
START, STEPS = 3, 20

#: Adam's slots for each weight, by PyTorch's and upstream's names.
SLOTS = {"exp_avg": "adam_m", "exp_avg_sq": "adam_v"}

#: What upstream's graph gave for those steps: samples, losses, and norms of gradients, weights and
#: slots.
REFERENCE = TESTS / "reference.json"
EXPECTED = json.loads(REFERENCE.read_text(encoding="utf-8"))

LOSSES = ("loss/total", "loss/generator", "loss/discriminator")

#: The softmax does not depend on a key's bias: its gradient is rounding.
IGNORED = "attention.self.key.bias"


def parameters(run: Run, but: str = IGNORED) -> Iterator[tuple[str, str, str]]:
    """Yield TensorFlow's name of each parameter, its own, and that in checkpoints.

    Checkpoints have the shared embeddings once.
    """
    for network in NETWORKS:
        shape = run.profile.model.shape(network)
        projection = shape.embedding_size != shape.hidden_size
        mapping = weights.mapping(network, shape.num_hidden_layers, projection=projection)
        for variable, name in mapping.items():
            owner = "discriminator" if name.startswith("electra.embeddings.") else network
            if not name.endswith(but):
                yield variable, f"{network}.{name}", f"{owner}.{name}"


def as_pytorch(variable: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T if weights.is_transposed(variable) else value)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with examples and a model at step 3, with random weights and slots.

    The directory `theirs` beside the model's has the same as upstream's checkpoint.
    """
    directory = tmp_path_factory.mktemp("continued")
    tokens = make_vocabulary(directory / "vocab.txt", *SPANISH)
    words = " ".join(SPANISH).split()
    # Many documents are shorter than an example.
    documents = (" ".join(words[i % 50 : i % 50 + 1 + i % 9]) for i in range(400))
    (directory / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    keys = [f"tokenizer.source={directory / 'vocab.txt'}", "train.learning_rate=0.01", FLOAT32]
    keys += [f"model.embedding_size={SHAPE['embedding']}", "train.warmup_steps=8"]
    run = native(directory / "text.txt", directory / "run", *keys, steps=START + STEPS)
    values = test_weights.variables(**SHAPE, vocabulary=len(tokens))
    random = np.random.default_rng(1)
    for name in [name for name in values if name != "global_step" and "/adam_" not in name]:
        shape = values[name].shape
        values[f"{name}/adam_m"] = random.normal(0, 0.01, shape).astype(np.float32)
        values[f"{name}/adam_v"] = random.uniform(0, 0.001, shape).astype(np.float32)
    run.make_model_dir()
    test_weights.checkpoints({run.model_dir.with_name("theirs"): values})
    model, optimizer = {}, {}
    for variable, _, saved in parameters(run, but="-"):
        model[saved] = as_pytorch(variable, values[variable])
        for ours, theirs in SLOTS.items():
            optimizer[f"{ours}.{saved}"] = as_pytorch(variable, values[f"{variable}/{theirs}"])
    checkpoint(run, START).parent.mkdir()
    save_file(model, checkpoint(run, START))
    save_file(optimizer, checkpoint(run, START, "optimizer"))
    checkpoints.finish(run.model_dir, START, checkpoint(run, START).parent.iterdir())
    return run


def train_native(run: Run, out: Path) -> dict[str, np.ndarray]:
    """Train with the recorded samples; return the losses, the first gradients, and the end.

    With ELECTRA_WRAP_RECORD, the samples are new.
    """
    np.save(out / "samples.npy", np.array(EXPECTED["samples"]))
    recording = os.environ.get("ELECTRA_WRAP_RECORD")
    child("native_steps.py", run.directory, out, *([] if recording else [out / "samples.npy"]))
    steps, gradients = np.load(out / "steps.npz"), np.load(out / "gradients.npz")
    values = {name: steps[name] for name in LOSSES}
    end = load_file(checkpoint(run, START + STEPS))
    slots = load_file(checkpoint(run, START + STEPS, "optimizer"))
    for _, name, saved in parameters(run):
        values |= {f"gradient {name}": gradients[name], f"model {name}": end[saved]}
        values |= {f"{SLOTS[slot]} {name}": slots[f"{slot}.{saved}"] for slot in SLOTS}
    return values


def train_upstream(run: Run, upstream: Path, out: Path) -> dict[str, np.ndarray]:
    """Train upstream on the batches, masks and samples of `train_native`; return the same."""
    settings, model_dir = out / "hparams.json", run.model_dir.with_name("theirs")
    files.write_json(settings, hparams(run.profile, run.vocab_size))
    arguments = (run.directory, "theirs", settings, out / "steps.npz", out / "theirs.npz")
    steps = parse_steps(child("upstream_steps.py", upstream, *arguments)).values()
    child("read_checkpoint.py", model_dir)
    gradients, end = np.load(out / "theirs.npz"), np.load(model_dir / "values.npz")
    values = {name: np.array([step[name] for step in steps]) for name in LOSSES}
    for variable, name, _ in parameters(run):
        found = {"gradient": gradients[variable], "model": end[variable]}
        found |= {slot: end[f"{variable}/{slot}"] for slot in SLOTS.values()}
        values |= {f"{kind} {name}": as_pytorch(variable, v) for kind, v in found.items()}
    return values


def summary(run: Run, values: dict[str, np.ndarray], out: Path) -> dict[str, Any]:
    """Summarize a training in few numbers."""
    norms = {}
    for _, name, _ in parameters(run):
        state = [values[f"{kind} {name}"] for kind in ("model", *SLOTS.values())]
        tensors = [values[f"gradient {name}"], *state, *(tensor[:1] for tensor in state)]
        norms[name] = [float(np.linalg.norm(tensor)) for tensor in tensors]
    losses = np.stack([values[name] for name in LOSSES], 1).tolist()
    samples = np.load(out / "steps.npz")["sampled"].tolist()
    return {"samples": samples, "losses": losses, "norms": norms}


def assert_as_recorded(found: dict[str, Any]) -> None:
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
    assert ours.keys() == theirs.keys() and len(ours) == 3 + 4 * len(EXPECTED["norms"])
    for name, value in theirs.items():  # the largest difference, as a share of the largest value
        assert np.abs(ours[name] - value).max() < 3e-5 * np.abs(value).max(), name
    steps = np.load(tmp_path / "steps.npz")
    positions = steps["positions"].reshape(-1, 4)
    assert any(len(set(row[row > 0])) < (row > 0).sum() for row in positions), "some repeat"
    assert (positions == 0).any(), "some examples have fewer"
    assert (steps["sampled"] == 0).any(), "[PAD] is sampled"
    found = summary(continued, theirs, tmp_path)
    if os.environ.get("ELECTRA_WRAP_RECORD"):
        REFERENCE.write_text(json.dumps(found) + "\n", encoding="utf-8")
    else:
        assert_as_recorded(found)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_twenty_steps_equal_the_recorded_ones(
    continued: Run, tmp_path: Path, precision: str
) -> None:
    """The same without upstream. `ELECTRA_WRAP_RECORD=1 tox -e upstream` records them again."""
    run = copy(continued, tmp_path / "run", precision=precision)
    copy_checkpoint(continued, run, START)
    found = summary(run, train_native(run, tmp_path), tmp_path)
    if precision == "float32":
        assert_as_recorded(found)
    else:
        difference = np.abs(np.array(found["losses"]) / np.array(EXPECTED["losses"]) - 1)
        # Rounding differs between processors: at most 1.6% on one with avx512_bf16, 3.7% with AMX.
        assert 0 < difference.mean() < 0.01 and difference.max() < 0.06


@pytest.mark.parametrize("text", ["many documents", "no document boundary", "odd"])
@pytest.mark.upstream
def test_examples_equal_those_of_the_script(
    upstream: Path, corpus_text: Path, tmp_path: Path, text: str
) -> None:
    """In the same order: records made of the store have the same bytes."""
    source, overrides = corpus_text, ["train.seed=7"]
    if text == "no document boundary":
        overrides.append("corpus.blank_lines_separate_documents=false")
    if text == "odd":  # lines without tokens, with more than an example has, with special tokens
        lines = ["\u200b\u200d", "una [MASK] y [SEP] [PAD]", "##s", "x " * 100, "", "", "\u200b"]
        lines += ["[UNK]", "ñandú"]
        source = tmp_path / "odd.txt"
        source.write_text("\n".join([*lines * 30, *SPANISH, *reversed(lines)]), encoding="utf-8")
    run = native(source, tmp_path / "run", *overrides)
    theirs = Run(tiny(source, *overrides), run.directory)
    execute(theirs, until="examples")
    ids_of = {token: number for number, token in enumerate(vocab.read(run.vocabulary))}
    for ours, directory in zip(run.examples, theirs.examples, strict=True):
        store = Store(ours)
        ids, first_lengths = store.read(np.arange(len(store)), 32)
        with tfrecords.RecordWriter(str(tmp_path / "records")) as writer:
            sizes = store.sizes(np.arange(len(store)))
            for row, size, first in zip(ids.tolist(), sizes, first_lengths, strict=True):
                example = records.Example(ids_of, row[1 : first - 1], row[first : size - 1], 32)
                writer.write(example.SerializeToString(deterministic=True))
        written = b"".join(path.read_bytes() for path in sorted(directory.iterdir()))
        assert (tmp_path / "records").read_bytes() == written
        assert len(store) or ours != run.examples[0]


@pytest.mark.upstream
@pytest.mark.parametrize("probability", [0.15, 0.25])
def test_masks_equal_upstreams(upstream: Path, tmp_path: Path, probability: float) -> None:
    """With the same draws: candidates, positions, labels and masked ids, at every length."""
    tokens = make_vocabulary(tmp_path / "vocab.txt", "abc")
    random, length = np.random.default_rng(0), 256
    sizes = np.concatenate([np.arange(3, length + 1)] * 2)
    ids = random.integers(0, len(tokens), (len(sizes), length))
    ids *= np.arange(length) < sizes[:, None]
    ids[:, 0] = tokens.index("[CLS]")
    model = Model(mask_prob=probability, max_seq_length=length)
    masking = Masking(model, tokens)
    draws, coins = random.random((2, len(sizes), model.max_predictions_per_seq))
    coins, ids[:, 1] = coins.astype(np.float32), tokens.index("a")  # a candidate in each
    positions, found_weights = masking.choose(ids, sizes, draws)
    np.savez(tmp_path / "in.npz", ids=ids, sizes=sizes, positions=positions, coins=coins)
    paths = [tmp_path / name for name in ("vocab.txt", "in.npz", "out.npz")]
    child("upstream_masks.py", upstream, *paths, str(probability))
    theirs = np.load(tmp_path / "out.npz")
    found = {"weights": found_weights, "positions": positions}
    found["labels"] = np.take_along_axis(ids, positions, 1) * (found_weights > 0)
    found["masked"] = masking.apply(ids, positions, coins)
    assert all((theirs[name] == value).all() for name, value in found.items())
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


def start(run: Run, *argv: str) -> subprocess.Popen[str]:
    """Start a trainer; by default, as `run` does."""
    argv = argv or (sys.executable, "-m", "electra_wrap.native.train", str(run.directory))
    environment = subprocesses.child_environment({"OMP_NUM_THREADS": "2"})
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)


def read_until(trainer: subprocess.Popen[str], text: str) -> str:
    """Return a trainer's output up to the line with a text."""
    return "".join(itertools.takewhile(lambda line: text not in line, trainer.stdout or ()))


def parse_steps(output: str, kind: type = events.Step) -> Steps:
    """Return the scalars in a trainer's output, except those that depend on the machine."""
    found: Any = filter(lambda e: isinstance(e, kind), map(events.parse, output.splitlines()))
    return {e.step: {k: v for k, v in e.scalars.items() if "memory" not in k} for e in found}


def finish(run: Run, *argv: str) -> Steps:
    """Train to the end; return the scalars of each step."""
    trainer = start(run, *argv)
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, output
    return parse_steps(output)


NO_DROPOUT = str(TESTS / "children" / "native_no_dropout.py")
FAULTS = str(TESTS / "children" / "native_faults.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FLOAT32 = "train.precision=float32"
TWELVE = (FLOAT32, "train.save_every=4", "train.keep=0", "train.batch_size=8")
TWELVE += ("model.num_hidden_layers=1",)


@pytest.fixture(scope="module")
def twelve(corpus_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = native(corpus_text, tmp_path_factory.mktemp("twelve") / "run", *TWELVE, steps=12)
    return run, finish(run)


def copy(run: Run, directory: Path, **train: Any) -> Run:
    """Return another run with the same data, changed settings, and no model."""
    shutil.copytree(run.directory, directory, ignore=shutil.ignore_patterns("models"))
    profile = run.profile.model_dump()
    files.write_json(directory / "profile.json", profile | {"train": profile["train"] | train})
    return Run.open(directory)


@pytest.mark.parametrize(
    ("precision", "number"), [("float32", signal.SIGKILL), ("bfloat16", signal.SIGTERM)]
)
def test_resumed_training_equals_uninterrupted_training(
    twelve: Trained, tmp_path: Path, precision: str, number: signal.Signals
) -> None:
    """Bit for bit, with dropout: SIGKILL loses the steps since a checkpoint, SIGTERM saves one."""
    whole, expected = twelve
    if precision != "float32":
        whole = copy(whole, tmp_path / "whole", precision=precision)
        expected = finish(whole)
    run = copy(whole, tmp_path / "run", save_every=2)
    trainer = start(run)
    read_until(trainer, '"step": 7,')  # saving step 6 waited until step 4 was written
    trainer.send_signal(number)
    steps = parse_steps(trainer.communicate()[0])
    stopped, saved = number == signal.SIGTERM, checkpoints.steps(run.model_dir)[-1]
    assert trainer.returncode == (subprocesses.INTERRUPTED if stopped else -number)
    assert saved == max(steps, default=7) if stopped else saved >= 4
    for partial in run.model_dir.glob("*.partial"):
        files.remove(partial)
    rest = finish(run)
    assert [*rest] == [*range(saved + 1, 13)]
    assert steps | rest == {step: expected[step] for step in steps | rest}
    assert checkpoint(run, 12).read_bytes() == checkpoint(whole, 12).read_bytes()


def test_training_goes_on_during_a_save(twelve: Trained, tmp_path: Path) -> None:
    """What is written is the state at its step, and a kill leaves the checkpoint before."""
    run = copy(twelve[0], tmp_path / "run")
    trainer = start(run, sys.executable, FAULTS, "slow", str(run.directory))
    assert "saved optimizer" not in read_until(trainer, '"step": 6,')
    read_until(trainer, '"step": 9,')
    trainer.kill()
    trainer.communicate()
    assert checkpoints.steps(run.model_dir) == [4]
    shutil.rmtree(run.model_dir / "step-8.partial")
    rest = finish(run)
    assert {step: twelve[1][step] for step in rest} == rest and min(rest) == 5


def give_up(number: int, frame: Any) -> None:
    raise TimeoutError


@pytest.mark.parametrize("fault", ["divergence", "batch"])
def test_error_ends_workers_at_once(twelve: Trained, tmp_path: Path, fault: str) -> None:
    """Batches wait that nobody takes. The checkpoint that is being written is finished."""
    settings, message = {"save_every": 6}, r"a fault; run again$"
    if fault == "divergence":
        settings = {"learning_rate": 1e30, "warmup_steps": 0, "log_every": 10, "save_every": 1000}
        message = r"diverged at step 10: the loss is .*finite"
    run = copy(twelve[0], tmp_path / "run", steps=2000, **settings)
    run.launch = f"{sys.executable} {FAULTS} slow workers {fault}"
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(90)
    with pytest.raises(StageFailed, match=message) as error:
        execute(run, until="train")
    signal.alarm(0)
    assert "\n" not in str(error.value)
    assert checkpoints.latest_intact(run.model_dir) == (6 if fault == "batch" else None)
    assert not list(run.model_dir.glob("*.partial"))


def test_error_of_a_save_is_the_environments(twelve: Trained, tmp_path: Path) -> None:
    """The limit for the size of a file gives an error as a full disk does."""
    run = copy(twelve[0], tmp_path / "run")
    run.launch = f"sh -c 'ulimit -f 100; exec \"$@\"' sh {sys.executable}"
    with pytest.raises(EnvironmentProblem, match=r"^File too large; fix that and run again$"):
        execute(run, until="train")
    assert checkpoints.steps(run.model_dir) == []


def copy_checkpoint(source: Run, target: Run, step: int) -> None:
    target.make_model_dir()
    shutil.copytree(checkpoint(source, step).parent, checkpoint(target, step).parent)
    shutil.copy(checkpoints.checksums(source.model_dir, step), target.model_dir)


@pytest.fixture
def at_step_8(twelve: Trained, tmp_path: Path) -> Run:
    run = copy(twelve[0], tmp_path / "run")
    copy_checkpoint(twelve[0], run, 8)
    return run


def first_elements(path: Path) -> None:
    save_file({name: value.reshape(-1)[:1] for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer", first_elements),
        ("optimizer", lambda path: save_file({"x": np.zeros(3)}, path)),
        ("random-0", lambda path: path.write_bytes(pickle.dumps({"cpu": 1}))),
    ],
    ids=["other shapes", "other names", "pickle"],
)
def test_damage_that_passes_the_checksums_is_reported(
    at_step_8: Run, file: str, damage: Callable[[Path], Any]
) -> None:
    """In one line, without advice to switch a protection off."""
    damage(path := checkpoint(at_step_8, 8, file))
    checkpoints.finish(at_step_8.model_dir, 8, path.parent.iterdir())
    with pytest.raises(UsageError, match=rf"^.*/step-8/{file}\..*; move its directory") as error:
        engine.train(at_step_8, [], print)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_lost_random_state_is_logged(twelve: Trained, at_step_8: Run) -> None:
    checkpoint(at_step_8, 8, "random-0").unlink()
    output = start(at_step_8).communicate(timeout=300)[0]
    assert "random-0.safetensors is missing: " in output
    assert parse_steps(output)[9] != twelve[1][9]


def test_lack_of_a_compiler_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(engine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "no C compiler" in str(engine.find_compiler_problem())
    (tmp_path / "clang").touch(mode=0o755)
    assert "Python.h is missing" in str(engine.find_compiler_problem())
    (tmp_path / "Python.h").touch()
    assert engine.find_compiler_problem() is None


def test_evaluation_does_not_change_training(twelve: Trained, tmp_path: Path) -> None:
    """Bit for bit, with dropout. And two processes evaluate as one does."""
    run = copy(twelve[0], tmp_path / "run", evaluate_every=7, keep=2)
    output = start(run).communicate(timeout=300)[0]
    assert parse_steps(output) == twelve[1]
    assert checkpoints.steps(run.model_dir) == [8, 12]
    evaluations = parse_steps(output, events.Evaluation)
    argv = ["-m", "electra_wrap.native.evaluate", str(run.directory), "12"]
    two_processes = start(run, *TORCHRUN, *argv).communicate(timeout=300)[0]
    assert sorted(evaluations) == [7, 12]
    evaluations[12] = pytest.approx(evaluations[12], rel=1e-5)
    assert parse_steps(two_processes, events.Evaluation) == {12: evaluations[12]}


@pytest.mark.upstream
def test_evaluation_equals_upstreams(upstream: Path, twelve: Trained, tmp_path: Path) -> None:
    """Of the same checkpoint, held-out examples, masks and samples, by upstream's do_eval."""
    run, batches, settings = twelve[0], tmp_path / "steps.npz", tmp_path / "hparams.json"
    output = child("native_steps.py", run.directory, tmp_path, "12")
    ours = parse_steps(output, events.Evaluation)[12]
    engine.export(run, 12, tmp_path / "exported")
    theirs = run.model_dir.with_name("theirs")
    test_weights.to_tensorflow(tmp_path / "exported", theirs, step=12)
    files.write_json(settings, hparams(run.profile, run.vocab_size))
    arguments = (run.directory, "theirs", settings, batches, theirs / "model.ckpt-12")
    output = child("upstream_evaluation.py", upstream, *arguments)
    values = json.loads(output.splitlines()[-1])
    assert {name: values[their_name] for their_name, name in metrics.UPSTREAM.items()} == {
        name: pytest.approx(ours[name], rel=1e-5, abs=1e-6) for name in metrics.UPSTREAM.values()
    }
    assert 0.3 < ours["discriminator/auc"] < ours["discriminator/auc_with_padding"] < 1
    assert len(np.load(batches)["ids"]) > 1


@pytest.mark.slow
def test_division_does_not_change_the_loss(twelve: Trained, tmp_path: Path) -> None:
    """Into processes and micro-batches, also in the middle: from one of each to two."""
    one = copy(twelve[0], tmp_path / "one", save_every=3)
    expected = finish(one, sys.executable, NO_DROPOUT, str(one.directory))
    assert expected != twelve[1], "dropout was on there"
    for launcher in ([sys.executable], TORCHRUN):
        run = copy(one, tmp_path / f"two-{len(launcher)}", micro_batches=2)
        copy_checkpoint(one, run, 3)
        found = finish(run, *launcher, NO_DROPOUT, str(run.directory))
        assert [*found] == [*range(4, 13)]
        for step, scalars in found.items():
            assert scalars == pytest.approx(expected[step], rel=1e-5), (launcher, step)


def test_batch_that_cannot_be_divided_is_refused(twelve: Trained, tmp_path: Path) -> None:
    run = copy(twelve[0], tmp_path / "run", batch_size=9)
    run.launch = " ".join(TORCHRUN)
    with pytest.raises(UsageError, match=r"^train.batch_size = 9 is not divisible by 2 processes"):
        engine.train(run, [], print)


@pytest.mark.parametrize("launch", ['torchrun "', "tortchrun --nnodes 2", " "])
def test_launch_is_checked_before_any_work(corpus_text: Path, tmp_path: Path, launch: str) -> None:
    run = Run(tiny(corpus_text, "engine=native"), tmp_path / "run", launch=launch)
    with pytest.raises(UsageError, match=r"^--launch .*: there is no such command; give another"):
        execute(run)
    assert not run.corpus.exists()


def test_launch_finds_a_program_beside_python(
    twelve: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a virtual environment that is not activated. And nothing has to be held out."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$0 $*"\nexec {sys.executable} "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    run = copy(twelve[0], tmp_path / "run", steps=2, evaluate_every=1)
    files.remove(run.examples[1])
    run.examples[1].mkdir()
    run.launch = "launcher -u"
    engine.prepare(run)
    engine.train(run, [], print)
    assert f"{launcher} -u -m electra_wrap.native.train" in run.log_file("train").read_text()
    assert checkpoints.steps(run.model_dir) == [1, 2]


def test_model_files_are_readable_as_the_umask_allows(learned: Run) -> None:
    """Some libraries write files that only their owner can read."""
    mask = os.umask(0o022)
    os.umask(mask)
    written = [*learned.model_dir.glob("step-6/*"), *learned.exported.rglob("*")]
    assert sum(file.name == "model.safetensors" for file in written) == 3
    for file in filter(Path.is_file, written):
        assert oct(file.stat().st_mode & 0o777) == oct(0o666 & ~mask), file


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_has_the_same_loss(twelve: Trained, tmp_path: Path) -> None:
    """In one graph, as CUDA graphs need it; in two processes, and nearly so in bfloat16."""
    one, found = [sys.executable], []
    for launcher, *settings in ((one, False), (TORCHRUN, True), (one, True, "bfloat16")):
        train = dict(zip(("compile", "precision"), settings, strict=False))
        run = copy(twelve[0], tmp_path / str(len(found)), steps=3, **train)
        found.append(finish(run, *launcher, NO_DROPOUT, str(run.directory)))
    for step, scalars in found[0].items():
        assert found[1][step] == pytest.approx(scalars, rel=1e-5)
        loss, rounded = scalars["loss/total"], found[2][step]["loss/total"]
        assert rounded == pytest.approx(loss, rel=0.01) and rounded != loss


def batches_of(store: Path, batch_size: int, **options: int) -> Batches:
    model, tokens = Model(max_seq_length=32), list(tokenization.SPECIAL_TOKENS)
    return Batches(Store(store), model, tokens, batch_size=batch_size, seed=5, **options)


def test_every_example_comes_once_an_epoch(twelve: Trained) -> None:
    """However a batch is divided."""
    store = twelve[0].examples[0]
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
    for name, sizes in (("good", [2, 3] * 4), ("empty", [2] * 8)):
        (tmp_path / name).mkdir()
        tokens = np.concatenate([[2, *[9] * (size - 2), 3] for size in sizes])
        tokens.astype("<u2").tofile(tmp_path / name / "tokens.bin")
        index = np.stack([np.cumsum(sizes), np.full(8, 2)], 1)
        index.astype("<i8").tofile(tmp_path / name / "index.bin")
        files.write_json(tmp_path / name / "store.json", {"dtype": "<u2", "examples": 8})
    assert batches_of(tmp_path / "good", 8)[0]["positions"].any()
    with pytest.raises(StageFailed, match="no example of step 1 has a token that could be masked"):
        batches_of(tmp_path / "empty", 4)[0]
