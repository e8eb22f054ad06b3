"""Convert TensorFlow checkpoints that are not in a run directory, and transformers' models back."""

from __future__ import annotations

from pathlib import Path

from electra_wrap import subprocesses
from electra_wrap.data import vocab
from electra_wrap.errors import UsageError
from electra_wrap.files import new_directory
from electra_wrap.pipeline.convert import new_models
from electra_wrap.profile import NETWORKS
from electra_wrap.weights import find_prefix


def from_tensorflow(
    checkpoint: Path,
    out: Path,
    *,
    step: int | None = None,
    model: str = "both",
    vocabulary: Path | None = None,
    heads: int | None = None,
    generator_heads: int | None = None,
    lowercase: bool = False,
    strip_accents: bool = False,
    max_length: int | None = None,
    force: bool = False,
) -> None:
    """Write `out`/discriminator and `out`/generator (or the `model` of the two) for transformers.

    `checkpoint` is a prefix, an .index file or a directory, of which the checkpoint of `step` or
    the latest is converted. With a `vocabulary`, a tokenizer is written too: `max_length` is its
    longest text, by default the model's positions. UsageError, with nothing written, for anything
    but a complete checkpoint of this vocabulary, and for existing output without `force`.
    """
    if strip_accents and not lowercase:
        raise UsageError("--strip-accents has an effect with --lowercase only; give both")
    prefix = find_prefix(str(checkpoint.absolute()), step)
    tokens = vocab.read(vocabulary) if vocabulary else []
    normalization = {"lowercase": lowercase, "strip_accents": strip_accents}
    networks = NETWORKS if model == "both" else (model,)
    with new_models(out, networks, replace=force) as work:
        arguments = {
            "checkpoint": prefix,
            "out": str(work.absolute()),
            "networks": networks,
            "heads": {"discriminator": heads, "generator": generator_heads},
            "expected": {n: {"vocab_size": len(tokens)} for n in networks} if tokens else {},
        }
        configs = subprocesses.call("electra_wrap.weights", "to_transformers", arguments)
        for network in networks if tokens else ():
            length = max_length or configs[network]["max_position_embeddings"]
            vocab.write_tokenizer(work / network, tokens, max_length=length, **normalization)


def to_tensorflow(
    discriminator: Path, generator: Path, out: Path, *, step: int = 0, force: bool = False
) -> None:
    """Write the directory `out` with a checkpoint of two directories of transformers' models.

    run_pretraining.py continues from it at `step`. UsageError, with nothing written, if the two are
    not the networks of one ELECTRA, and for existing output without `force`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(out, replace=force) as directory:
        arguments = {
            "discriminator": str(discriminator.absolute()),
            "generator": str(generator.absolute()),
            "out": str(directory.absolute()),
            "step": step,
        }
        subprocesses.call("electra_wrap.weights", "to_tensorflow", arguments)
