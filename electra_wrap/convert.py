"""`convert`: a checkpoint becomes two models that transformers loads, or back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from electra_wrap import checkpoints, files, stages, subprocesses
from electra_wrap.data import vocab
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS
from electra_wrap.run import Run
from electra_wrap.weights import find_prefix


def from_run(run: Run, step: int | None, out: Path) -> None:
    """Export a run's latest intact checkpoint, or that of a step, to the new directory `out`."""
    found = checkpoints.require(run.model_dir, step)
    with _new_directory(out) as work:
        stages.export(run, found, work)


def from_tensorflow(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    vocabulary: Path | None = None,
    heads: int | None = None,
    lowercase: bool = False,
    strip_accents: bool = False,
) -> None:
    """Write `out`/discriminator and `out`/generator for transformers.

    `checkpoint` is a prefix, an .index file or a directory, of which the checkpoint of `step` or
    the latest is converted. With a `vocabulary`, a tokenizer is written too. `heads` is the number
    of the discriminator's attention heads; a generator's follow from its size. UsageError, with
    nothing written, for anything but a complete checkpoint of this vocabulary.
    """
    if strip_accents and not lowercase:
        raise UsageError("--strip-accents has an effect with --lowercase only; give both")
    prefix = find_prefix(str(checkpoint.absolute()), step)
    tokens = vocab.read(vocabulary) if vocabulary else []
    with _new_directory(out) as work:
        job = {"checkpoint": prefix, "out": str(work), "heads": {"discriminator": heads}}
        if tokens:
            job["expected"] = {network: {"vocab_size": len(tokens)} for network in NETWORKS}
        configs = subprocesses.call("electra_wrap.weights", "to_transformers", job)
        for network in NETWORKS if tokens else ():
            vocab.write_tokenizer(
                work / network,
                tokens,
                max_length=configs[network]["max_position_embeddings"],
                lowercase=lowercase,
                strip_accents=strip_accents,
            )


def to_tensorflow(discriminator: Path, generator: Path, out: Path, *, step: int = 0) -> None:
    """Write the directory `out` with a checkpoint of two directories of transformers' models.

    run_pretraining.py continues from it at `step`. UsageError, with nothing written, if the two are
    not the networks of one ELECTRA.
    """
    job = {"discriminator": str(discriminator.absolute()), "generator": str(generator.absolute())}
    with _new_directory(out) as work:
        job["out"] = str(work)
        subprocesses.call("electra_wrap.weights", "to_tensorflow", {**job, "step": step})


def _new_directory(out: Path) -> AbstractContextManager[Path]:
    """Yield a temporary directory that becomes `out` at the end. UsageError if that exists."""
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    return files.atomic(out.absolute(), directory=True)
