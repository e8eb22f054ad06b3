"""The native engine against upstream's graph, against itself, and against the arithmetic that it replaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_weights
from conftest import SPANISH, child, tiny
from safetensors.numpy import load_file

from electra_wrap import process, stages, vocab, weights
from electra_wrap.native import checkpoints, examples
from electra_wrap.native import engine as native_engine
from electra_wrap.native.batches import Batches, Masking
from electra_wrap.profile import NETWORKS
from electra_wrap.rundir import RunDir
from electra_wrap.stages import Run
from electra_wrap.upstream import engine as upstream_engine


def native(corpus: Path, directory: Path, *overrides: str, until: str = "examples", **keys: Any) -> Run:
    """A run of the native engine, done up to a stage."""
    run = Run(tiny(corpus, 'engine="native"', *overrides, **keys), RunDir(directory))
    stages.execute(run, until)
    return run


def make_vocabulary(path: Path, *texts: str) -> list[str]:
    """Write a vocabulary of the characters of the texts, alone and inside a word."""
    characters = sorted(set("".join(texts)) - {" ", "\n"})
    tokens = [*vocab.SPECIAL_TOKENS, *characters, *(f"##{c}" for c in characters)]
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return tokens


#: A shape with projections in both networks; an odd number of words, and more than one block of them would not do more.
SHAPE = {"hidden": 64, "generator_hidden": 32, "embedding": 24}
START, STEPS = 3, 20


@pytest.fixture(scope="module")
def continued(corpus_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose data is there, and a model at step 3 with weights and slots of its own: upstream's, and handed over."""
    directory = tmp_path_factory.mktemp("continued")
    tokens = make_vocabulary(directory / "vocab.txt", *SPANISH, "0123456789. ")
    run = native(
        corpus_text,
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
    child("native_steps.py", run.directory.path, out)
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
        relative(ours[f"{network}.{row.pytorch}"], their_gradients[row.tensorflow].T if row.transposed else their_gradients[row.tensorflow])
        for network, row in rows(run)
    )
    for file in ("model", *weights.SLOTS):
        for network in NETWORKS:
            end, their_end = (load_file(directory / "end" / network / f"{file}.safetensors") for directory in (out, theirs))
            assert set(end) == set(their_end)
            there = max(relative(end[row.pytorch], their_end[row.pytorch]) for name, row in rows(run) if name == network)
            found[file] = max(found.get(file, 0.0), there)
    return found


@pytest.mark.upstream
def test_twenty_steps_are_those_of_upstreams_graph(upstream: Path, continued: Run, tmp_path: Path) -> None:
    found = steps_of_both_engines(continued, upstream, tmp_path)
    assert max(found.values()) < 2e-5, found
    print(found)


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
        job = {"directory": str(run.directory / records), "jobs": len(list((run.directory / "corpus").iterdir()))}
        if name == "heldout_examples":
            job["jobs"] = 1
            if not run.recorded("corpus")["facts"]["held_out_lines"]:
                continue
        out = tmp_path / name
        number = process.call("electra_wrap.native.records", {**job, "out": str(out), "vocab_size": 300})
        assert number == len(examples.Store(run.directory / name)) > 0
        for file in ("tokens.bin", "index.bin", "store.json"):
            assert (out / file).read_bytes() == (run.directory / name / file).read_bytes(), file


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
