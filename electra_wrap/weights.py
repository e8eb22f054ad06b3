"""The weights of upstream's TensorFlow checkpoints under transformers' names.

The mapping is data: `rows` lists, for one network, each TensorFlow variable beside its PyTorch parameter.
Dense kernels are transposed (TensorFlow multiplies from the left, PyTorch from the right); nothing else is
changed. Whatever of a checkpoint is not in the mapping and not known by name is an error.

Run as a module (`process.call`), because it imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import process, vocab
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS, Network, Shape, hf_config
from electra_wrap.rundir import partial, write_json


@dataclasses.dataclass(frozen=True)
class Row:
    """One variable: its name in the checkpoint, in transformers, and whether it is transposed between them."""

    tensorflow: str
    pytorch: str
    transposed: bool = False


def _plain(tensorflow: str, pytorch: str) -> list[Row]:
    return [Row(tensorflow, pytorch)]


def _dense(tensorflow: str, pytorch: str) -> list[Row]:
    return [Row(f"{tensorflow}/kernel", f"{pytorch}.weight", True), Row(f"{tensorflow}/bias", f"{pytorch}.bias")]


def _norm(tensorflow: str, pytorch: str) -> list[Row]:
    return [Row(f"{tensorflow}/gamma", f"{pytorch}.weight"), Row(f"{tensorflow}/beta", f"{pytorch}.bias")]


def rows(network: Network, layers: int, *, projection: bool, tied_embeddings: bool = True) -> list[Row]:
    """The mapping of one network with `layers` layers.

    `projection`: embeddings and hidden size differ. `tied_embeddings`: the generator uses the discriminator's.
    """
    scope = {"discriminator": "electra", "generator": "generator"}[network]
    embeddings = f"{'electra' if tied_embeddings else scope}/embeddings"
    found = [
        *_plain(f"{embeddings}/word_embeddings", "electra.embeddings.word_embeddings.weight"),
        *_plain(f"{embeddings}/position_embeddings", "electra.embeddings.position_embeddings.weight"),
        *_plain(f"{embeddings}/token_type_embeddings", "electra.embeddings.token_type_embeddings.weight"),
        *_norm(f"{embeddings}/LayerNorm", "electra.embeddings.LayerNorm"),
    ]
    if projection:
        found += _dense(f"{scope}/embeddings_project", "electra.embeddings_project")
    for i in range(layers):
        ours, theirs = f"{scope}/encoder/layer_{i}", f"electra.encoder.layer.{i}"
        found += [
            *_dense(f"{ours}/attention/self/query", f"{theirs}.attention.self.query"),
            *_dense(f"{ours}/attention/self/key", f"{theirs}.attention.self.key"),
            *_dense(f"{ours}/attention/self/value", f"{theirs}.attention.self.value"),
            *_dense(f"{ours}/attention/output/dense", f"{theirs}.attention.output.dense"),
            *_norm(f"{ours}/attention/output/LayerNorm", f"{theirs}.attention.output.LayerNorm"),
            *_dense(f"{ours}/intermediate/dense", f"{theirs}.intermediate.dense"),
            *_dense(f"{ours}/output/dense", f"{theirs}.output.dense"),
            *_norm(f"{ours}/output/LayerNorm", f"{theirs}.output.LayerNorm"),
        ]
    if network == "discriminator":
        found += [
            *_dense("discriminator_predictions/dense", "discriminator_predictions.dense"),
            *_dense("discriminator_predictions/dense_1", "discriminator_predictions.dense_prediction"),
        ]
    else:
        # The output layer's weight is the word embeddings again; transformers ties the two when it loads.
        found += [
            *_dense("generator_predictions/dense", "generator_predictions.dense"),
            *_norm("generator_predictions/LayerNorm", "generator_predictions.LayerNorm"),
            *_plain("generator_predictions/output_bias", "generator_lm_head.bias"),
        ]
    return found


#: Variables of a checkpoint that are no weights.
_NOT_WEIGHTS = re.compile(r"(^global_step$|/adam_[mv]$)")


def describe(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Shape, int, list[Row]]:
    """Return shape, vocabulary size and mapping of a network, read from the checkpoint's variable shapes.

    UsageError if the network is not there.
    """
    scope = {"discriminator": "electra", "generator": "generator"}[network]
    tied = f"{scope}/embeddings/word_embeddings" not in shapes
    words = f"{'electra' if tied else scope}/embeddings/word_embeddings"
    first = f"{scope}/encoder/layer_0/intermediate/dense/kernel"
    if words not in shapes or first not in shapes:
        raise UsageError(f"the checkpoint has no {network} ({first} is missing); give a pre-training checkpoint")
    vocab_size, embedding = shapes[words]
    hidden, intermediate = shapes[first]
    layers = {int(m[1]) for name in shapes if (m := re.match(rf"{scope}/encoder/layer_(\d+)/", name))}
    shape = Shape(embedding, hidden, max(layers) + 1, max(1, hidden // 64), intermediate)
    mapping = rows(network, shape.num_hidden_layers, projection=embedding != hidden, tied_embeddings=tied)
    return shape, vocab_size, mapping


def convert(
    checkpoint: str,
    out: str,
    vocabulary: str | None = None,
    networks: list[Network] | None = None,
    lowercase: bool = False,
    strip_accents: bool = False,
    expected: Mapping[Network, Any] | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Write `out`/discriminator and `out`/generator, as transformers loads them, from a TensorFlow checkpoint.

    `checkpoint` is a prefix (…/model.ckpt-100), its .index file, or a directory, whose latest is taken.
    `expected` holds config.json contents that the checkpoint's shapes must agree with. Returns the prefix used
    and the number of variables of each network. UsageError for what is no complete ELECTRA checkpoint, for a
    vocabulary of another size, and for existing output.
    """
    import tensorflow as tf

    prefix = _prefix(checkpoint, tf)
    try:
        reader = tf.train.load_checkpoint(prefix)
    except (tf.errors.OpError, ValueError) as error:
        raise UsageError(f"{prefix}: not a readable checkpoint: {str(error).splitlines()[0]}") from None
    shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    described = {network: describe(network, shapes) for network in networks or NETWORKS}
    _check_names(shapes, prefix)
    tokens = vocab.read(Path(vocabulary)) if vocabulary else None
    for network, (shape, vocab_size, mapping) in described.items():
        if missing := [row.tensorflow for row in mapping if row.tensorflow not in shapes]:
            raise UsageError(f"{prefix}: the {network} lacks {', '.join(missing[:3])}; give a complete checkpoint")
        if tokens is not None and len(tokens) != vocab_size:
            raise UsageError(f"{vocabulary} has {len(tokens)} tokens, the checkpoint {vocab_size}; give its vocabulary")
        config = hf_config(network, shape, vocab_size)
        for key, value in (expected or {}).get(network, {}).items():
            if config.get(key) != value:
                raise UsageError(f"{prefix}: the {network}'s {key} is {config.get(key)}, the profile says {value}")
        if (target := Path(out) / network).exists():
            raise UsageError(f"{target} exists; move it away or choose another --out")
    for network, (shape, vocab_size, mapping) in described.items():
        with partial(Path(out) / network) as directory:
            directory.mkdir()
            write_json(directory / "config.json", hf_config(network, shape, vocab_size))
            _save({row.pytorch: _read(reader, row) for row in mapping}, directory / "model.safetensors")
            if tokens is not None:
                vocab.write_tokenizer(
                    directory,
                    tokens,
                    lowercase=lowercase,
                    strip_accents=strip_accents,
                    max_length=max_length or hf_config(network, shape, vocab_size)["max_position_embeddings"],
                )
    return {"checkpoint": prefix, "variables": {network: len(d[2]) for network, d in described.items()}}


def _prefix(checkpoint: str, tf: Any) -> str:
    path = Path(checkpoint)
    if path.is_dir():
        if latest := tf.train.latest_checkpoint(str(path)):
            return str(latest)
        found = sorted(p.with_suffix("") for p in path.glob("*.index"))
        if len(found) != 1:
            raise UsageError(f"{path} has {len(found)} checkpoints and no `checkpoint` file; name one of them")
        return str(found[0])
    path = path.with_suffix("") if path.suffix == ".index" else path
    if not path.with_name(f"{path.name}.index").is_file():
        raise UsageError(f"{checkpoint}: no checkpoint; give a directory or a prefix like model.ckpt-1000")
    return str(path)


def _check_names(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    """UsageError if the checkpoint has a variable that neither network nor optimizer accounts for."""
    known: set[str] = set()
    for network in NETWORKS:
        try:
            known |= {row.tensorflow for row in describe(network, shapes)[2]}
        except UsageError:
            continue  # one network alone is a complete checkpoint of it
    unknown = sorted(name for name in shapes if name not in known and not _NOT_WEIGHTS.search(name))
    if unknown:
        raise UsageError(f"{prefix}: unknown variables {', '.join(unknown[:3])} ({len(unknown)}); not ELECTRA's")


def _read(reader: Any, row: Row) -> np.ndarray:
    value = np.asarray(reader.get_tensor(row.tensorflow), dtype=np.float32)
    if not np.isfinite(value).all():
        raise UsageError(f"{row.tensorflow} has values that are not finite; take an earlier checkpoint")
    return np.ascontiguousarray(value.T if row.transposed else value)


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


if __name__ == "__main__":
    process.serve(convert)
