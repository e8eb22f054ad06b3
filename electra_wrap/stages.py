"""The stages from text to model, in order, and what makes each up to date.

A stage is a function of some keys of the profile and of earlier stages' files. The manifest holds what a stage
was made from (`inputs`); it is up to date if its inputs are the same and its files are as it left them. What no
longer fits is set aside, never overwritten; a model that has trained is not even set aside, but refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from electra_wrap import card, check, corpus, parts, process, sources, storage, training, vocab
from electra_wrap.errors import ElectraWrapError, EnvironmentLacks, Interrupted, StageFailed, UsageError
from electra_wrap.profile import ENGINES, NETWORKS, Profile
from electra_wrap.progress import Meter, duration, say
from electra_wrap.rundir import RunDir, finish, output, partial, remove, whole, write_json, write_text

#: Keys of hparams.json with which a model may go on (they say how long and how often, not what), and those that
#: `_data_inputs` has under the profile's names.
_CONTINUABLE = (
    *("num_train_steps", "save_checkpoints_steps", "keep_checkpoint_max", "iterations_per_loop", "eval_batch_size"),
    *("max_seq_length", "do_lower_case"),
)

#: What an attempt to train that was killed leaves of what it was writing.
_CUT_SHORT = (
    *("exported-*", "*.partial", ".*.removed"),
    *("model.ckpt-*_temp", "model.ckpt-*.tempstate*", "checkpoint.tmp*", "graph.pbtxt.tmp*"),
)

#: Asked of every converted model: one sentence as it is, one with a word that does not belong.
QUESTIONS = ("Los pájaros están hablando", "Los pájaros están cantando en la piedra del mañana")


@dataclasses.dataclass
class Run:
    """One run: a profile in a run directory."""

    profile: Profile
    directory: RunDir
    upstream: str | None = None
    launch: str | None = None

    @property
    def engines(self) -> list[Any]:
        """The modules of all engines, any of which may have made what is here."""
        return [engine(name) for name in ENGINES]

    @property
    def engine(self) -> Any:
        """The module that trains: upstream/engine.py or native/engine.py."""
        return engine(self.profile.engine)

    def checkpoint(self, wanted: int | None = None) -> tuple[int, Any] | None:
        """Step of the latest checkpoint that is whole, or of the `wanted` one, and the engine that made it, if any."""
        found = [(step, one) for one in self.engines for step in one.steps(self.model_dir)]
        found = [(step, one) for step, one in found if wanted in (None, step)]
        latest_first = sorted(found, key=lambda pair: (pair[0], pair[1] is self.engine), reverse=True)
        return next(((step, one) for step, one in latest_first if self.whole(step, one)), None)

    def whole(self, step: int, made_by: Any) -> bool:
        """Whether a checkpoint's files are as its engine left them."""
        return whole(made_by.sums(self.model_dir, step), self.directory.digest)

    @property
    def step(self) -> int | None:
        """Step of the latest checkpoint that is whole."""
        found = self.checkpoint()
        return found[0] if found else None

    @property
    def vocabulary(self) -> Path:
        return self.directory / "vocab.txt"

    @property
    def model_dir(self) -> Path:
        return self.directory / "models" / self.profile.model_name

    @property
    def model(self) -> dict[str, Any]:
        """What the manifest says of the model as such."""
        models: dict[str, dict[str, Any]] = self.directory.manifest["models"]
        return models.setdefault(self.profile.model_name, {})

    def log(self, stage: str) -> Path:
        return self.directory / "logs" / f"{stage}.log"

    def digest(self, name: str) -> str:
        return self.directory.digest(self.directory / name)

    def hparams(self) -> dict[str, Any]:
        return self.profile.hparams(len(vocab.read(self.vocabulary)))

    def key(self, stage: str) -> str:
        """The manifest's key of a stage: a run directory may train several models, one after the other."""
        return f"train {self.profile.model_name}" if stage == "train" else stage

    def recorded(self, stage: str) -> dict[str, Any]:
        """The manifest's entry of a stage; empty if it never ran."""
        return dict(self.directory.manifest["stages"].get(self.key(stage), {}))


def open_run(directory: Path) -> Run:
    """The run in a directory, with the profile that it had last. UsageError if it is none."""
    try:
        text = (directory / "profile.json").read_text(encoding="utf-8")
        return Run(Profile.model_validate_json(text), RunDir(directory))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise UsageError(
            f"{directory} is no run directory (it has no whole profile.json); give that of a `run`"
        ) from None


def engine(name: str) -> Any:
    """The module of an engine, by its name in profiles."""
    return importlib.import_module(f"electra_wrap.{name}.engine")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's name, what it is made from, what it leaves in the run directory, and the doing, which returns facts."""

    name: str
    inputs: Callable[[Run], dict[str, Any]]
    outputs: tuple[str, ...]
    do: Callable[[Run], dict[str, Any]]
    packages: tuple[str, ...] = ()
    #: What it works in, and goes on with after it was killed.
    scratch: tuple[str, ...] = ()


def _corpus_names(run: Run) -> list[str]:
    return corpus.find(run.profile.corpus.sources, run.directory.path)


def _corpus_inputs(run: Run) -> dict[str, Any]:
    keys = run.profile.corpus.model_dump(exclude={"source"})
    names = _corpus_names(run)
    return {
        "corpus.source": [name if sources.is_remote(name) else run.directory.digest(Path(name)) for name in names],
        **{f"corpus.{key}": value for key, value in keys.items()},
    }


def _corpus(run: Run) -> dict[str, Any]:
    keys, names = run.profile.corpus, _corpus_names(run)
    if records := [Path(name) for name in names if Path(name).match(corpus.RECORDS)]:
        if len({path.name for path in records}) < len(names):
            raise UsageError("corpus.source has records beside text, or of two directories; give one directory of them")
        with partial(run.directory / "heldout") as held_out, partial(run.directory / "corpus") as training:
            held_out.mkdir()
            training.mkdir()
            for path in records:
                shutil.copyfile(path, training / path.name)
        say(f"corpus: {len(records)} files of records, taken as they are")
        return {}
    work = run.directory / "corpus.partial"
    if not all((work / name).exists() or (run.directory / name).exists() for name in ("corpus", "heldout")):
        remove(work)  # it says that they are made, and somebody took them away
    with Meter("corpus", keys.max_lines or 0, "lines" if keys.max_lines else "MB") as meter:

        def progress(done: int, total: int, lines: int) -> None:
            if keys.max_lines:
                meter.update(lines, f"{done / 1e6:,.1f} MB read")
            else:
                meter.update(done, f"{lines:,} lines", total)

        counts = corpus.shard(names, work, keys, _corpus_inputs(run), progress)
    for name in ("corpus", "heldout"):
        if (work / name).exists():  # else it is in its place, and this attempt ended before it could say so
            finish(work / name, run.directory / name)
    say(f"corpus: {counts['lines']:,} lines, {counts['bytes'] / 1e6:.1f} MB, {counts['held_out_lines']:,} held out")
    for name, what in corpus.FINDINGS.items():
        if what and counts[name]:
            say(f"corpus: {what}: {counts[name]:,}")
    if keys.sha256 and keys.max_lines:
        say("corpus: corpus.sha256 is that of a whole file, and counts only if corpus.max_lines leaves nothing out")
    if counts["invalid_utf8"] > counts["lines"] / 100:
        say("corpus: that many are a sign of another encoding; convert the text, for example: iconv -f LATIN1 -t UTF-8")
    if keys.held_out and not counts["held_out_lines"]:
        say("corpus: no document was held out; raise corpus.held_out or give more documents")
    return counts


def _vocab_inputs(run: Run) -> dict[str, Any]:
    keys = run.profile.tokenizer
    if keys.source == "train":
        return {f"tokenizer.{key}": value for key, value in keys.model_dump().items()} | {
            "corpus": run.digest("corpus")
        }
    source = keys.source
    if not source.startswith("hf://"):
        if not Path(source).is_file():
            raise UsageError(vocab.no_such_file(source))
        source = run.directory.digest(Path(source))
    return {"tokenizer.source": source, "tokenizer.sha256": keys.sha256}


def _vocab(run: Run) -> dict[str, Any]:
    keys = run.profile.tokenizer
    if keys.source == "train":
        assert keys.vocab_size is not None
        size, most = keys.vocab_size, keys.sample_bytes
        say(f"vocab: trains {size:,} tokens")
        vocab.train(run.directory / "corpus", run.vocabulary, vocab_size=size, sample_bytes=most, **keys.rules)
    else:
        say(f"vocab: from {keys.source}")
        vocab.fetch(keys.source, run.vocabulary, keys.sha256)
        if keys.source.startswith("hf://") and keys.sha256 is None:
            say(f'vocab: so that it stays this one: tokenizer.sha256 = "{run.digest("vocab.txt")}"')
    tokens, length = vocab.read(run.vocabulary), run.profile.model.max_seq_length
    fit = vocab.measure(run.directory / "corpus", tokens, max_seq_length=length, **keys.rules)
    shown = f"; {fit['tokens_per_word']:.3f} for a word, {fit['unknown_share']:.3%} of them [UNK]" if fit else ""
    say(f"vocab: {len(tokens):,} tokens{shown}")
    if fit and fit["cut_share"] > 0.01:
        say(
            f"vocab: {fit['cut_share']:.0%} of the tokens are further into their line than model.max_seq_length, and "
            "no example has them; put one sentence on a line"
        )
    return {"vocab_size": len(tokens), **fit}


def corpus_report(run: Run) -> dict[str, Any]:
    """What is known of a run's corpus, and how its vocabulary fits. UsageError if there is no corpus yet."""
    if not (facts := run.recorded("corpus").get("facts")):
        raise UsageError(f"{run.directory.path} has no corpus of text yet; first `run --until vocab`")
    shards = len(list((run.directory / "corpus").iterdir()))
    return {"shards": shards, **facts, **run.recorded("vocab").get("facts", {})}


def _data_inputs(run: Run) -> dict[str, Any]:
    keys = run.profile.tokenizer
    return {
        "corpus": run.digest("corpus"),
        "held-out corpus": run.digest("heldout"),
        "vocabulary": run.digest("vocab.txt"),
        "model.max_seq_length": run.profile.model.max_seq_length,
        "tokenizer.lowercase": keys.lowercase,
        "tokenizer.strip_accents": keys.strip_accents,
        "corpus.blank_lines_separate_documents": run.profile.corpus.blank_lines_separate_documents,
        "train.seed": run.profile.train.seed,
    }


def _data(run: Run) -> dict[str, Any]:
    training, held_out = (run.directory / name for name in run.engine.OUTPUTS)
    if _has_records(run):
        for name in _parts_names(run):
            remove(run.directory / name)
        with partial(held_out) as empty, partial(training) as taken:
            empty.mkdir()
            number, held_out_number = run.engine.take(run, run.directory / "corpus", taken), 0
    else:
        for name in _parts_names(run):
            if changed := _other_settings(run, run.directory / name):
                aside = run.directory.set_aside(run.directory / name)
                say(f"{run.engine.DATA}: {name} has parts of other settings ({changed}); they are now {aside}")
        _build_parts(run, 0, 1)
        number = _join(run, run.directory / "corpus", training)
        held_out_number = _join(run, run.directory / "heldout", held_out)
    keys = run.profile.train
    epochs = keys.steps * keys.batch_size / max(1, number)
    say(f"{run.engine.DATA}: {number:,} examples; {keys.steps:,} steps are {epochs:.2g} epochs")
    if not number:
        raise UsageError("the corpus gives no example; give more text")
    return {"examples": number, "held_out_examples": held_out_number}


def _has_records(run: Run) -> bool:
    return any(path.match(corpus.RECORDS) for path in (run.directory / "corpus").iterdir())


def _parts_names(run: Run) -> tuple[str, str]:
    """The directories of the parts of an engine's OUTPUTS."""
    training, held_out = run.engine.OUTPUTS
    return f"{training}.parts", f"{held_out}.parts"


def _shards(text: Path) -> list[int]:
    """Numbers of the shards that have text."""
    return [number for number, path in enumerate(sorted(text.iterdir())) if path.stat().st_size]


def _part_inputs(run: Run) -> dict[str, Any]:
    packages = run.engine.PACKAGES[run.engine.DATA]
    return {**_data_inputs(run), **{name: _version(name) for name in packages}, **run.engine.versions()}


def _other_settings(run: Run, directory: Path) -> str | None:
    """Say what the parts in `directory` were made from that the profile no longer has; None if all is the same."""
    inputs = _part_inputs(run)
    found = (parts.facts(part) for part in sorted(directory.glob("[0-9]" * 5)))
    return next((changed for facts in found if facts and (changed := _difference(facts["inputs"], inputs))), None)


def _build_parts(run: Run, nth: int, of: int) -> None:
    """Build every `of`th part of the training data that is missing, beginning with the `nth`."""
    for text, name in zip((run.directory / "corpus", run.directory / "heldout"), _parts_names(run), strict=True):
        files = sorted(text.iterdir())
        wanted = [number for number in _shards(text) if number % of == nth]
        sums = {number: parts.path(run.directory / name, number) / parts.SUMS for number in wanted}
        missing = [number for number, file in sums.items() if not whole(file, run.directory.digest)]
        if len(missing) < len(wanted):
            say(f"{run.engine.DATA} of {text.name}: {len(wanted) - len(missing)} of {len(wanted)} parts are there")
        if not missing:
            continue
        (run.directory / name).mkdir(exist_ok=True)
        workers = min(len(missing), len(os.sched_getaffinity(0)))
        jobs = {"numbers": missing, "workers": workers, "inputs": _part_inputs(run)}
        log = run.log(run.engine.DATA if of == 1 else f"{run.engine.DATA}-{nth}-of-{of}")
        total = sum(files[number].stat().st_size for number in missing)
        with Meter(f"{run.engine.DATA} of {text.name}", total, "MB") as meter:
            run.engine.build(run, text, run.directory / name, jobs, log, parts.follow(meter.update))


def _join(run: Run, text: Path, out: Path) -> int:
    """Make an output of its parts, all of which are there and of this profile; return the number of examples."""
    found = [parts.path(out.with_name(f"{out.name}.parts"), number) for number in _shards(text)]
    if not out.exists():  # else it is this attempt's, which ended before it could say so
        with partial(out) as temporary:
            temporary.mkdir()
            if found:
                run.engine.join(run, text, found, temporary)
    return sum(facts["examples"] for part in found if (facts := parts.facts(part)))


def build_nth(run: Run, nth: int, of: int) -> None:
    """Build an `of`th of the training data's parts, for `execute` to join when all are there.

    Several processes and machines may do this at once: they share the run directory, and nothing else; the text that
    the corpus was made of need not be there. UsageError if corpus or vocabulary is not done, or other settings' parts
    are there.
    """
    *before, stage = _until(run, run.engine.DATA)
    with run.directory.lock(shared=True):
        for one in before:
            if run.recorded(one.name).get("outcome") != "done":
                raise UsageError(f"--shard: {one.name} has to be done first, by one process: run --until vocab")
        if _has_records(run):
            raise UsageError("--shard: corpus.source has records already; run without it")
        for name in _parts_names(run):
            if changed := _other_settings(run, run.directory / name):
                raise UsageError(f"{run.directory / name} has parts of other settings: {changed}; set that back")
        if reason(run, stage):
            run.engine.prepare(run)
            _build_parts(run, nth, of)
    say(f"{run.engine.DATA}: {nth}/{of} is done")


def _train_inputs(run: Run) -> dict[str, Any]:
    # Both engines make the same examples of the same text, so that a model may change engines half way.
    hparams = {key: value for key, value in run.hparams().items() if key not in _CONTINUABLE}
    return {**hparams, **_data_inputs(run)}


def _train(run: Run) -> dict[str, Any]:
    keys = run.profile.train
    if keys.evaluate_every:
        training.held_out(run, run.engine)
    gpus = choose_device(run, "train")
    start = _continue(run)
    began = time.monotonic()
    training.forget(run, start)
    if (
        start
        and keys.evaluate_every
        and start % keys.evaluate_every == 0
        and str(start) not in training.evaluations(run)
    ):
        training.evaluate(run, start, run.engine, gpus)  # for which a killed attempt had no time
    with training.Monitor(run, start, gpus) as monitor:
        try:
            run.engine.train(run, gpus, monitor)
        except Interrupted:
            saved = f"step {run.step:,} is saved, the same command resumes there" if run.step else "begin it again"
            raise Interrupted(f"interrupted; {saved}") from None
    if run.step != keys.steps:
        raise StageFailed(f"training ended at step {run.step}, not {keys.steps}; see {run.log('train')}")
    return {
        "engine": run.profile.engine,
        "device": gpus or "cpu",
        "from_step": start,
        "step": run.step,
        "final_loss": None if math.isnan(monitor.loss) else monitor.loss,
        "seconds_training": round(time.monotonic() - began, 1),
    }


def _continue(run: Run) -> int:
    """Return the step from which training goes on, after handing over a checkpoint of the other engine's."""
    run.directory.forget(run.model_dir)
    step, made_by = run.checkpoint() or (0, run.engine)
    for one in run.engines:
        for later in [later for later in one.steps(run.model_dir) if later >= step and not run.whole(later, one)]:
            one.set_aside(run, later)
            say(f"train: warning: the checkpoint of step {later:,} is not whole; its files are now called ….old-N")
    for left in (left for pattern in _CUT_SHORT for left in run.model_dir.glob(pattern)):
        remove(left)
    if not step:
        return 0
    say(f"train: resumes at step {step:,} of {run.profile.train.steps:,}")
    if made_by is not run.engine:
        say(f"train: hands the checkpoint over to the {run.profile.engine} engine, Adam's slots included")
        exported = run.model_dir / f"exported-{step}"
        made_by.export(run, run.model_dir, step, exported, slots=True)
        run.engine.adopt(run, step, exported)
        shutil.rmtree(exported, ignore_errors=True)
    return step


def choose_device(run: Run, stage: str) -> list[str]:
    """Return the GPUs for a stage; none means the CPU. EnvironmentLacks if the profile wants one and none is seen."""
    wanted = run.profile.train.device
    gpus: list[str] = [] if wanted == "cpu" else process.call(run.engine.GPUS, {})
    if gpus:
        say(f"{stage}: on {len(gpus)} × {gpus[0]}" if len(gpus) > 1 else f"{stage}: on {gpus[0]}")
        return gpus
    if wanted == "gpu":
        raise EnvironmentLacks(
            f'train.device = "gpu", but {run.engine.NO_GPU} (check with nvidia-smi), or --set train.device=cpu'
        )
    say(f"{stage}: on the CPU")
    return []


def _checkpoint_inputs(run: Run) -> dict[str, Any]:
    found = run.checkpoint()
    files = found[1].files(run.model_dir, found[0]) if found else []
    return {f"checkpoint {path.relative_to(run.model_dir)}": run.directory.digest(path) for path in files}


def _evaluate_inputs(run: Run) -> dict[str, Any]:
    keys = run.profile.train
    held_out = run.digest(run.engine.OUTPUTS[1])
    return {
        **_checkpoint_inputs(run),
        **{"held-out examples": held_out, "train.batch_size": keys.batch_size, "train.seed": keys.seed},
    }


def _evaluate(run: Run) -> dict[str, Any]:
    try:
        training.held_out(run, run.engine)
    except UsageError as error:
        say(f"evaluate: {error}")  # a model without metrics is still one
        return {}
    step, made_by = run.checkpoint() or (0, run.engine)
    return {"step": step, **training.evaluate(run, step, made_by, choose_device(run, "evaluate"))}


def evaluate(run: Run, wanted: int | None) -> dict[str, Any]:
    """Evaluate the latest checkpoint, or the `wanted` one, on the held-out text; return its step and the metrics."""
    if not run.recorded("train"):
        raise UsageError(no_checkpoint(run, None))
    with run.directory.lock():
        if (found := run.checkpoint(wanted)) is None:
            raise UsageError(no_checkpoint(run, wanted))
        step, made_by = found
        training.held_out(run, made_by)
        _refuse_other_settings(run, step, run.recorded("train"), _train_inputs(run))
        made_by.prepare(run)
        return {"step": step, **training.evaluate(run, step, made_by, choose_device(run, "evaluate"))}


def _convert_inputs(run: Run) -> dict[str, Any]:
    return {
        **_checkpoint_inputs(run),
        "vocabulary": run.digest("vocab.txt"),
        "tokenizer.lowercase": run.profile.tokenizer.lowercase,
        "tokenizer.strip_accents": run.profile.tokenizer.strip_accents,
        "description": run.profile.description,
        "language": run.profile.language,
        "evaluated": bool(card.evaluation(run, run.step or 0)),  # the card says how it did
    }


def _convert(run: Run) -> dict[str, Any]:
    step, made_by = run.checkpoint() or (0, run.engine)
    with partial(run.directory / "hf") as out:
        out.mkdir()
        facts = _export(run, run.model_dir, step, made_by, out)
    say(f"convert: step {step:,} is in {run.directory / 'hf'}")
    return {"step": step, **facts}


def _export(run: Run, model_dir: Path, step: int, made_by: Any, out: Path) -> dict[str, Any]:
    """Write both networks of a checkpoint in `model_dir` as transformers loads them, with tokenizer and card."""
    facts: dict[str, Any] = made_by.export(run, model_dir, step, out)
    for network in NETWORKS:
        length = run.profile.model.max_seq_length  # positions beyond it were never trained
        vocab.write_tokenizer(
            out / network, vocab.read(run.vocabulary), max_length=length, **run.profile.tokenizer.rules
        )
        write_text(out / network / "README.md", card.card(run, network, step, made_by))
    return facts


def convert(directory: Path, wanted: int | Literal["best"] | None, out: Path, force: bool) -> None:
    """Export a run's latest checkpoint, its best or that of a step to `out`/discriminator and `out`/generator."""
    run = open_run(directory)
    if wanted == "best" and (wanted := training.best(run)) is None:
        raise UsageError(f"{run.model_dir} has no best checkpoint: nothing was evaluated; `evaluate` it first")
    if (found := training.locate(run, wanted)) is None:
        raise UsageError(no_checkpoint(run, wanted))
    with contextlib.ExitStack() as stack:
        new = {network: stack.enter_context(output(out / network, force)) for network in NETWORKS}
        with tempfile.TemporaryDirectory(dir=out) as work:
            _export(run, *found, Path(work))
            for network, path in new.items():
                for file in (Path(work) / network).iterdir():
                    file.rename(path / file.name)
    say(f"convert: step {found[1]:,} is in {out}")


def no_checkpoint(run: Run, wanted: int | None) -> str:
    which = "checkpoint" if wanted is None else f"whole checkpoint of step {wanted:,}"
    return f"{run.model_dir} has no {which}; first `run`, or choose another --step"


def _check(run: Run) -> dict[str, Any]:
    facts = process.call(
        "electra_wrap.check",
        {"task": "check", "directory": str(run.directory / "hf"), "texts": list(QUESTIONS)},
        log=run.log("check"),
        env=check.ENVIRONMENT,
    )
    say("check: discriminator and generator load in transformers and answer")
    return cast(dict[str, Any], facts)


def stages(run: Run) -> list[Stage]:
    """The stages of a run, in order."""
    chosen, evaluated = run.engine, run.profile.corpus.held_out > 0
    return [
        Stage("corpus", _corpus_inputs, ("corpus", "heldout"), _corpus, scratch=("corpus.partial",)),
        Stage("vocab", _vocab_inputs, ("vocab.txt",), _vocab, ("tokenizers",)),
        Stage(chosen.DATA, _data_inputs, chosen.OUTPUTS, _data, chosen.PACKAGES[chosen.DATA], _parts_names(run)),
        Stage("train", _train_inputs, (), _train, chosen.PACKAGES["train"]),
        *([Stage("evaluate", _evaluate_inputs, (), _evaluate, chosen.PACKAGES["train"])] if evaluated else []),
        Stage("convert", _convert_inputs, ("hf",), _convert, chosen.PACKAGES["convert"]),
        Stage("check", lambda run: {"hf": run.digest("hf")}, (), _check, ("transformers", "torch")),
    ]


def _until(run: Run, until: str | None) -> list[Stage]:
    """The stages up to `until` (default: all). UsageError if there is no such stage."""
    found = stages(run)
    names = [stage.name for stage in found]
    if until not in (None, *names):
        raise UsageError(f"--until {until}: no such stage; the stages are {', '.join(names)}")
    return found[: names.index(until or names[-1]) + 1]


def reason(run: Run, stage: Stage) -> str | None:
    """Return why a stage has to be done; None if it is up to date.

    UsageError, naming both values, if it is training and the model there was trained with something else.
    """
    recorded = run.recorded(stage.name)
    if stage.name == "train":
        return _train_reason(run, recorded, _train_inputs(run))
    if not recorded:
        return "not done yet"
    if recorded["outcome"] != "done":
        return str(recorded["outcome"])
    if changed := _difference(recorded["inputs"], stage.inputs(run)):
        return changed
    for name in stage.outputs:
        if not (run.directory / name).exists():
            return f"{name} is missing"
        if run.digest(name) != recorded["outputs"].get(name):
            return f"{name} is not as this stage left it"
    return None


def _train_reason(run: Run, recorded: dict[str, Any], inputs: dict[str, Any]) -> str | None:
    step, steps = run.step, run.profile.train.steps
    if not recorded and any(one.steps(run.model_dir) for one in run.engines):
        raise UsageError(
            f"{run.model_dir} has a model that this run did not train; choose another model_name or --run-dir"
        )
    if step is None:
        return "not done yet"
    _refuse_other_settings(run, step, recorded, inputs)
    if step > steps:
        raise UsageError(f"{run.model_dir} is at step {step:,}, train.steps = {steps}; set train.steps={step} or more")
    if step < steps:
        _refuse_other_versions(run, step, recorded["versions"])
        return f"at step {step:,} of {steps:,}"
    return None if recorded["outcome"] == "done" else str(recorded["outcome"])


def _refuse_other_settings(run: Run, step: int, recorded: dict[str, Any], inputs: dict[str, Any]) -> None:
    if changed := _difference(recorded["inputs"], inputs):
        raise UsageError(
            f"{run.model_dir} has a model trained for {step:,} steps, and {changed}; set that back, "
            "or train another model with --set model_name=NAME or --run-dir DIR"
        )


def _refuse_other_versions(run: Run, step: int, before: dict[str, str]) -> None:
    """UsageError unless what trains is what did, as far as that matters to a model half way.

    A new minor version of a package is a matter of rounding and of the order of random numbers. Another pin, other
    patches and major versions are not. What the other engine has trained is handed over as numbers, which is safe.
    """
    (stage,) = (stage for stage in stages(run) if stage.name == "train")
    now = versions(run, stage)
    for name in sorted(before.keys() & now.keys()):
        if before[name].partition(".")[0] != now[name].partition(".")[0]:
            other = next(name for name in ENGINES if name != run.profile.engine)
            raise UsageError(
                f"{run.model_dir} was trained for {step:,} steps with {name} {before[name][:12]}, and here is "
                f"{now[name][:12]}; go on with the former, or with --set engine={other}, or train another model_name"
            )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say which input changed, from what to what; None if none did."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            return f"{key} was {_short(old)} and is {_short(new)}"
    return None


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(v) for v in value[:3]) + (", …]" if len(value) > 3 else "]")
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def plan(run: Run, until: str | None = None) -> list[tuple[Stage, str]]:
    """Return the stages that have to be done, each with the reason, without doing anything.

    What a stage after one that is to be redone will need cannot be known yet: it is listed as following it.
    UsageError as `reason`, and if redoing a stage would leave a trained model without what it was trained on.
    """
    todo: list[tuple[Stage, str]] = []
    for stage in _until(run, until):
        if not todo:
            why = reason(run, stage)
        else:
            why = f"follows {todo[-1][0].name}"
            if stage.name == "train":
                _refuse_other_model(run, todo[0])
        if why is not None:
            todo.append((stage, why))
    return todo


def _refuse_other_model(run: Run, first: tuple[Stage, str]) -> None:
    """Raise UsageError if a model is there already and its data is about to become other data."""
    stage, why = first
    step, recorded = run.step, run.recorded(stage.name)
    if step is None:
        return
    if stage.name == run.engine.DATA:  # perhaps the other engine's is recorded; the model knows what it was trained on
        _train_reason(run, run.recorded("train"), _train_inputs(run))
    elif not recorded or _difference(recorded["inputs"], stage.inputs(run)):
        raise UsageError(
            f"{run.model_dir} has a model trained for {step:,} steps, and its data would change ({stage.name}: {why}); "
            "set that back, or use another --run-dir"
        )


def execute(run: Run, until: str | None = None, dry_run: bool = False) -> None:
    """Do what has to be done up to the stage `until`; say what and why."""
    began, wanted = time.monotonic(), _until(run, until)
    if dry_run:
        for stage, why in plan(run, until):
            say(f"would do: {stage.name} ({why})")
        return
    with run.directory.lock():
        todo = plan(run, until)
        for stage, why in todo:
            say(f"to do: {stage.name} ({why})")
        names = {stage.name for stage, _ in todo}
        if names & {run.engine.DATA, "train"}:
            run.engine.prepare(run)
        if "train" in names and run.profile.train.device == "gpu":
            choose_device(run, "train")
        (run.directory / "logs").mkdir(exist_ok=True)
        write_json(run.directory / "profile.json", run.profile.model_dump())
        done = 0
        for number, stage in enumerate(wanted):
            if reason(run, stage) is not None:
                storage.check(run.directory.path, run, [stage for stage in wanted[number:] if stage.name in names])
                _do(run, stage)
                done += 1
            for name in stage.scratch:
                remove(run.directory / name)
        run.directory.save()
    if until is None and (done or not (run.directory / "report.html").exists()):
        from electra_wrap import report  # which imports this module, and a plotting library

        try:
            say(f"report: {report.write([run.directory.path])}")
        except ElectraWrapError as error:  # the run is done all the same
            say(f"report: {error}")
    what = f"{done} of {len(wanted)} stages done" if done else "nothing to do: everything is up to date"
    say(f"{what}, {duration(time.monotonic() - began)}")


def _do(run: Run, stage: Stage) -> None:
    """Do one stage; write into the manifest what it was made from before, and how it ended after."""
    recorded = run.recorded(stage.name)
    entry: dict[str, Any] = {
        "outcome": "interrupted",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": stage.inputs(run),
        "versions": versions(run, stage),
    }
    # An attempt at the same thing that was killed: what is there is its work, and not something to set aside.
    same = all(recorded.get(key) == entry[key] for key in ("outcome", "inputs", "versions"))
    begun = any((run.directory / name).exists() for name in stage.scratch)
    for name in stage.outputs:
        if not same:
            if aside := run.directory.set_aside(run.directory / name):
                say(f"{stage.name}: the former {name} is now {aside.name}")
        elif not begun:  # made by an attempt that ended before it could say so; a stage that goes on keeps it
            remove(run.directory / name)
    if stage.name == "train" and recorded and recorded["versions"] != entry["versions"]:
        say(f"train: continues with other versions: {_difference(recorded['versions'], entry['versions'])}")
    run.directory.manifest["stages"][run.key(stage.name)] = entry
    run.directory.save()
    began = time.monotonic()
    try:
        entry["facts"] = stage.do(run)
    except Interrupted:
        raise
    except Exception:
        entry["outcome"] = "failed"
        raise
    else:
        entry["outputs"] = {name: run.digest(name) for name in stage.outputs}
        entry["outcome"] = "done"
    finally:
        entry["seconds"] = round(time.monotonic() - began, 1)
        run.directory.save()


def versions(run: Run, stage: Stage) -> dict[str, str]:
    """Return the versions of what a stage is done with: packages, and for upstream's scripts pin and patches."""
    found = {package: _version(package) for package in stage.packages}
    return found | (run.engine.versions() if stage.name in (run.engine.DATA, "train") else {})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentLacks(f"{package} is not installed; pip install electra-wrap brings it") from None
