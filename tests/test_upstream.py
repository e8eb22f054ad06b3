"""google-research/electra itself: complete runs, and defects of its scripts that stay fixed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_weights
from conftest import SPANISH, TESTS, child, git, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_wrap import events, paths, subprocesses
from electra_wrap.data import parts, vocab
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.files import is_intact
from electra_wrap.pipeline import check
from electra_wrap.pipeline.execute import execute
from electra_wrap.pipeline.plan import plan, select
from electra_wrap.pipeline.stages import STAGES
from electra_wrap.profile import NETWORKS, Profile, toml
from electra_wrap.run import Run
from electra_wrap.upstream import checkout, engine
from electra_wrap.upstream.hparams import hparams

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("upstream")]

CASES = pytest.mark.parametrize(
    ("lowercase", "strip_accents"), [(False, False), (True, False), (True, True)]
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path, upstream: Path) -> Run:
    """A complete run of four steps."""
    run = Run(tiny(corpus_text), tmp_path_factory.mktemp("finished") / "run")
    execute(run, until="check")
    return run


def train_other(run: Run, model_name: str, **changes: Any) -> list[dict[str, float]]:
    """Train another model on a run's data, with changed hparams; return its steps' scalars."""
    values = hparams(run.profile, run.vocab_size) | changes
    train = run.profile.train.model_copy(update={"steps": values["num_train_steps"]})
    profile = run.profile.model_copy(update={"model_name": model_name, "train": train})
    logged: list[events.Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "hparams", lambda profile, vocab_size: values)
        engine.train(Run(profile, run.directory), [], logged.append)
    return [step.scalars for step in logged]


def logged_losses(run: Run) -> list[float]:
    lines = run.log_file("train").read_text(encoding="utf-8").splitlines()
    parsed = map(events.parse, lines)
    return [event.scalars["loss/total"] for event in parsed if isinstance(event, events.Step)]


def steps(model_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in engine.checkpoints(model_dir)]


def test_run_exports_models_that_load(finished: Run, cli: Callable[..., Any]) -> None:
    detected = finished.results("check")["detected"][0]
    assert detected["text"] == check.TEXTS[0]
    assert len(detected["tokens"]) == len(detected["replaced"])
    card = (finished.exported / "generator" / "README.md").read_text(encoding="utf-8")
    assert "language: es" in card and "trained for 4 steps" in card
    done = cli("detect", "--model", str(finished.directory), "--json", SPANISH[0])
    assert json.loads(done.stdout)[0]["text"] == SPANISH[0]
    shown = cli("detect", "--model", str(finished.exported), "--replace", SPANISH[0]).stdout
    assert re.search(r" \d+\.\d%", shown)


def test_tensorflow_optimizes_the_graph_without_errors(finished: Run) -> None:
    """With the unpatched graph, optimizers fail: `layout failed`, `topological sort failed`."""
    log = finished.log_file("train").read_text(encoding="utf-8")
    assert "Model is built!" in log
    errors = r"^E\d.*(failed: OUT_OF_RANGE|topological sort|tfg_optimizer)"
    assert not re.search(errors, log, re.M)


def test_finished_run_is_up_to_date_and_more_steps_resume(finished: Run, corpus_text: Path) -> None:
    again = Run(tiny(corpus_text), finished.directory)
    assert plan(again, select(again, STAGES, "check")) == []
    more = Run(tiny(corpus_text, steps=6), finished.directory)
    planned = [step.stage.name for step in plan(more, select(more, STAGES, "check"))]
    assert planned == ["train", "evaluate", "convert", "check"]
    execute(more, until="train")
    assert len(logged_losses(more)) == 6 and steps(more.model_dir)[-1] == 6


def test_same_profile_gives_same_records_and_losses(
    finished: Run, corpus_text: Path, tmp_path: Path
) -> None:
    twin = Run(tiny(corpus_text), tmp_path / "twin")
    execute(twin, until="train")
    for name in ("corpus", "vocab.txt", *engine.EXAMPLES):
        assert twin.digest(twin.directory / name) == finished.digest(finished.directory / name)
    assert logged_losses(twin) == logged_losses(finished)[:4]
    other = Run(tiny(corpus_text, "train.seed=1"), tmp_path / "other")
    execute(other, until="train")
    records = engine.EXAMPLES[0]
    assert other.digest(other.directory / records) != twin.digest(twin.directory / records)
    assert logged_losses(other) != logged_losses(twin)


def test_zero_warmup_steps_train_and_log_every_is_respected(
    finished: Run, corpus_text: Path
) -> None:
    settings = ("train.warmup_steps=0", "train.log_every=3", "model_name=cold")
    run = Run(tiny(corpus_text, *settings, steps=7), finished.directory)
    log = run.log_file("train")
    log.rename(log.with_suffix(".before"))
    execute(run, until="train")
    losses = logged_losses(run)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    execute(run, until="convert")  # refuses weights that are not finite
    log.with_suffix(".before").replace(log)


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
    assert steps(finished.directory / "models" / name) == [0]


def test_blank_lines_separate_documents_as_the_profile_says(finished: Run, tmp_path: Path) -> None:
    """Upstream's own flag is true whatever its value."""
    sizes, log = {}, tmp_path / "log"
    for value in (True, False):
        values = finished.profile.model_dump()
        values["corpus"]["blank_lines_separate_documents"] = value
        run = Run(Profile.model_validate(values), finished.directory)
        out = tmp_path / str(value)
        out.mkdir()
        jobs = {"numbers": [0, 1], "workers": 2, "inputs": {}}
        engine.build_examples(run, run.corpus, out, jobs, log, lambda event: None)
        sizes[value] = sum(
            parts.read_metadata(out / part)["examples"] for part in ("00000", "00001")
        )
    # No document has the length of an example. Cut at each document, examples have less text.
    assert sizes[True] > 1.05 * sizes[False]
    command = log.read_text(encoding="utf-8").split("\n$ ")[-1].splitlines()[0]
    done = subprocess.run(
        [argument.replace("=False", "=no") for argument in shlex.split(command)],
        env=subprocesses.child_environment({}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "invalid bool value: 'no'" in done.stderr


@pytest.fixture(scope="module")
def slow_script(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned script without the patch that caches tokens and avoids TensorFlow."""
    directory = tmp_path_factory.mktemp("slow")
    git(directory, "clone", "--quiet", "--no-checkout", checkout.Pin.read().url, "electra")
    work = directory / "electra"
    git(work, "checkout", "--quiet", checkout.Pin.read().commit)
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        if "words-once" not in patch.name:
            git(work, "apply", "--unidiff-zero", str(patch))
    return work / "build_pretraining_dataset.py"


@CASES
def test_fast_script_writes_the_records_of_the_slow_one(
    slow_script: Path,
    upstream: Path,
    corpus_text: Path,
    tmp_path: Path,
    lowercase: bool,
    strip_accents: bool,
) -> None:
    """Byte for byte, with empty lines, dropped characters, CJK, and long and unknown words."""
    odd = [*SPANISH, "\u200b\u200d", "una [MASK] y [SEP]", "x " * 100, "", "", "ñ" * 201]
    odd += ["中文。Ωμέγας\u0301 ﬁn\xad", "½°§«a»—b_c", "a+b=c $5 co\xadma x\xa0y\x07z"]
    text = tmp_path / "text"
    text.mkdir()
    lines = corpus_text.read_text(encoding="utf-8").split("\n")[:300]
    lines += [*odd * 9, *reversed(odd)]
    (text / "part-00000.txt").write_text("\n".join(lines), encoding="utf-8")
    vocabulary = tmp_path / "vocab.txt"
    rules = {"lowercase": lowercase, "strip_accents": strip_accents}
    vocab.train(text, vocabulary, vocab_size=400, sample_bytes=None, **rules)
    tokens = vocab.read(vocabulary)
    tokens[300:300] = [f"unused{number}" for number in range(300_000)]  # more than any cache
    vocabulary.write_text("\n".join(tokens), encoding="utf-8")
    arguments = [
        f"--corpus-dir={text}",
        f"--vocab-file={vocabulary}",
        "--max-seq-length=48",
        "--seed=3",
        "--num-processes=1",
        "--num-out-files=3",
        "--do-lower-case" if lowercase else "--no-lower-case",
        "--do-strip-accents" if strip_accents else "--no-strip-accents",
    ]
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    fast.mkdir()
    jobs = json.dumps({"numbers": [0], "workers": 1, "inputs": {}})
    environment = subprocesses.child_environment({})
    for command in (
        [slow_script, f"--output-dir={slow}"],
        [upstream / slow_script.name, f"--output-dir={fast}", f"--jobs={jobs}"],
    ):
        subprocess.run([sys.executable, *command, *arguments], env=environment, check=True)
    written = sorted(slow.iterdir())
    assert len(written) == 3
    for file in written:
        assert file.read_bytes() == (fast / "00000" / file.name).read_bytes()
    assert parts.read_metadata(fast / "00000")["examples"] > 100


def test_failing_process_fails_the_stage(finished: Run, tmp_path: Path) -> None:
    """Upstream's own script ends with code 0, without a part of the records."""
    run = Run(finished.profile, tmp_path / "run")
    execute(run, until="vocab")
    (run.corpus / "part-00001.txt").write_bytes(b"\xff\xfe no text \xff\n")
    (examples,) = (stage for stage in STAGES if stage.name == "examples")
    with pytest.raises(StageFailed, match=r"UnicodeDecodeError.*the whole log is"):
        examples.execute(run)
    assert not (run.directory / engine.EXAMPLES[0]).exists()


@pytest.fixture(scope="module")
def character_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every character of the first planes, alone and inside a word, and a few words."""
    points = [*range(0x21, 0x3000), *range(0xAC00, 0xAC40), *range(0x4E00, 0x4E40)]
    points += [*range(0x1F600, 0x1F610), 0xFFFD]
    characters = [chr(p) for p in points if chr(p).strip() == chr(p)]
    words = ["niño", "##ción", "pájaro", "##s", "los", "Los", "##ndo", "habla"]
    tokens = [*vocab.SPECIAL_TOKENS, *words, *characters, *(f"##{c}" for c in characters)]
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in dict.fromkeys(tokens)), encoding="utf-8")
    vocab.read(path)
    return path


@pytest.fixture(scope="module")
def upstream_tokens(
    upstream: Path, character_vocabulary: Path
) -> Iterator[Callable[..., list[list[str]]]]:
    script, pipe = TESTS / "children" / "upstream_tokens.py", subprocess.PIPE
    command = [sys.executable, script, upstream, character_vocabulary]
    environment = subprocesses.child_environment({})
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as server:

        def tokenize(
            lowercase: bool, strip_accents: bool, *texts: str, words: bool = False
        ) -> list[list[str]]:
            request = [lowercase, strip_accents, texts, words]
            print(json.dumps(request), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield tokenize


@CASES
def test_transformers_gives_the_tokens_of_training(
    upstream_tokens: Any,
    character_vocabulary: Path,
    tmp_path: Path,
    lowercase: bool,
    strip_accents: bool,
) -> None:
    rules = {"lowercase": lowercase, "strip_accents": strip_accents}
    vocab.write_tokenizer(tmp_path, vocab.read(character_vocabulary), max_length=32, **rules)
    (tmp_path / "config.json").write_text('{"model_type": "electra"}', encoding="utf-8")
    answer = json.loads(child("hf_tokens.py", tmp_path, *SPANISH, HF_HUB_OFFLINE="1"))
    assert answer["auto"] == answer["fast"] == upstream_tokens(lowercase, strip_accents, *SPANISH)
    assert any("á" in t for tokens in answer["auto"] for t in tokens) != strip_accents


def known_to_differ(character: str) -> bool:
    """The tokenizers library has an older Unicode, and an error in a range of CJK."""
    point = ord(character)
    new = point >= 0x600 and unicodedata.ucd_3_2_0.category(character) == "Cn"
    rare = unicodedata.category(character) in {"Po", "Ps", "Pe", "Pd", "Cf", "Mn", "Mc"}
    return (new and rare) or 0x2B820 <= point < 0x2B920 or point in {0x166D, 0x1734, 0x1885, 0x1886}


@CASES
def test_every_character_is_normalized_as_in_training(
    upstream_tokens: Any, character_vocabulary: Path, lowercase: bool, strip_accents: bool
) -> None:
    """Kept, dropped, split, lowercased, stripped; alone and inside a word; all of Unicode."""
    tokenizer = vocab.build_tokenizer(
        vocab.read(character_vocabulary), lowercase=lowercase, strip_accents=strip_accents
    )
    unassigned = ("Cn", "Cs", "Co")
    characters = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in unassigned]
    texts = [f"x{c}y {c}" for c in characters]
    normalized = map(tokenizer.normalizer.normalize_str, texts)
    split = map(tokenizer.pre_tokenizer.pre_tokenize_str, normalized)
    ours = [[word for word, _ in words] for words in split]
    theirs = upstream_tokens(lowercase, strip_accents, *texts, words=True)
    differ = [c for c, a, b in zip(characters, ours, theirs, strict=True) if a != b]
    assert [c for c in differ if not known_to_differ(c)] == []
    assert len(characters) > 140_000 and len(differ) < 800


#: Alphabets of text that is hard to tokenize.
ALPHABETS = [
    [*"ΣσςΑΐ-. ", "α'", "Σ’", "Α\u0301", "\u0301"],
    "aáñÑÜßİıÅǅﬁŉ\u0301\u0308\u0327\u0345\u200b\u200d\u2060\ufeff\xad\xa0\u3000",
    "一丁〇、。가각豈\U00020000\U0002ceb0\U0002f800\u3400\uff21\uff0c",
    "\x00\x01\x07\t\n\r\x0b\x0c\x1c\x7f\x85\u2028\u2029\ufffd\ue000\U000e0001",
    "😀👍🏽🇪🇸❤\ufe0f¿¡«»—…'’`^$€©%+<=>|~\\",
]
WORDS = ["a" * 200, "á" * 201, "pájaros", "Los", "hablando", "niño", "ΣΑΣ", "[CLS", "MASK]", "##s"]
ANY_CHARACTER = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.lists(
    st.one_of(
        *(st.lists(st.sampled_from(alphabet), max_size=6).map("".join) for alphabet in ALPHABETS),
        st.text(ANY_CHARACTER.filter(lambda c: not known_to_differ(c)), max_size=12),
        st.sampled_from(WORDS),
    ),
    max_size=8,
).map(" ".join)


@CASES
def test_any_text_gives_the_tokens_of_training(
    upstream_tokens: Any, character_vocabulary: Path, lowercase: bool, strip_accents: bool
) -> None:
    tokenizer = vocab.build_tokenizer(
        vocab.read(character_vocabulary), lowercase=lowercase, strip_accents=strip_accents
    )

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(TEXTS)
    def check(text: str) -> None:
        ours = tokenizer.encode(text, add_special_tokens=False).tokens
        assert [ours] == upstream_tokens(lowercase, strip_accents, text)

    check()


@pytest.mark.parametrize("sizes", test_weights.SIZES.values(), ids=test_weights.SIZES)
def test_logits_equal_those_of_upstreams_graph(
    upstream: Path, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    """Every variable has a random value, biases and norms too, so that any error shows."""
    test_weights.checkpoints({tmp_path / "c": test_weights.variables(**sizes)})
    test_weights.to_transformers(tmp_path / "c", tmp_path / "hf")
    arrays = tmp_path / "in.npz"
    test_weights.inputs(arrays)
    values = {
        "vocab_size": test_weights.VOCABULARY,
        "embedding_size": sizes["embedding"],
        "model_hparam_overrides": {"hidden_size": sizes["hidden"], "num_hidden_layers": 2},
        "generator_hidden_size": sizes["generator_hidden"] / sizes["hidden"],
        "untied_generator_embeddings": not sizes.get("tied", True),
    }
    theirs, ours = tmp_path / "theirs.npz", tmp_path / "ours.npz"
    child("upstream_logits.py", upstream, tmp_path / "c", arrays, theirs, json.dumps(values))
    child("hf_logits.py", tmp_path / "hf", arrays, ours, HF_HUB_OFFLINE="1")
    our_logits, their_logits = np.load(ours), np.load(theirs)
    for network in NETWORKS:
        assert our_logits[network].shape == their_logits[network].shape
        assert their_logits[network].std() > 0.05
        difference = np.abs(our_logits[network] - their_logits[network])
        assert difference.max() < test_weights.TOLERANCE


def test_training_continues_at_the_same_loss_after_a_round_trip(
    finished: Run, tmp_path: Path
) -> None:
    """From the checkpoint, and from one that was converted to transformers and back."""
    models, step = finished.directory / "models", steps(finished.model_dir)[-1]
    test_weights.to_transformers(finished.model_dir, tmp_path / "hf")
    test_weights.to_tensorflow(tmp_path / "hf", models / "back", step=step)
    shutil.copytree(finished.model_dir, models / "copy")
    losses = [train_other(finished, name, num_train_steps=step + 1) for name in ("copy", "back")]
    (copied,), (back,) = losses
    assert copied["loss/total"] == back["loss/total"]


def test_damaged_record_stops_training(finished: Run, tmp_path: Path) -> None:
    """TensorFlow checks the records, should the wrapper not notice."""
    run = Run(finished.profile, tmp_path / "run")
    execute(run, until="examples")
    for path in (run.directory / engine.EXAMPLES[0]).iterdir():
        content = bytearray(path.read_bytes())
        content[20] ^= 1  # in the first record
        path.write_bytes(content)
    with pytest.raises(StageFailed, match=r"corrupted record at .*the whole log is"):
        train_other(run, "m")


def test_imported_records_are_verified_and_copied(finished: Run, tmp_path: Path) -> None:
    records = finished.directory / engine.EXAMPLES[0]
    examples = finished.results(finished.examples_record)["examples"]
    assert engine.import_records(finished, records, tmp_path / "imported") == examples
    assert finished.digest(tmp_path / "imported") == finished.digest(records)
    other = Run(tiny(tmp_path, "model.max_seq_length=16"), finished.directory)
    with pytest.raises(UsageError, match=r"examples of 32 tokens .* the profile says 16"):
        engine.import_records(other, records, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_interrupted_training_saves_and_resumes(
    finished: Run, corpus_text: Path, tmp_path: Path
) -> None:
    settings = ("train.save_every=5", "train.keep=2", "model_name=long")
    values = tiny(corpus_text, *settings, steps=100_000).model_dump()
    profile = tmp_path / "long.toml"
    profile.write_text(toml(values), encoding="utf-8")
    command = [sys.executable, "-m", "electra_wrap", "run", "--until", "train"]
    command += ["--profile", str(profile), "--run-dir", str(finished.directory)]
    environment = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    log, deadline = finished.log_file("train"), time.monotonic() + 120
    while "/100000 = " not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    model_dir = finished.directory / "models" / "long"
    kept = engine.checkpoints(model_dir)
    checksums = {engine.checksums(checkpoint) for checkpoint in kept}
    assert len(kept) == 2 and all(map(is_intact, checksums))
    assert set(model_dir.glob("*.sha256")) == checksums, "those of removed checkpoints are removed"
    assert f"the same command resumes at step {kept[-1].step:,}" in error.splitlines()[-1]


def test_learning_rate_uses_the_step_before_it_advances(finished: Run) -> None:
    """Read after the step advanced, the learning rate would warm up a step too early."""
    settings = {"learning_rate": 1.0, "num_warmup_steps": 4, "num_train_steps": 10}
    logged = train_other(finished, "rates", **settings)
    rates = [scalars["train/learning_rate"] for scalars in logged]
    assert rates[:5] == pytest.approx([0.0, 0.25 * 0.9, 0.5 * 0.8, 0.75 * 0.7, 0.6])


def test_tpu_is_refused(finished: Run) -> None:
    with pytest.raises(StageFailed) as raised:
        train_other(finished, "tpu", use_tpu=True)
    assert raised.value.log_tail.endswith("TPUs are not supported: set use_tpu to false")


def test_launcher_is_refused_before_any_work(finished: Run) -> None:
    run = Run(finished.profile, finished.directory, launch="torchrun")
    with pytest.raises(UsageError, match='--launch is for engine = "native"'):
        engine.prepare(run)
