"""Stage `convert`: the latest checkpoint becomes two models that transformers loads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from electra_wrap.data import vocab
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES, find_checkpoint, weight_digests
from electra_wrap.errors import UsageError
from electra_wrap.files import new_directory, write_text
from electra_wrap.monitor import card, evaluation
from electra_wrap.pipeline import vocab as vocab_stage
from electra_wrap.pipeline.checkpoints import require_checkpoint
from electra_wrap.pipeline.stage import Digest, Stage, Values, changed_output
from electra_wrap.profile import NETWORKS
from electra_wrap.progress import log
from electra_wrap.run import Run


def _inputs(run: Run, digest: Digest) -> Values:
    checkpoint = find_checkpoint(run)
    return {
        **weight_digests(run, checkpoint),
        "vocabulary": digest(run.vocabulary),
        "tokenizer.lowercase": run.profile.tokenizer.lowercase,
        "tokenizer.strip_accents": run.profile.tokenizer.strip_accents,
        "description": run.profile.description,
        "language": run.profile.language,
        # The model card has the metrics.
        "evaluated": checkpoint is not None and bool(evaluation.find(run, checkpoint)[1]),
    }


def _execute(run: Run) -> Values:
    checkpoint = require_checkpoint(run, None)
    with new_directory(run.exported, replace=True) as out:
        _export(run, checkpoint, out)
    log(f"convert: step {checkpoint.step:,} is in {run.exported}")
    return {"step": checkpoint.step, "model_name": run.profile.model_name}


def _export(run: Run, checkpoint: Checkpoint, out: Path) -> None:
    """Write both networks of a checkpoint, each with its tokenizer and its model card."""
    ENGINES[checkpoint.engine].export(run, checkpoint, out)
    tokens = vocab.read(run.vocabulary)
    for network in NETWORKS:
        vocab.write_tokenizer(
            out / network,
            tokens,
            max_length=run.profile.model.max_seq_length,  # later positions were never trained
            **run.profile.tokenizer.normalization,
        )
        write_text(out / network / "README.md", card.model_card(run, network, checkpoint))


def convert(run: Run, step: int | Literal["best"] | None, out: Path, *, replace: bool) -> None:
    """Export a run's latest checkpoint, its best one or that of a step to `out`.

    UsageError if there is no such checkpoint, or if `out` has a model and not `replace`.
    """
    checkpoint = require_checkpoint(run, step)
    run.forget_digests(run.vocabulary)
    if change := changed_output(run, vocab_stage.STAGE):
        raise UsageError(f"{run.directory}: {change}; `run` restores it")
    with new_models(out, NETWORKS, replace=replace) as work:
        _export(run, checkpoint, work)
    log(f"convert: step {checkpoint.step:,} is in {out}")


@contextlib.contextmanager
def new_models(out: Path, networks: Sequence[str], *, replace: bool) -> Iterator[Path]:
    """Yield a temporary directory, of which each network becomes `out`/NETWORK at the end.

    Nothing else in `out` changes. UsageError if one of these exists, unless `replace`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        models = {n: stack.enter_context(new_directory(out / n, replace=replace)) for n in networks}
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out)))
        yield work
        for network, directory in models.items():
            (work / network).rename(directory)


def _versions(run: Run) -> dict[str, str]:
    checkpoint = find_checkpoint(run)
    name = checkpoint.engine if checkpoint else run.profile.engine
    return ENGINES[name].versions("convert")


STAGE = Stage(
    name="convert",
    inputs=_inputs,
    execute=_execute,
    outputs=lambda run: ("hf",),
    versions=_versions,
    depends_on=("vocab", "train", "evaluate"),
    replaces_outputs=True,
)
