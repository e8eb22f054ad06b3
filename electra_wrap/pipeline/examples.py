"""Stage `examples`: shards of text become examples, part by part and on several machines."""

from __future__ import annotations

import os
from pathlib import Path

from electra_wrap import files
from electra_wrap.data import parts, tfrecords
from electra_wrap.engines import engine_of
from electra_wrap.errors import UsageError
from electra_wrap.pipeline import corpus, vocab
from electra_wrap.pipeline.stage import (
    Digest,
    Stage,
    Values,
    changed_output,
    data_digests,
    describe_change,
    stale_reason,
)
from electra_wrap.progress import ProgressBar, log
from electra_wrap.run import Run


def inputs(run: Run, digest: Digest) -> Values:
    """Return what examples are made from. The engines make the same examples of it."""
    profile = run.profile
    return {
        **data_digests(run, digest),
        "model.max_seq_length": profile.model.max_seq_length,
        "tokenizer.lowercase": profile.tokenizer.lowercase,
        "tokenizer.strip_accents": profile.tokenizer.strip_accents,
        "corpus.blank_lines_separate_documents": profile.corpus.blank_lines_separate_documents,
        "train.seed": profile.train.seed,
    }


def _execute(run: Run) -> Values:
    engine = engine_of(run)
    training, held_out = (run.directory / name for name in engine.EXAMPLES)
    if _has_records(run):
        for name in _parts_names(run):
            files.remove(run.directory / name)
        with files.atomic(held_out) as empty, files.atomic(training) as imported:
            empty.mkdir()
            number = engine.import_records(run, run.corpus, imported)
        held_out_number = 0
    else:
        for name in _parts_names(run):
            if change := _changed_input(run, run.directory / name):
                old = files.archive(run.directory / name)
                log(f"examples: {name} has parts with other settings ({change}); it is now {old}")
        _build_parts(run, 0, 1)
        number = _join(run, run.corpus, training)
        held_out_number = _join(run, run.held_out, held_out)
    settings = run.profile.train
    epochs = settings.steps * settings.batch_size / max(1, number)
    log(f"examples: {number:,} examples; {settings.steps:,} steps are {epochs:.2g} epochs")
    if not number:
        raise UsageError("the corpus gives no examples; give more text")
    return {"examples": number, "held_out_examples": held_out_number}


def _has_records(run: Run) -> bool:
    return any(path.match(tfrecords.RECORD_GLOB) for path in run.corpus.iterdir())


def _parts_names(run: Run) -> tuple[str, str]:
    training, held_out = engine_of(run).EXAMPLES
    return f"{training}.parts", f"{held_out}.parts"


def _shards(run: Run, text: Path) -> dict[int, Path]:
    """Return the shards of `text` that have text, by number; none if evaluation is not possible."""
    if text == run.held_out and corpus.evaluation_problem(run.results("corpus")):
        return {}
    shards = enumerate(sorted(text.iterdir()))
    return {number: path for number, path in shards if path.stat().st_size}


def _part_inputs(run: Run) -> Values:
    return {**inputs(run, run.digest), **engine_of(run).versions("examples")}


def _changed_input(run: Run, directory: Path) -> str | None:
    """Describe an input that differs from that of the parts in `directory`; None if none does."""
    now = _part_inputs(run)
    for part in sorted(directory.glob("[0-9]" * 5)):
        metadata = parts.read_metadata(part)
        if metadata and (change := describe_change(metadata["inputs"], now)):
            return change
    return None


def _build_parts(run: Run, index: int, count: int) -> None:
    """Build the missing parts of every `count`th shard, starting with shard `index`."""
    log_name = "examples" if count == 1 else f"examples-{index}-of-{count}"
    for text, name in zip((run.corpus, run.held_out), _parts_names(run), strict=True):
        directory = run.directory / name
        shards = {n: path for n, path in _shards(run, text).items() if n % count == index}
        missing = {
            number: path
            for number, path in shards.items()
            if not files.is_intact(parts.part_path(directory, number) / parts.CHECKSUMS, run.digest)
        }
        if len(missing) < len(shards):
            existing = len(shards) - len(missing)
            log(f"examples: {existing} of {len(shards)} parts of {text.name} exist already")
        if not missing:
            continue
        directory.mkdir(exist_ok=True)
        jobs = {
            "numbers": list(missing),
            "workers": min(len(missing), len(os.sched_getaffinity(0))),
            "inputs": _part_inputs(run),
        }
        size = sum(path.stat().st_size for path in missing.values())
        with ProgressBar(f"examples of {text.name}", size, "MB") as bar:
            engine_of(run).build_examples(
                run, text, directory, jobs, run.log_file(log_name), parts.sum_progress(bar.update)
            )


def _join(run: Run, text: Path, out: Path) -> int:
    """Join the parts of `text` in the directory `out`; return the number of examples."""
    directory = out.with_name(f"{out.name}.parts")
    built = [parts.part_path(directory, number) for number in _shards(run, text)]
    if not out.exists():  # otherwise an attempt wrote it that ended before it was recorded
        with files.atomic(out) as temporary:
            temporary.mkdir()
            if built:
                engine_of(run).join_examples(run, text, built, temporary)
    return sum(metadata["examples"] for part in built if (metadata := parts.read_metadata(part)))


def build_shard(run: Run, index: int, count: int) -> None:
    """Build every `count`th part, for `execute` to join when all of them are built.

    Several processes and machines may do this at once: they share only the run directory.
    UsageError if corpus or vocabulary is missing, or if there are parts with other settings.
    """
    with run.lock(shared=True):
        run.forget_digests(run.directory)
        for stage in (corpus.STAGE, vocab.STAGE):
            if run.record(stage.name).get("outcome") != "done" or changed_output(run, stage):
                needed = f"--shard needs the stage {stage.name}"
                raise UsageError(f"{needed}; first, once: run --until vocab")
        if _has_records(run):
            raise UsageError("--shard: corpus.source has records already; leave --shard out")
        for name in _parts_names(run):
            if change := _changed_input(run, run.directory / name):
                parts_directory = run.directory / name
                raise UsageError(f"{parts_directory} has parts with other settings: {change}")
        if stale_reason(run, STAGE, run.digest):
            engine_of(run).prepare(run)
            (run.directory / "logs").mkdir(exist_ok=True)
            _build_parts(run, index, count)
    log(f"examples: {index}/{count} is done")


STAGE = Stage(
    name="examples",
    inputs=inputs,
    execute=_execute,
    outputs=lambda run: engine_of(run).EXAMPLES,
    versions=lambda run: engine_of(run).versions("examples"),
    record=lambda run: run.examples_record,
    scratch=_parts_names,
    depends_on=("corpus", "vocab"),
)
