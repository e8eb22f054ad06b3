"""Stage `corpus`: text of any source becomes shards of clean lines, and a held-out part."""

from __future__ import annotations

import shutil
from pathlib import Path

from electra_wrap import files
from electra_wrap.data import corpus, sources, tfrecords
from electra_wrap.errors import UsageError
from electra_wrap.pipeline.stage import Digest, Stage, Values
from electra_wrap.progress import ProgressBar, log, warn
from electra_wrap.run import Run

#: Share of bad lines from which the text is likely in another encoding.
OTHER_ENCODING = 0.01

#: Largest share of the held-out text that may be in lines which the training text has, too.
MAX_SEEN_SHARE = 0.5


def _sources(run: Run) -> list[str]:
    return corpus.find_sources(run.profile.corpus.sources, run.directory)


def _inputs(run: Run, digest: Digest) -> Values:
    inputs: Values = {
        f"corpus.{key}": value
        for key, value in run.profile.corpus.model_dump(exclude={"source"}).items()
    }
    inputs["corpus.source"] = [
        name if sources.is_remote(name) else run.digest(Path(name)) for name in _sources(run)
    ]
    return inputs


def _execute(run: Run) -> Values:
    names = _sources(run)
    if records := [Path(name) for name in names if Path(name).match(tfrecords.RECORD_GLOB)]:
        return _copy_records(run, records, names)
    settings = run.profile.corpus
    total, unit = (settings.max_lines, "lines") if settings.max_lines else (0, "MB")
    with (
        ProgressBar("corpus", total, unit) as bar,
        files.atomic(run.held_out) as held_out,
        files.atomic(run.corpus) as text,
    ):

        def show(bytes_read: int, total_bytes: int, lines: int) -> None:
            if settings.max_lines:
                bar.update(lines, f"{bytes_read / 1e6:,.1f} MB read")
            else:
                bar.update(bytes_read, f"{lines:,} lines", total_bytes)

        counts: Values = dict(corpus.shard(names, text, held_out, settings, show))
        if counts["held_out_lines"]:
            counts["held_out_seen_share"] = corpus.seen_share(text, held_out)
    _log_counts(run, counts)
    return counts


def _copy_records(run: Run, records: list[Path], names: list[str]) -> Values:
    if len({path.name for path in records}) < len(names):
        raise UsageError("corpus.source has records beside other files; give one directory of them")
    with files.atomic(run.held_out) as held_out, files.atomic(run.corpus) as copies:
        held_out.mkdir()
        copies.mkdir()
        for path in records:
            shutil.copyfile(path, copies / path.name)
    log(f"corpus: {len(records)} files of records, used as they are")
    return {}


def _log_counts(run: Run, counts: Values) -> None:
    settings = run.profile.corpus
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
    if settings.held_out and (problem := evaluation_problem(counts)):
        warn(f"the model cannot be evaluated: {problem}")


def evaluation_problem(counts: Values) -> str | None:
    """Return why a model of this corpus cannot be evaluated on held-out text; None if it can."""
    if not counts.get("held_out_lines"):
        return "no text is held out; set corpus.held_out and give two or more documents"
    if (share := counts["held_out_seen_share"]) > MAX_SEEN_SHARE:
        lines = f"{share:.0%} of the held-out text are lines that the training text has, too"
        return f'{lines}; set corpus.deduplicate = "lines"'
    return None


def corpus_report(run: Run) -> Values:
    """Return the counts of a run's corpus and how its vocabulary fits.

    UsageError if there is no corpus of text yet.
    """
    if not (counts := run.results("corpus")):
        raise UsageError(f"{run.directory} has no corpus of text yet; first `run --until vocab`")
    return {"shards": len(list(run.corpus.iterdir())), **counts, **run.results("vocab")}


STAGE = Stage(
    name="corpus", inputs=_inputs, execute=_execute, outputs=lambda run: ("corpus", "heldout")
)
