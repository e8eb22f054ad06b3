"""The stages from text to model: what each is made from, and what it does.

The inputs of a stage are a pure function of the profile, of the sizes and times of the sources, and
of the inputs of the stages before it.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_wrap import checkpoints, files
from electra_wrap.architecture import NETWORKS
from electra_wrap.convert import export
from electra_wrap.data import corpus, released, sources, vocab
from electra_wrap.engines import choose_devices, engine_of
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.events import Evaluation, Event
from electra_wrap.monitor import TrainingMonitor, discard_evaluations_after, record_evaluation
from electra_wrap.progress import ProgressBar, log, warn
from electra_wrap.run import Run

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step from text to model.

    `inputs` are all that decides its outputs; `do` makes them and returns results for the manifest.
    `record` is the name of its entry there: a run directory may hold several models.
    """

    name: str
    inputs: Callable[[Run], Values]
    do: Callable[[Run], Values]
    outputs: Callable[[Run], tuple[Path, ...]] = lambda run: ()
    record: Callable[[Run], str] | None = None

    def record_name(self, run: Run) -> str:
        return self.record(run) if self.record else self.name


# ---- corpus

#: Share of bad lines from which the text is likely in another encoding or form.
OTHER_ENCODING = 0.01

#: Share of the held-out text in lines that the training text has, too, from which to warn.
SEEN_SHARE = 0.5


def _corpus_inputs(run: Run) -> Values:
    names = corpus.find_sources(run.profile.corpus.sources, run.directory)
    settings = run.profile.corpus.model_dump(exclude={"source"})
    return {
        **{f"corpus.{key}": value for key, value in settings.items()},
        "corpus.source": [name for name in names if sources.is_remote(name)],
        "content of corpus.source": files.describe(
            Path(name) for name in names if not sources.is_remote(name)
        ),
    }


def _corpus(run: Run) -> Values:
    settings = run.profile.corpus
    names = corpus.find_sources(settings.sources, run.directory)
    with (
        ProgressBar("corpus", 0, "B") as bar,
        files.atomic(run.held_out, directory=True) as held_out,
        files.atomic(run.corpus, directory=True) as text,
    ):
        counts: Values = dict(corpus.shard(names, text, held_out, settings, bar.show))
        if counts["held_out_lines"]:
            counts["held_out_seen_share"] = corpus.seen_share(text, held_out)
    log(
        f"corpus: {counts['lines']:,} lines, {counts['bytes'] / 1e6:.1f} MB, "
        f"{counts['held_out_lines']:,} lines held out"
    )
    for name, description in corpus.COUNTS.items():
        if description and counts.get(name):
            log(f"corpus: {description}: {counts[name]:,}")
    if settings.sha256 and settings.max_lines:
        warn("corpus.sha256 is checked only if corpus.max_lines leaves nothing out")
    if counts["invalid_utf8"] > counts["lines"] * OTHER_ENCODING:
        warn("the text seems to have another encoding; try: iconv -f LATIN1 -t UTF-8")
    has_decomposed = counts["decomposed_lines"] > counts["lines"] * OTHER_ENCODING
    if has_decomposed and not run.profile.tokenizer.strip_accents:
        warn("decomposed accents become [UNK] or other tokens than é; try: uconv -x any-nfc")
    if settings.held_out and not counts["held_out_lines"]:
        warn("no text is held out, so the model is not evaluated; give more text")
    if (share := counts.get("held_out_seen_share", 0.0)) > SEEN_SHARE:
        lines = f"{share:.0%} of the held-out text are lines that the training text has, too"
        warn(f'{lines}; set corpus.deduplicate = "lines"')
    return counts


# ---- vocab

#: Share of tokens beyond the longest example from which to warn.
CUT_SHARE = 0.01


def _vocab_inputs(run: Run) -> Values:
    settings = run.profile.tokenizer
    inputs = {f"tokenizer.{key}": value for key, value in settings.model_dump().items()}
    if settings.source == "train":
        return inputs | _corpus_inputs(run)
    if run.model.initial:
        inputs["the weights' vocab_size"] = run.model.initial.get("vocab_size")
    elif not sources.is_remote(settings.source):
        inputs["tokenizer.source"] = files.describe([vocab.locate(settings.source)])
    return inputs


def _vocab(run: Run) -> Values:
    settings = run.profile.tokenizer
    if settings.vocab_size is not None:
        log(f"vocab: training {settings.vocab_size:,} tokens")
        vocab.train(
            run.corpus,
            run.vocabulary,
            vocab_size=settings.vocab_size,
            sample_bytes=settings.sample_bytes,
            **settings.normalization,
        )
    else:
        log(f"vocab: from {settings.source}")
        vocab.fetch(settings.source, run.vocabulary, settings.sha256)
        if sources.is_remote(settings.source) and settings.sha256 is None:
            log(f'vocab: to pin it, set tokenizer.sha256 = "{files.sha256(run.vocabulary)}"')
        source = run.model.initial.get("tokenizer") or settings.source
        log_file = run.log_file("vocab")
        released.refuse_difference(source, run.corpus, log_file, **settings.normalization)
    tokens, length = vocab.read(run.vocabulary), run.profile.model.max_seq_length
    fit = vocab.measure(run.corpus, tokens, max_seq_length=length, **settings.normalization)
    log(f"vocab: {len(tokens):,} tokens")
    if settings.vocab_size and len(tokens) < settings.vocab_size:
        warn(f"the text gives a vocabulary of less than {settings.vocab_size:,} tokens")
    if fit:
        share = f"{fit['unknown_share']:.3%} of them [UNK]"
        log(f"vocab: {fit['tokens_per_word']:.3f} tokens per word, {share}")
        vocab.judge_unknown(tokens, fit, lowercase=settings.lowercase)
    if fit.get("cut_share", 0.0) > CUT_SHARE:
        share = f"{fit['cut_share']:.0%} of the tokens"
        warn(f"lines are longer than model.max_seq_length, which cuts {share}; use shorter lines")
    # Released weights may have more rows than there are tokens.
    return {"vocab_size": run.model.initial.get("vocab_size", len(tokens)), **fit}


# ---- examples


def _examples_inputs(run: Run) -> Values:
    return {
        **_corpus_inputs(run),
        **_vocab_inputs(run),
        "model.max_seq_length": run.profile.model.max_seq_length,
        "train.seed": run.profile.train.seed,
    }


def _examples(run: Run) -> Values:
    build, (training, held_out) = engine_of(run).build_examples, run.examples
    with (
        files.atomic(held_out, directory=True) as held_out_work,
        files.atomic(training, directory=True) as training_work,
    ):
        number = build(run, run.corpus, training_work)
        if not number:
            raise UsageError("the corpus gives no examples; give more text")
        held_out_number = build(run, run.held_out, held_out_work)
    settings = run.profile.train
    epochs = settings.steps * settings.batch_size / number
    log(f"examples: {number:,} examples; {settings.steps:,} steps are {epochs:.2g} epochs")
    return {"examples": number, "held_out_examples": held_out_number}


# ---- train

#: Temporary files in the model's directory. A killed training leaves them.
_TEMPORARY = ("*.partial", "model.ckpt-*_temp", "model.ckpt-*.tempstate*", "*.tmp*")


def _train_inputs(run: Run) -> Values:
    """Return what a model is trained with: all but the keys that may change in mid-training.

    Those say how long, how often and where.
    """
    profile = run.profile
    inputs = {**_examples_inputs(run), "engine": profile.engine}
    for network in NETWORKS:
        shape = dataclasses.asdict(profile.model.shape(network))
        inputs |= {f"the {network}'s {key}": value for key, value in shape.items()}
    for key in ("mask_prob", "max_position_embeddings"):
        inputs[f"model.{key}"] = getattr(profile.model, key)
    for key in ("batch_size", "learning_rate", "warmup_steps", "weight_decay"):
        inputs[f"train.{key}"] = getattr(profile.train, key)
    inputs["model.init_from"] = run.model.initial.get("identity")
    return inputs


def _train(run: Run) -> Values:
    settings, held_out = run.profile.train, run.results(run.examples_record)["held_out_examples"]
    if settings.evaluate_every and not held_out:
        warn("train.evaluate_every has no effect: there are no held-out examples")
    run.make_model_dir()
    run.model.vocabulary = files.sha256(run.vocabulary)
    for path in (path for pattern in _TEMPORARY for path in run.model_dir.glob(pattern)):
        files.remove(path)
    start = max(checkpoints.steps(run.model_dir), default=0)
    if start:
        log(f"train: resumes at step {start:,} of {settings.steps:,}")
    discard_evaluations_after(run, start)
    devices = choose_devices(run)
    with TrainingMonitor(run, start) as monitor:
        engine_of(run).train(run, devices, monitor)
    last = max(checkpoints.steps(run.model_dir), default=0)
    if last != settings.steps:
        log_file = run.log_file("train")
        raise StageFailed(f"training ended at step {last:,}; see the log: {log_file}")
    files.remove(run.initial)
    loss = None if math.isnan(monitor.loss) else monitor.loss
    return {"from_step": start, "step": last, "final_loss": loss}


# ---- evaluate


def _evaluate_inputs(run: Run) -> Values:
    return {**_train_inputs(run), "train.steps": run.profile.train.steps}


def _evaluate(run: Run) -> Values:
    if not run.profile.corpus.held_out:
        return {}
    if not run.results(run.examples_record)["held_out_examples"]:
        warn("the model is not evaluated: there are no held-out examples")  # it is a model still
        return {}
    step = checkpoints.require(run.model_dir, None)
    if step not in run.model.evaluations:  # the native engine evaluates as it ends
        evaluate(run, step)
    return {"step": step, **run.model.evaluations[step]}


def evaluate(run: Run, step: int) -> Values:
    """Evaluate a checkpoint, and record and return its metrics.

    Without a GPU this works on the CPU, whatever the profile requires for training. UsageError if
    there are no held-out examples.
    """
    if not run.results(run.examples_record).get("held_out_examples"):
        raise UsageError(f"{run.directory} has no held-out examples; set corpus.held_out and `run`")

    def record(event: Event) -> None:
        if isinstance(event, Evaluation):
            record_evaluation(run, event)

    engine_of(run).evaluate(run, step, choose_devices(run, require=False), record)
    return run.model.evaluations[step]


# ---- convert


def _convert_inputs(run: Run) -> Values:
    names = ("description", "language", "model_name")
    return {**_evaluate_inputs(run), **{name: getattr(run.profile, name) for name in names}}


def _convert(run: Run) -> Values:
    step = checkpoints.require(run.model_dir, run.profile.train.steps)
    with files.atomic(run.exported, directory=True) as out:
        results = export(run, step, out)
    log(f"convert: step {step:,} is in {run.exported}, and loads in transformers")
    return {"step": step, **results}


CORPUS = Stage("corpus", _corpus_inputs, _corpus, lambda run: (run.corpus, run.held_out))
VOCAB = Stage("vocab", _vocab_inputs, _vocab, lambda run: (run.vocabulary,))
EXAMPLES = Stage(
    "examples",
    _examples_inputs,
    _examples,
    outputs=lambda run: run.examples,
    record=lambda run: run.examples_record,
)
TRAIN = Stage("train", _train_inputs, _train, record=lambda run: f"train {run.profile.model_name}")
EVALUATE = Stage(
    "evaluate", _evaluate_inputs, _evaluate, record=lambda run: f"evaluate {run.profile.model_name}"
)
CONVERT = Stage("convert", _convert_inputs, _convert, lambda run: (run.exported,))
STAGES = (CORPUS, VOCAB, EXAMPLES, TRAIN, EVALUATE, CONVERT)
