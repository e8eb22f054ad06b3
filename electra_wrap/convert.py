"""`convert`: a checkpoint becomes two models that transformers loads, or back."""

import itertools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from electra_wrap import checkpoints, files, subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.card import model_card
from electra_wrap.data import corpus, tokenization, vocab
from electra_wrap.engines import engine_of
from electra_wrap.errors import UsageError
from electra_wrap.progress import warn
from electra_wrap.run import Run

#: A plain sentence, and one with words that do not fit.
TEXTS = ("Los pájaros están hablando", "Los pájaros están cantando en la piedra del mañana")

#: Held-out lines that the report shows with the models' output: their number, and their length.
SENTENCES, SENTENCE_LENGTHS = 2, range(50, 110)


def export(run: Run, step: int, out: Path) -> dict[str, Any]:
    """Write both networks of a checkpoint to `out`, each with its tokenizer and its model card.

    Load them in transformers. UsageError if one lacks weights or gives values that are not finite.
    Return what `inference.check` returns.
    """
    run.refuse_other_vocabulary()
    engine_of(run).export(run, step, out)
    tokens = vocab.read(run.vocabulary)
    for network in NETWORKS:
        tokenization.write_tokenizer(
            out / network,
            tokens,
            max_length=run.profile.model.max_seq_length,  # later positions were never trained
            **run.profile.tokenizer.normalization,
        )
        files.write_text(out / network / "README.md", model_card(run, network, step))
    lines = (line.decode().strip() for line in corpus.lines(run.held_out))
    fitting = (line for line in lines if len(line) in SENTENCE_LENGTHS)
    job = {
        "directory": str(out),
        "texts": list(TEXTS),
        "sentences": list(itertools.islice(fitting, SENTENCES)),
        "seed": run.profile.train.seed,
    }
    log_file = run.log_file("convert")
    results: dict[str, Any] = subprocesses.call(
        "electra_wrap.inference", "check", job, log=log_file, env=subprocesses.OFFLINE
    )
    return results


def from_run(run: Run, step: int | None, out: Path) -> None:
    """Export a run's latest intact checkpoint, or that of a step, to the new directory `out`."""
    found = checkpoints.require(run.model_dir, step)
    with _new_directory(out) as work:
        export(run, found, work)


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
    prefix = checkpoints.find_prefix(str(checkpoint.absolute()), step)
    tokens = vocab.read(vocabulary) if vocabulary else []
    if vocab.is_uncased(tokens) and not lowercase:
        warn(f"{vocabulary} has no upper-case letters; was the model trained with --lowercase?")
    with _new_directory(out) as work:
        job = {"checkpoint": prefix, "out": str(work), "heads": {"discriminator": heads}}
        configs = subprocesses.call("electra_wrap.weights", "to_transformers", job)
        for network in NETWORKS if tokens else ():
            vocab.refuse_other_size(vocabulary, tokens, configs[network]["vocab_size"])
            tokenization.write_tokenizer(
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
