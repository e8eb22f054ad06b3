"""The native engine against upstream's graph, against itself, and against the arithmetic that it replaces."""

from __future__ import annotations

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

from electra_wrap import metrics, process, stages, vocab, weights
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.native import checkpoints, examples
from electra_wrap.native import engine as native_engine
from electra_wrap.native.batches import Batches, Masking
from electra_wrap.native.examples import Store
from electra_wrap.profile import NETWORKS
from electra_wrap.rundir import RunDir
from electra_wrap.stages import Run
from electra_wrap.upstream import engine as upstream_engine
from electra_wrap.upstream import records as upstream_records


def native(corpus: Path, directory: Path, *overrides: str, **keys: Any) -> Run:
    """A run of the native engine whose examples are there."""
    run = Run(tiny(corpus, 'engine="native"', *overrides, **keys), RunDir(directory))
    stages.execute(run, "examples")
    return run


def make_vocabulary(path: Path, *texts: str) -> list[str]:
    """Write a vocabulary of the characters of the texts, alone and inside a word."""
    characters = sorted(set("".join(texts)) - {" ", "\n"})
    tokens = [*vocab.SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return tokens


#: A shape with projections in both networks.
SHAPE = {"hidden": 64, "generator_hidden": 32, "embedding": 24}
START, STEPS = 3, 20


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with data, and a model at step 3 with weights and slots of its own: upstream's, and handed over."""
    directory = tmp_path_factory.mktemp("continued")
    tokens = make_vocabulary(directory / "vocab.txt", *SPANISH)
    words = " ".join(SPANISH).split()
    documents = (" ".join(words[i % 50 : i % 50 + 1 + i % 9]) for i in range(400))  # many shorter than an example
    (directory / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    run = native(
        directory / "text.txt",
        directory / "run",
        f"tokenizer.source={directory / 'vocab.txt'}",
        f"model.embedding_size={SHAPE['embedding']}",
        "train.warmup_steps=8",
        "train.learning_rate=0.01",
        steps=START + STEPS,
    )
    values = test_weights.variables(**SHAPE, vocabulary=len(tokens))
    random = np.random.default_rng(1)
    for name in [name for name in values if name != "global_step" and "/adam_" not in name]:
        values[f"{name}/adam_m"] = random.normal(0, 0.01, values[name].shape).astype(np.float32)
        values[f"{name}/adam_v"] = random.uniform(0, 0.001, values[name].shape).astype(np.float32)
    run.model_dir.parent.mkdir()
    theirs = run.model_dir.with_name("theirs")
    test_weights.checkpoints({theirs: values})
    out = str(checkpoints.path(run.model_dir, START))
    test_weights.call(task="convert", checkpoint=str(theirs), out=out, slots=True)
    return run


#: What upstream's graph gave for those steps: samples, losses, and norms of gradients, weights and slots.
REFERENCE = TESTS / "reference.json"


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rows(run: Run) -> Iterator[tuple[str, weights.Row]]:
    for network in NETWORKS:
        shape = run.profile.model.shape(network)
        projection = shape.embedding_size != shape.hidden_size
        for row in weights.rows(network, shape.num_hidden_layers, projection=projection):
            # A key's bias has no gradient but rounding: softmax does not see it.
            if not row.pytorch.endswith("attention.self.key.bias"):
                yield network, row


def steps_of_both_engines(run: Run, upstream: Path, out: Path) -> dict[str, float]:
    """Train on the same batches, masks and samples from the same checkpoint; return the largest differences.

    Of losses, gradients and weights as shares of the largest; afterwards `out` has all of both.
    """
    samples = out / "samples.npy"
    if not os.environ.get("ELECTRA_WRAP_RECORD"):
        np.save(samples, np.array(json.loads(REFERENCE.read_text(encoding="utf-8"))["samples"]))
    child("native_steps.py", run.directory.path, out, *([samples] if samples.exists() else []))
    hparams, theirs = out / "hparams.json", out / "theirs"
    hparams.write_text(json.dumps(run.hparams()), encoding="utf-8")
    theirs.mkdir()
    child("upstream_steps.py", upstream, run.directory.path, "theirs", hparams, out / "steps.npz", theirs)
    test_weights.call(
        task="convert", checkpoint=str(run.model_dir.with_name("theirs")), out=str(theirs / "end"), slots=True
    )
    steps, losses = np.load(out / "steps.npz"), np.load(theirs / "losses.npz")["losses"]
    found = {
        f"loss {name}": relative(steps[f"{name}_loss"], losses[:, i])
        for i, name in enumerate(("loss", "generator", "discriminator"))
    }
    ours, their_gradients = np.load(out / "gradients.npz"), np.load(theirs / "gradients.npz")
    found["gradient"] = max(
        relative(
            ours[f"{network}.{row.pytorch}"],
            their_gradients[row.tensorflow].T if row.transposed else their_gradients[row.tensorflow],
        )
        for network, row in rows(run)
    )
    for file in ("model", *weights.SLOTS):
        for network in NETWORKS:
            end, their_end = (
                load_file(directory / "end" / network / f"{file}.safetensors") for directory in (out, theirs)
            )
            assert set(end) == set(their_end)
            there = max(
                relative(end[row.pytorch], their_end[row.pytorch]) for name, row in rows(run) if name == network
            )
            found[file] = max(found.get(file, 0.0), there)
    return found


def summary(run: Run, steps: Path, losses: np.ndarray, gradients: dict[str, np.ndarray], end: Path) -> dict[str, Any]:
    """Steps in numbers few enough to keep. `gradients` are under the names of `{network}.{parameter}`."""
    norms = {}
    for network, row in rows(run):
        name = f"{network}.{row.pytorch}"
        files = [load_file(end / network / f"{file}.safetensors")[row.pytorch] for file in ("model", *weights.SLOTS)]
        norms[name] = [float(np.linalg.norm(value)) for value in (gradients[name], *files, *(f[:1] for f in files))]
    return {"samples": np.load(steps)["sampled"].tolist(), "losses": losses.tolist(), "norms": norms}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["samples"] == expected["samples"]
    assert np.array(found["losses"]) == pytest.approx(np.array(expected["losses"]), rel=1e-5)
    assert found["norms"].keys() == expected["norms"].keys()
    for name, norms in expected["norms"].items():
        assert found["norms"][name] == pytest.approx(norms, rel=2e-4), name


@pytest.mark.upstream
def test_twenty_steps_are_those_of_upstreams_graph(upstream: Path, continued: Run, tmp_path: Path) -> None:
    found = steps_of_both_engines(continued, upstream, tmp_path)
    assert max(found.values()) < 3e-5, found
    positions = np.load(tmp_path / "steps.npz")["positions"].reshape(-1, 4)
    assert any(len(set(row[row > 0])) < (row > 0).sum() for row in positions), "some positions are chosen twice"
    assert (positions == 0).any(), "some examples have fewer"
    assert (np.load(tmp_path / "steps.npz")["sampled"] == 0).any(), "[PAD] is proposed"
    losses, theirs = np.load(tmp_path / "theirs" / "losses.npz")["losses"], np.load(tmp_path / "theirs/gradients.npz")
    gradients = {f"{network}.{row.pytorch}": theirs[row.tensorflow] for network, row in rows(continued)}
    recorded = summary(continued, tmp_path / "steps.npz", losses, gradients, tmp_path / "theirs" / "end")
    if os.environ.get("ELECTRA_WRAP_RECORD"):
        REFERENCE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    assert_equal(recorded, json.loads(REFERENCE.read_text(encoding="utf-8")))


def test_twenty_steps_are_those_recorded_from_upstreams_graph(continued: Run, tmp_path: Path) -> None:
    """The same without upstream. (`ELECTRA_WRAP_RECORD=1 tox -e upstream` writes the record anew.)"""
    expected = json.loads(REFERENCE.read_text(encoding="utf-8"))
    np.save(tmp_path / "samples.npy", np.array(expected["samples"]))
    shutil.copytree(continued.directory.path, tmp_path / "run", ignore=shutil.ignore_patterns(f"step-{START + STEPS}"))
    child("native_steps.py", tmp_path / "run", tmp_path, tmp_path / "samples.npy")
    steps = np.load(tmp_path / "steps.npz")
    losses = np.stack([steps[f"{name}_loss"] for name in ("loss", "generator", "discriminator")], 1)
    gradients = dict(np.load(tmp_path / "gradients.npz"))
    assert_equal(summary(continued, tmp_path / "steps.npz", losses, gradients, tmp_path / "end"), expected)


@pytest.mark.parametrize("text", ["many documents", "no document boundary", "odd"])
@pytest.mark.upstream
def test_examples_are_those_of_the_script(upstream: Path, corpus_text: Path, tmp_path: Path, text: str) -> None:
    """In the same order, from the same seed: the store made of its records is the same, byte for byte."""
    source = corpus_text
    overrides = [f"corpus.blank_lines_separate_documents={json.dumps(text != 'no document boundary')}", "train.seed=7"]
    if text == "odd":  # lines of no token, of more tokens than an example has, of what looks like special tokens
        lines = ["\u200b\u200d", "una [MASK] y [SEP] [PAD]", "##s", "x " * 100, "", "", "\u200b", "[UNK]", "ñandú"]
        source = tmp_path / "odd.txt"
        source.write_text("\n".join([*lines * 30, *SPANISH, *reversed(lines)]), encoding="utf-8")
    run = native(source, tmp_path / "run", *overrides)
    theirs = Run(tiny(source, *overrides), run.directory)
    stages.execute(theirs, "tfrecords")
    for name, records in zip(native_engine.OUTPUTS, upstream_engine.OUTPUTS, strict=True):
        if name == "heldout_examples" and not run.recorded("corpus")["facts"]["held_out_lines"]:
            continue
        job = {"directory": str(run.directory / records)}
        out = tmp_path / name
        number = process.call("electra_wrap.native.records", {**job, "out": str(out), "vocab_size": 300, "length": 32})
        assert number == len(examples.Store(run.directory / name)) > 0
        for file in ("tokens.bin", "index.bin", "store.json"):
            assert (out / file).read_bytes() == (run.directory / name / file).read_bytes(), file


@pytest.mark.upstream
def test_existing_records_are_trained_on(upstream: Path, corpus_text: Path, tmp_path: Path) -> None:
    built = Run(tiny(corpus_text, "corpus.held_out=0"), RunDir(tmp_path / "built"))
    stages.execute(built, "tfrecords")
    records = built.directory / "pretrain_tfrecords"
    keys = (f"tokenizer.source={built.vocabulary}",)
    run = native(records, tmp_path / "run", *keys)
    text = native(corpus_text, tmp_path / "text", *keys, "corpus.held_out=0")
    found = []
    for one in (run, text):
        store = examples.Store(one.directory / "examples")
        ids, firsts = store.read(np.arange(len(store)), 32)
        found.append(sorted(np.column_stack([ids, firsts]).tolist()))
    assert found[0] == found[1] and len(found[0]) > 100
    theirs = Run(tiny(records, *keys), RunDir(tmp_path / "theirs"))
    stages.execute(theirs, "tfrecords")
    assert theirs.digest("pretrain_tfrecords") == built.digest("pretrain_tfrecords")
    with pytest.raises(UsageError, match="has examples of 32 tokens"):
        native(records, tmp_path / "other", *keys, "model.max_seq_length=16")


@pytest.mark.upstream
def test_a_run_changes_engines_half_way(upstream: Path, corpus_text: Path, tmp_path: Path) -> None:
    """Upstream to native to upstream: weights and Adam's slots go over bit for bit, and training goes on."""
    directory = RunDir(tmp_path / "run")

    def train(engine: str, steps: int) -> Run:
        run = Run(tiny(corpus_text, f'engine="{engine}"', "train.learning_rate=0.01", steps=steps), directory)
        stages.execute(run, "train")
        return run

    def variables(model_dir: Path) -> dict[str, np.ndarray]:
        child("read_checkpoint.py", model_dir)
        return dict(np.load(model_dir / "values.npz"))

    train("upstream", 4)
    run = Run(tiny(corpus_text, 'engine="native"', "train.learning_rate=0.01", steps=4), directory)
    before = variables(run.model_dir)
    out = tmp_path / "out"
    upstream_engine.export(run, run.model_dir, 4, out, slots=True)
    native_engine.adopt(run, 4, out)
    native_engine.export(run, run.model_dir, 4, tmp_path / "back", slots=True)
    again = Run(run.profile.model_copy(update={"model_name": "again"}), directory)
    again.model_dir.mkdir()
    upstream_engine.adopt(again, 4, tmp_path / "back")
    after = variables(again.model_dir)
    assert set(before) == set(after)
    assert all((before[name] == after[name]).all() for name in before)
    assert any(np.abs(value).max() > 0 for name, value in after.items() if name.endswith("adam_v"))
    shutil.rmtree(checkpoints.path(run.model_dir, 4))

    assert train("native", 7).checkpoint() == (7, native_engine)
    run = train("upstream", 9)
    assert run.checkpoint() == (9, upstream_engine)
    assert run.recorded("train")["facts"] | {"seconds_training": 0, "final_loss": 0} == {
        **{"engine": "upstream", "device": "cpu", "from_step": 7, "step": 9},
        **{"seconds_training": 0, "final_loss": 0},
    }
    end = variables(run.model_dir)
    assert end["global_step"] == 9 and set(end) == set(before)
    stages.execute(run, "check")
    assert not [p.name for p in run.model_dir.iterdir() if "partial" in p.name or "exported" in p.name]


@pytest.mark.upstream
@pytest.mark.parametrize("probability", [0.15, 0.25])
def test_masks_are_those_of_upstream(upstream: Path, tmp_path: Path, probability: float) -> None:
    """Given the same draws: candidates, number, positions, labels and what [MASK] replaces, for every length."""
    tokens = make_vocabulary(tmp_path / "vocab.txt", "abc")
    random = np.random.default_rng(0)
    length = 256
    sizes = np.concatenate([np.arange(3, length + 1)] * 2)
    ids = random.integers(0, len(tokens), (len(sizes), length)) * (np.arange(length) < sizes[:, None])
    ids[:, 0] = tokens.index("[CLS]")
    masking = Masking(probability, tokens.index("[MASK]"), (tokens.index("[SEP]"), tokens.index("[CLS]")))
    draws, coins = random.random((2, len(sizes), masking.most(length)))
    coins = coins.astype(np.float32)
    ids[:, 1] = tokens.index("a")  # a candidate in each
    positions, weights = masking.choose(ids, sizes, draws)
    np.savez(tmp_path / "in.npz", ids=ids, sizes=sizes, positions=positions, coins=coins)
    child("upstream_masks.py", upstream, *(tmp_path / n for n in ("vocab.txt", "in.npz", "out.npz")), str(probability))
    theirs = np.load(tmp_path / "out.npz")
    assert (theirs["weights"] == weights).all()
    assert (theirs["positions"] == positions).all()
    assert (theirs["masked"] == masking.apply(ids, positions, coins)).all()
    assert (theirs["labels"] == np.take_along_axis(ids, positions, 1) * (weights > 0)).all()
    # The positions come from where upstream's come from, each as likely as the other.
    for row in (0, 7, 100, len(sizes) - 1):
        candidates, many = np.isfinite(theirs["candidates"][row]), np.full(2000, row)
        found, counted = masking.choose(ids[many], sizes[many], random.random((2000, masking.most(length))))
        times = np.bincount(found[counted > 0], minlength=length)
        assert ((times > 0) == candidates).all()
        expected, freedom = times.sum() / candidates.sum(), candidates.sum() - 1
        chi_square = ((times[candidates] - expected) ** 2 / expected).sum()
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.fixture(scope="module")
def parts() -> Any:
    return json.loads(child("native_parts.py", "1", "10", "4"))


def test_learning_rates_are_those_of_the_pin(parts: Any) -> None:
    assert parts["rates"] == pytest.approx([0, 0.9 / 4, 0.8 / 2, 0.7 * 3 / 4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])


def test_initial_values_are_tensorflows(parts: Any) -> None:
    kinds = set()
    for name, (deviation, largest, shape) in parts["initial"].items():
        if name.endswith("LayerNorm.weight"):
            assert (deviation, largest) == (0, 1)
        elif name.endswith("bias"):
            assert largest == 0
        elif "embeddings_project" in name or "dense_prediction" in name:
            bound = np.sqrt(6 / sum(shape))
            assert 0.9 * bound < largest <= bound and deviation == pytest.approx(bound / np.sqrt(3), rel=0.15)
        else:  # a normal distribution cut at two deviations has 0.8796 of its deviation
            assert 0.037 < largest <= 0.04 and deviation == pytest.approx(0.8796 * 0.02, rel=0.05)
            kinds.add(name.split(".")[-2])
    assert {"word_embeddings", "position_embeddings", "token_type_embeddings", "query", "dense"} <= kinds


def test_the_fused_softmax_is_the_plain_one(parts: Any) -> None:
    assert parts["loss"][0] == pytest.approx(parts["loss"][1], rel=1e-5)
    assert max(parts["gradients"]) < 1e-5


def test_samples_have_the_generators_distribution(parts: Any) -> None:
    """With evenly spread draws each word comes as often as its probability says, give or take one."""
    times, expected = np.array(parts["times"]), np.array(parts["expected"])
    assert np.abs(times - expected).max() <= 1.1 and not times[[0, 7, -1]].any()
    assert parts["ends"][0] == parts["ends"][1] == 1 and parts["ends"][3] == 1298, "never one that has no chance"


def command(run: Run) -> list[str]:
    return [sys.executable, "-m", "electra_wrap.native.train", str(run.directory.path)]


def start(run: Run, *argv: str) -> subprocess.Popen[str]:
    environment = process.environment({"OMP_NUM_THREADS": "2"})
    return subprocess.Popen(argv or command(run), env=environment, stdout=subprocess.PIPE, text=True)


def lines(text: str) -> dict[int, dict[str, float]]:
    """What training printed that does not depend on the machine, by step."""
    said = [json.loads(line) for line in text.splitlines() if line.startswith('{"step"')]
    return {line.pop("step"): {k: v for k, v in line.items() if "/" in k and "memory" not in k} for line in said}


def finish(run: Run, *argv: str) -> dict[int, dict[str, float]]:
    """Train to the end; return the losses of each step."""
    trainer = start(run, *argv)
    try:
        text, _ = trainer.communicate(timeout=300)
    finally:
        trainer.kill()  # processes that wait for each other would do so for ever
    assert trainer.returncode == 0, text
    return lines(text)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWELVE = ("train.save_every=4", "train.keep=0", "train.batch_size=8", "model.num_hidden_layers=1")


@pytest.fixture(scope="module")
def undisturbed(corpus_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[int, dict[str, float]]]:
    run = native(corpus_text, tmp_path_factory.mktemp("undisturbed") / "run", *TWELVE, steps=12)
    return run, finish(run)


def copy(run: Run, directory: Path) -> Run:
    """Another run with the same data, and no model."""
    shutil.copytree(run.directory.path, directory, ignore=shutil.ignore_patterns("models"))
    return Run(run.profile, RunDir(directory))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    undisturbed: tuple[Run, dict[int, dict[str, float]]], tmp_path: Path, number: signal.Signals
) -> None:
    """Bit for bit, dropout included: SIGKILL after the last checkpoint, SIGTERM with one of its own."""
    run = copy(undisturbed[0], tmp_path / "run")
    trainer = start(run)
    assert trainer.stdout
    seen = ""
    while '"step": 6,' not in seen:
        seen += trainer.stdout.readline()
    trainer.send_signal(number)
    seen += trainer.communicate()[0]
    assert trainer.returncode == (process.INTERRUPTED if number == signal.SIGTERM else -number)
    saved = checkpoints.steps(run.model_dir)[-1]
    assert saved == (max(lines(seen)) if number == signal.SIGTERM else 4)
    rest = finish(run)
    assert min(rest) == saved + 1
    assert {**lines(seen), **rest} == undisturbed[1] and len(undisturbed[1]) == 12
    ends = [checkpoints.path(one.model_dir, 12) / "model.safetensors" for one in (run, undisturbed[0])]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def evaluated(text: str) -> dict[str, float]:
    """The metrics that an evaluation printed."""
    (line,) = (json.loads(line) for line in text.splitlines() if line.startswith('{"evaluated"'))
    return {key: value for key, value in line.items() if "/" in key}


def test_evaluations_on_the_way_do_not_disturb_training(
    undisturbed: tuple[Run, dict[int, dict[str, float]]], tmp_path: Path
) -> None:
    """Bit for bit, dropout included; and two processes evaluate as one does."""
    found = []
    for processes, launcher in ((1, [sys.executable]), (2, TORCHRUN)):
        run = copy(undisturbed[0], tmp_path / str(processes))
        profile = run.directory / "profile.json"
        keys = run.profile.model_dump()
        keys["train"] |= {"evaluate_every": 7, "keep": 1}
        profile.write_text(json.dumps(keys), encoding="utf-8")
        if processes == 1:
            text = start(run).communicate(timeout=300)[0]
            assert lines(text) == undisturbed[1]
            assert checkpoints.steps(run.model_dir) == [7, 12], "what was evaluated last outlives the others"
        else:
            theirs = tmp_path / "1" / "models" / run.profile.model_name
            shutil.copytree(checkpoints.path(theirs, 7), checkpoints.path(run.model_dir, 7))
            argv = ["-m", "electra_wrap.native.train", str(run.directory.path), "7", str(profile)]
            text = start(run, *launcher, *argv).communicate(timeout=300)[0]
        found.append(evaluated(text))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.upstream
def test_evaluation_is_upstreams(upstream: Path, undisturbed: tuple[Run, Any], tmp_path: Path) -> None:
    """The same checkpoint, held-out examples, masks and samples in upstream's graph, by its do_eval."""
    run = undisturbed[0]
    ours = evaluated(child("native_evaluation.py", run.directory.path, "12", tmp_path / "batches.npz"))
    exported = tmp_path / "exported"
    native_engine.export(run, run.model_dir, 12, exported)
    networks = {name: str(exported / name) for name in NETWORKS}
    (tmp_path / "models").mkdir()
    test_weights.call(task="convert_back", step=12, out=str(tmp_path / "models" / "theirs"), **networks)
    shutil.copy(run.vocabulary, tmp_path)
    (tmp_path / "hparams.json").write_text(json.dumps(run.hparams()), encoding="utf-8")
    arguments = (tmp_path / "hparams.json", tmp_path / "batches.npz", tmp_path / "models" / "theirs" / "model.ckpt-12")
    told = child("upstream_evaluation.py", upstream, tmp_path, "theirs", *arguments)
    theirs = json.loads(told.splitlines()[-1])
    assert {ours: theirs[name] for name, ours in metrics.UPSTREAM.items()} == {
        name: pytest.approx(ours[name], rel=1e-5, abs=1e-6) for name in metrics.UPSTREAM.values()
    }
    assert 0.3 < ours["discriminator/auc"] < 1 and len(np.load(tmp_path / "batches.npz")["ids"]) > 1


@pytest.mark.slow
def test_processes_and_micro_batches_divide_a_batch_and_change_nothing(
    undisturbed: tuple[Run, dict[int, dict[str, float]]], tmp_path: Path
) -> None:
    """Also half way: from one process and one micro-batch to two of each."""
    script = str(TESTS / "children" / "native_no_dropout.py")
    one = [sys.executable]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, micro_batches, launcher in (("one", 1, one), ("micro", 2, one), ("two", 2, TORCHRUN)):
        run = copy(undisturbed[0], tmp_path / name)
        if name == "two":  # goes on where "one" was after an odd number of steps
            shutil.copytree(
                checkpoints.path(tmp_path / "one" / "models" / run.profile.model_name, 3), run.model_dir / "step-3"
            )
        keys = run.profile.model_dump()
        keys["train"] |= {"micro_batches": micro_batches, "save_every": 3}
        (run.directory / "profile.json").write_text(json.dumps(keys), encoding="utf-8")
        found[name] = finish(run, *launcher, script, str(run.directory.path))
    assert len(found["micro"]) == 12 and len(found["two"]) == 9
    for name in ("micro", "two"):
        for step, losses in found[name].items():
            assert losses == pytest.approx(found["one"][step], rel=1e-5), (name, step)
    assert found["one"] != undisturbed[1], "dropout was on there"


def test_a_loss_that_is_not_finite_is_said_in_one_line(corpus_text: Path, tmp_path: Path) -> None:
    run = native(corpus_text, tmp_path / "run", "train.learning_rate=1e30", *TWELVE[1:])
    with pytest.raises(StageFailed, match=r"^at step \d the loss is .*finite; .*the whole log is"):
        stages.execute(run, "train")
    assert checkpoints.steps(run.model_dir) == []


def test_a_batch_that_cannot_be_divided_is_said_in_one_line(undisturbed: tuple[Run, Any], tmp_path: Path) -> None:
    run = copy(undisturbed[0], tmp_path / "run")
    run.launch = " ".join([*TORCHRUN[:-1], "--nproc-per-node=3"])
    with pytest.raises(UsageError, match=r"^train.batch_size = 8 is not divisible by 3 processes"):
        native_engine.train(run, [], print)
    run.launch = 'torchrun "'
    with pytest.raises(UsageError, match="--launch"):
        native_engine.train(run, [], print)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_is_the_same_model(undisturbed: tuple[Run, dict[int, Any]], tmp_path: Path) -> None:
    """In one graph, without a break, and in two processes: that is what CUDA graphs need, which no CPU can test."""
    found = []
    for compiled, launcher in ((False, [sys.executable]), (True, TORCHRUN)):
        run = copy(undisturbed[0], tmp_path / str(compiled))
        keys = run.profile.model_dump()
        keys["train"] |= {"compile": compiled, "steps": 3}
        (run.directory / "profile.json").write_text(json.dumps(keys), encoding="utf-8")
        script = str(TESTS / "children" / "native_no_dropout.py")
        found.append(finish(run, *launcher, script, str(run.directory.path)))
    for step, losses in found[0].items():
        assert found[1][step] == pytest.approx(losses, rel=1e-5)


def test_a_store_gives_back_what_was_written(undisturbed: tuple[Run, Any]) -> None:
    run = undisturbed[0]
    shards = sorted((run.directory / "corpus").iterdir())
    rules = {"lowercase": False, "strip_accents": False}
    keys: dict[str, Any] = {"rules": rules, "length": 32, "documents": True, "seed": 0}
    tokens = vocab.read(run.vocabulary)
    built = [e for number, shard in enumerate(shards) for e in examples.build(shard, number, tokens, **keys)]
    store = examples.Store(run.directory / "examples")
    ids, firsts = store.read(np.arange(len(store)), 32)
    padded = [[*example.ids, *[0] * (32 - len(example.ids))] for example in built]
    assert ids.tolist() == padded and firsts.tolist() == [example.first for example in built]
    assert store.sizes(np.arange(len(store))).tolist() == [len(example.ids) for example in built]


def test_every_example_comes_once_an_epoch_whatever_the_division(undisturbed: tuple[Run, Any]) -> None:
    store = examples.Store(undisturbed[0].directory / "examples")
    masking = Masking(0.15, 4, (2, 3))
    keys: dict[str, Any] = {"length": 32, "batch_size": 12, "seed": 5}
    whole = Batches(store, masking, **keys)
    epochs = 3
    order = np.concatenate([whole.examples(step) for step in range(-(-epochs * len(store) // 12))])
    for epoch in range(epochs):
        part = order[epoch * len(store) : (epoch + 1) * len(store)]
        assert (np.sort(part) == np.arange(len(store))).all() and (part != np.arange(len(store))).any()
    assert (order[: len(store)] != order[len(store) : 2 * len(store)]).any()
    divided = [Batches(store, masking, **keys, micro_batches=3, processes=2, process=p) for p in (0, 1)]
    for step in (0, 40, 41):  # 41 spans two epochs or more
        pieces = [one[3 * step + micro] for micro in range(3) for one in divided]
        for name, value in whole[step].items():
            together = np.concatenate([piece[name] for piece in pieces]) if value.ndim else pieces[0][name]
            assert (together == value).all(), name


@pytest.mark.slow
def test_records_with_nothing_to_predict_are_refused(corpus_text: Path, tmp_path: Path) -> None:
    run = native(corpus_text, tmp_path / "run")
    tokens = {token: number for number, token in enumerate(vocab.read(run.vocabulary))}
    for ids, says in (([7], None), ([], "without a token to predict")):
        (tmp_path / "records").mkdir(exist_ok=True)
        writer = upstream_records.RecordWriter(str(tmp_path / "records" / "pretrain_data.tfrecord-0-of-1"))
        writer.write(upstream_records.Example(tokens, ids, ids, 32).SerializeToString(deterministic=True))
        writer.close()
        if says is None:
            assert native_engine.take(run, tmp_path / "records", None) == 1
        else:
            with pytest.raises(UsageError, match=says):
                native_engine.take(run, tmp_path / "records", None)


def test_a_batch_with_nothing_to_mask_is_said(tmp_path: Path) -> None:
    """[CLS] and [SEP] are never masked; a store of nothing else trains nothing."""
    examples.write(tmp_path / "store", [examples.Example([2, 3], 2)] * 4 + [examples.Example([2, 9, 3], 3)] * 4, 20)
    batches = Batches(Store(tmp_path / "store"), Masking(0.15, 4, (2, 3)), length=8, batch_size=8, seed=0)
    assert batches[0]["positions"].any()
    (tmp_path / "empty").mkdir()
    examples.write(tmp_path / "empty" / "store", [examples.Example([2, 3], 2)] * 8, 20)
    batches = Batches(Store(tmp_path / "empty" / "store"), Masking(0.15, 4, (2, 3)), length=8, batch_size=4, seed=0)
    with pytest.raises(StageFailed, match="no example of step 1 has a token that could be masked"):
        batches[0]
