"""google-research/electra itself: complete runs, and defects of its scripts that stay fixed."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import oracle
import pytest
import test_vocab
import test_weights
from conftest import SPANISH, child, git, tiny

from electra_wrap import checkpoints, events, paths, subprocesses
from electra_wrap.data import tfrecords, tokenization, vocab
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.pipeline import execute
from electra_wrap.profile import NETWORKS, Profile, toml
from electra_wrap.run import Run
from electra_wrap.upstream import engine, environment
from electra_wrap.upstream.hparams import hparams

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("upstream")]

CASES = pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(False, False), (True, False), (True, True)]
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path, upstream: Path) -> Run:
    """A complete run of six steps, resumed after the fourth.

    TensorFlow would take its path for a pattern. A neighbour matches it; its records are damaged.
    """
    directory = tmp_path_factory.mktemp("finished")
    for name in ("pretrain_tfrecords", "heldout_tfrecords"):
        decoy = directory / "g1,s" / name / "pretrain_data.tfrecord-0-of-1"
        decoy.parent.mkdir(parents=True)
        decoy.write_bytes(b"damaged" * 99)
    execute(Run(tiny(corpus_text), directory / "g[1],?"), until="train")
    run = Run(tiny(corpus_text, steps=6), directory / "g[1],?")
    assert execute(run) == 3
    return run


def train_other(run: Run, model_name: str, **changes: Any) -> list[dict[str, float]]:
    """Train another model on a run's data, with changed hparams; return its steps' scalars."""
    values = hparams(run.profile, run.vocab_size) | changes
    train = run.profile.train.model_copy(update={"steps": values["num_train_steps"]})
    profile = run.profile.model_copy(update={"model_name": model_name, "train": train})
    other = Run(profile, run.directory)
    other.make_model_dir()
    found: list[events.Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "hparams", lambda profile, vocab_size: values)
        engine.train(other, [], found.append)
    return [event.scalars for event in found if isinstance(event, events.Step)]


def logged(run: Run, scalar: str = "loss/total") -> list[float]:
    lines = run.log_file("train").read_text(encoding="utf-8").splitlines()
    parsed = map(events.parse, lines)
    return [event.scalars[scalar] for event in parsed if isinstance(event, events.Step)]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_tensorflow_optimizes_the_graph_without_errors(finished: Run) -> None:
    """With the unpatched graph, optimizers fail: `layout failed`, `topological sort failed`."""
    log = finished.log_file("train").read_text(encoding="utf-8")
    assert "Model is built!" in log
    errors = r"^E\d.*(failed: OUT_OF_RANGE|topological sort|tfg_optimizer)"
    assert not re.search(errors, log, re.M)


def test_tensorboard_has_no_run_of_the_graph(finished: Run) -> None:
    """Without scalars, it would be a run of its own."""
    logs = {path.parent.name for path in finished.model_dir.rglob("*tfevents*")}
    assert logs == {"train", "eval"}


def test_same_profile_gives_same_records_and_losses(
    finished: Run, corpus_text: Path, tmp_path: Path
) -> None:
    assert execute(Run(finished.profile, finished.directory)) == 0
    twin = Run(tiny(corpus_text), tmp_path / "twin")
    execute(twin, until="train")
    for ours, theirs in zip(twin.examples, finished.examples, strict=True):
        assert content(ours) == content(theirs)
    assert logged(twin) == logged(finished)[:4]
    other = Run(tiny(corpus_text, "train.seed=1"), tmp_path / "other")
    execute(other, until="examples")
    assert content(other.examples[0]) != content(twin.examples[0])


def test_zero_warmup_steps_train_and_log_every_is_respected(finished: Run) -> None:
    changes = {"num_warmup_steps": 0, "iterations_per_loop": 3, "num_train_steps": 7}
    steps = train_other(finished, "cold", **changes)
    assert len(steps) == 2 and all(math.isfinite(step["loss/total"]) for step in steps)


def test_learning_rate_uses_the_step_before_it_advances(finished: Run) -> None:
    """Read after the step advanced, the learning rate would warm up a step too early."""
    rate = finished.profile.train.learning_rate
    expected = [share * rate for share in (0, 3 / 4, 2 / 4, 1 / 4, 2 / 6, 1 / 6)]
    assert logged(finished, "train/learning_rate")[:6] == pytest.approx(expected)


@pytest.mark.parametrize(("rate", "save_every", "step"), [(1e30, 3, 2), (1e39, 1, 1)])
def test_divergence_ends_training_and_is_not_saved(
    finished: Run, rate: float, save_every: int, step: int
) -> None:
    """A loss that is not finite between checkpoints; weights that are not after a finite loss."""
    name = f"diverges-{save_every}"
    message = f"diverged at step {step}: the loss is nan .* not finite. The last checkpoint is from"
    with pytest.raises(StageFailed, match=message):
        changes = {"learning_rate": rate, "num_warmup_steps": 0, "num_train_steps": 50}
        train_other(finished, name, save_checkpoints_steps=save_every, **changes)
    assert checkpoints.steps(finished.directory / "models" / name) == [0]


def test_blank_lines_separate_documents_as_the_profile_says(finished: Run) -> None:
    """Upstream's own flag is true whatever its value."""
    numbers = {}
    for value in (True, False):
        values = finished.profile.model_dump()
        values["corpus"]["blank_lines_separate_documents"] = value
        run = Run(Profile.model_validate(values), finished.directory)
        out = finished.directory / f"separate-{value}"
        numbers[value] = engine.build_examples(run, run.corpus, out)
    # No document has the length of an example. Cut at each document, examples have less text.
    assert numbers[True] > 1.05 * numbers[False]


@pytest.fixture(scope="module")
def slow_script(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned script without the patch that caches tokens and avoids TensorFlow."""
    work = tmp_path_factory.mktemp("slow") / "electra"
    git(upstream, "clone", "--quiet", str(upstream), str(work))
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        if "words-once" not in patch.name:
            git(work, "apply", "--unidiff-zero", str(patch))
    return work / "build_pretraining_dataset.py"


@CASES
def test_fast_script_writes_the_records_of_the_slow_one(
    slow_script: Path, upstream: Path, tmp_path: Path, lowercase: bool, strip_accents: bool
) -> None:
    """Byte for byte, with empty lines, dropped characters, CJK, and long and unknown words."""
    odd = [*SPANISH, "\u200b\u200d", "una [MASK] y [SEP]", "x " * 100, "", "", "ñ" * 201]
    odd += ["中文。Ωμέγας\u0301 ﬁn\xad", "½°§«a»—b_c", "a+b=c $5 co\xadma x\xa0y\x07z"]
    text, vocabulary = tmp_path / "text", tmp_path / "vocab.txt"
    text.mkdir()
    lines = [f"{i}. {line[i:]}" if line else "" for i in range(9) for line in [*SPANISH * 5, ""]]
    lines += [*odd * 9, *reversed(odd)]
    (text / "part-00000.txt").write_text("\n".join(lines), encoding="utf-8")
    rules = {"lowercase": lowercase, "strip_accents": strip_accents}
    vocab.train(text, vocabulary, vocab_size=400, sample_bytes=None, **rules)
    tokens = vocab.read(vocabulary)
    tokens[300:300] = [f"unused{number}" for number in range(300_000)]  # more than any cache
    vocabulary.write_text("\n".join(tokens), encoding="utf-8")
    arguments = [f"--corpus-dir={text}", f"--vocab-file={vocabulary}", "--max-seq-length=48"]
    arguments += ["--seed=3", "--num-processes=1", "--num-out-files=3"]
    arguments.append("--do-lower-case" if lowercase else "--no-lower-case")
    arguments.append("--do-strip-accents" if strip_accents else "--no-strip-accents")
    for name, script in (("slow", slow_script), ("fast", upstream / slow_script.name)):
        argv = [sys.executable, script, f"--output-dir={tmp_path / name}", *arguments]
        subprocess.run(argv, env=subprocesses.child_environment(), check=True)
    assert content(tmp_path / "fast") == content(tmp_path / "slow")
    written = list((tmp_path / "fast").iterdir())
    assert len(written) == 3 and sum(map(tfrecords.count, written)) > 100


@pytest.mark.parametrize("problem", ["fails", "is killed"])
def test_job_that_does_not_end_fails_the_stage(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    """Upstream's own script ends with code 0, without a part of the records."""
    ignored = shutil.ignore_patterns("*tfrecords", "models")
    shutil.copytree(finished.directory, tmp_path / "run", ignore=ignored, symlinks=True)
    run, shard, message = Run(finished.profile, tmp_path / "run"), "\udcff", "UnicodeDecodeError"
    if problem == "is killed":  # by the limit for a process's seconds of computing
        shard = "".join(f"{number:x}\n" for number in range(2_000_000))
        message = "terminated abruptly"
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nulimit -t 3\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(environment, "python", lambda: str(python))
    (run.corpus / "part-00001.txt").write_text(shard, "utf-8", "surrogateescape")
    with pytest.raises(StageFailed, match=message):
        execute(run, until="examples")
    assert not run.examples[0].exists() and not run.results(run.examples_record)


#: All characters, and those that are unassigned beside them, which newer Unicode has.
POINTS = (*range(0xD800), *range(0xE000, 0x323B0), *range(0xE0000, 0xE0200))
CHARACTERS = [*map(chr, POINTS)]

#: Those that stripping accents drops or decomposes otherwise than upstream. Older Unicode had the
#: one as another kind of mark, and not the other.
OTHER_MARKS = {"\u1734", "\U00011938"}

#: Alphabets of text that is hard to tokenize.
ALPHABETS = [
    [*"ΣΣΣσςΑΐ-. ^`´:·ªⅣ", "α'", "Σ’", "Α\u0301", "\u0301", "\u0345", "\u02b0", "\x07"],
    "aáñÑÜßİıÅǅﬁŉ\u0301\u0308\u0327\u0345\u200b\u200d\u2060\ufeff\xad\xa0\u3000",
    "一丁〇、。가각豈\U00020000\U0002ceb0\U0002f800\u3400\uff21\uff0c",
    "\x00\x01\x07\t\n\r\x0b\x0c\x1c\x7f\x85\u2028\u2029\ufffd\ue000\U000e0001",
    "😀👍🏽🇪🇸❤\ufe0f¿¡«»—…'’`^$€©%+<=>|~\\",
    ["a" * 200, "á" * 201, "pájaros", "Los", "niño", "ΣΑΣ", "[CLS", "MASK]", "##s", " "],
    [c for c in CHARACTERS if c not in OTHER_MARKS],
]


@CASES
def test_transformers_gives_the_tokens_of_training(
    upstream: Path, tmp_path: Path, lowercase: bool, strip_accents: bool
) -> None:
    """Of random text. And each character of Unicode is kept, dropped, split, … as in training."""
    points = [*range(0x21, 0x3000), *range(0xAC00, 0xAC40), *range(0x4E00, 0x4E40)]
    characters = [chr(p) for p in [*points, *range(0x1F600, 0x1F610), 0xFFFD] if chr(p).strip()]
    tokens = [*tokenization.SPECIAL_TOKENS, "niño", "##ción", "pájaro", "Los", "los", "##ndo"]
    tokens += [*characters, *(f"##{c}" for c in characters)]
    rules = {"lowercase": lowercase, "strip_accents": strip_accents}
    tokenization.write_tokenizer(tmp_path, tokens, max_length=32, **rules)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    random = Random(0)
    texts = ["".join(random.choices(random.choice(ALPHABETS), k=6)) for _ in range(8000)]
    texts = SPANISH + [" ".join(texts[i : i + 8]) for i in range(0, 8000, 8)]
    words = [f"x{c}y {c}" for c in CHARACTERS]
    request = json.dumps([lowercase, strip_accents, texts, words])
    vocabulary = tmp_path / "vocab.txt"
    theirs = json.loads(child("upstream_tokens.py", upstream, vocabulary, stdin=request))
    ours = json.loads(child("hf_tokens.py", tmp_path, stdin=json.dumps(texts), HF_HUB_OFFLINE="1"))
    assert ours["auto"] == theirs["tokens"] and ours["fast"][:10] == theirs["tokens"][:10]
    assert ours["saved"] == ours["auto"]
    assert any("á" in token for token in itertools.chain(*ours["auto"][:10])) != strip_accents
    tokenizer = tokenization.build_tokenizer(tokens, **rules)
    normalized = map(tokenizer.normalizer.normalize_str, words)
    split = map(tokenizer.pre_tokenizer.pre_tokenize_str, normalized)
    found = [[word for word, _ in pair] for pair in split]
    pairs = zip(CHARACTERS, found, theirs["words"], strict=True)
    differ = [c for c, our_words, their_words in pairs if our_words != their_words]
    assert set(differ) == (OTHER_MARKS if strip_accents else set())


def test_ids_are_upstreams_whatever_the_lines_of_the_vocabulary(
    upstream: Path, tmp_path: Path
) -> None:
    path = test_vocab.write(tmp_path / "v.txt", test_vocab.ODD)
    texts = ["niño aa a b", "\u2028 ## #", *SPANISH]
    request = json.dumps([False, False, texts, []])
    theirs = json.loads(child("upstream_tokens.py", upstream, path, stdin=request))
    tokens = vocab.read(path)
    encode = tokenization.line_encoder(tokens, lowercase=False, strip_accents=False)
    assert [encode(text) for text in texts] == theirs["ids"]
    assert [tokens.index(token) for token in tokenization.SPECIAL_TOKENS] == theirs["special"]


def test_logits_of_upstreams_graph(upstream: Path, tmp_path: Path) -> None:
    """They are those of the oracle, as those of transformers are (test_weights.py).

    Every variable has a random value, biases and norms too, so that any error shows.
    """
    values, settings = {}, {}
    for name, sizes in test_weights.SIZES.items():
        values[tmp_path / name] = test_weights.variables(**sizes)
        settings[str(tmp_path / name)] = {
            "vocab_size": test_weights.VOCABULARY,
            "embedding_size": sizes["embedding"],
            "model_hparam_overrides": {"hidden_size": sizes["hidden"], "num_hidden_layers": 2},
            "generator_hidden_size": sizes["generator_hidden"] / sizes["hidden"],
            "untied_generator_embeddings": not sizes.get("tied", True),
        }
    test_weights.checkpoints(values)
    arrays = test_weights.inputs(tmp_path / "in.npz")
    child("upstream_logits.py", upstream, tmp_path / "in.npz", stdin=json.dumps(settings))
    for directory, variables in values.items():
        theirs = np.load(directory / "logits.npz")
        exact = {name: value.astype(np.float64) for name, value in variables.items()}
        for network in NETWORKS:
            logits, _ = getattr(oracle, network)(exact, *arrays)
            assert theirs[network].shape == logits.shape and logits.std() > 0.05
            assert np.abs(theirs[network] - logits).max() < test_weights.TOLERANCE


def start_run(run: Run) -> subprocess.Popen[str]:
    """Start the command that trains a run's model, as a user does."""
    profile = run.directory.with_name("profile.toml")
    profile.write_text(toml(run.profile.known_values()), encoding="utf-8")
    argv = [sys.executable, "-m", "electra_wrap", "run", "--until", "train"]
    argv += ["--profile", str(profile), "--run-dir", str(run.directory)]
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    return subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)


def wait_until(is_true: Callable[[], object], command: subprocess.Popen[str]) -> None:
    while not is_true():
        assert command.poll() is None, command.communicate()
        time.sleep(0.1)


def test_killed_start_from_weights_is_repeated(
    finished: Run, corpus_text: Path, tmp_path: Path
) -> None:
    """The weights are evaluated first."""
    keys = {"tokenizer.source": finished.vocabulary, "model.init_from": finished.directory}
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in keys.items()]
    run = Run(tiny(corpus_text, *overrides, steps=2), tmp_path / "run")
    command = start_run(run)
    wait_until(
        (run.directory / "logs/evaluate.log").exists, command
    )  # the checkpoint of step 0 is there
    command.kill()
    command.communicate()
    assert run.initial.is_dir()
    execute(run, until="train")
    assert sorted(run.model.evaluations) == [0] and not run.initial.exists()


def test_training_continues_at_the_same_loss_after_a_round_trip(
    finished: Run, tmp_path: Path
) -> None:
    """From a checkpoint that was converted to transformers and back."""
    engine.export(finished, 4, tmp_path / "hf")
    model_dir = finished.model_dir.with_name("back")
    test_weights.to_tensorflow(tmp_path / "hf", model_dir, step=4)
    checkpoints.finish(model_dir, 4, engine.checkpoint_files(model_dir, 4))
    (back,) = train_other(finished, "back", num_train_steps=5)
    assert back["loss/total"] == logged(finished)[4]


def test_damaged_record_stops_training(finished: Run, tmp_path: Path) -> None:
    """TensorFlow checks the records, should the wrapper not notice."""
    ignored = shutil.ignore_patterns("models")
    shutil.copytree(finished.directory, tmp_path / "run", ignore=ignored, symlinks=True)
    run = Run(finished.profile, tmp_path / "run")
    for path in run.examples[0].iterdir():
        records = bytearray(path.read_bytes())
        records[20] ^= 1  # in the first record
        path.write_bytes(records)
    with pytest.raises(StageFailed, match="corrupted record at "):
        train_other(run, "m")


def test_interrupted_training_saves_and_resumes(finished: Run, corpus_text: Path) -> None:
    keys = ("train.save_every=5", "train.keep=2", "model_name=long")
    run = Run(tiny(corpus_text, *keys, steps=100_000), finished.directory)
    log = run.log_file("train")
    before, command = log.read_bytes(), start_run(run)
    wait_until(lambda: b'"step": 11,' in log.read_bytes()[len(before) :], command)
    command.send_signal(signal.SIGTERM)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 130 and "the same command resumes" in error.splitlines()[-1], error
    kept = checkpoints.steps(run.model_dir)
    assert len(kept) == 2 and kept[-1] >= 11
    assert all(checkpoints.latest_intact(run.model_dir, step) == step for step in kept)
    assert len(list(run.model_dir.glob("*.index"))) == 2


def test_launcher_is_refused_before_any_work(finished: Run) -> None:
    run = Run(finished.profile, finished.directory, launch="torchrun")
    with pytest.raises(UsageError, match='--launch is for engine = "native"'):
        engine.prepare(run)
