"""The weights of upstream's TensorFlow checkpoints under transformers' names.

The mapping is data: `rows` lists, for one network, each TensorFlow variable beside its PyTorch parameter.
Dense kernels are transposed (TensorFlow multiplies from the left, PyTorch from the right); nothing else is
changed. Whatever of a checkpoint is not in the mapping and not known by name is an error.

Run as a module (`process.call`), because it imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from electra_wrap import process, vocab
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS, Network, Shape, hf_config
from electra_wrap.rundir import output, write_json

Shapes = Mapping[str, tuple[int, ...]]

#: Upstream's variable scope of each network. The generator shares embeddings in the discriminator's.
_SCOPES = {"discriminator": "electra", "generator": "generator"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One variable: its name in the checkpoint, in transformers, and whether it is transposed between them."""

    tensorflow: str
    pytorch: str
    transposed: bool = False


def _dense(tensorflow: str, pytorch: str) -> list[Row]:
    return [Row(f"{tensorflow}/kernel", f"{pytorch}.weight", True), Row(f"{tensorflow}/bias", f"{pytorch}.bias")]


def _norm(tensorflow: str, pytorch: str) -> list[Row]:
    return [Row(f"{tensorflow}/gamma", f"{pytorch}.weight"), Row(f"{tensorflow}/beta", f"{pytorch}.bias")]


def rows(network: Network, layers: int, *, projection: bool, tied_embeddings: bool = True) -> list[Row]:
    """The mapping of one network with `layers` layers.

    `projection`: embeddings and hidden size differ. `tied_embeddings`: the generator uses the discriminator's.
    """
    scope = _SCOPES[network]
    embeddings = f"{'electra' if tied_embeddings else scope}/embeddings"
    found = [
        Row(f"{embeddings}/word_embeddings", "electra.embeddings.word_embeddings.weight"),
        Row(f"{embeddings}/position_embeddings", "electra.embeddings.position_embeddings.weight"),
        Row(f"{embeddings}/token_type_embeddings", "electra.embeddings.token_type_embeddings.weight"),
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
            Row("generator_predictions/output_bias", "generator_lm_head.bias"),
        ]
    return found


#: Variables of a checkpoint that no model has: the optimizer's, the step, and what released checkpoints carry along.
NOT_WEIGHTS = re.compile(r"^global_step$|/adam_[mv]$|(^|/)temperature$")

#: Optimizer slots of upstream's AdamWeightDecayOptimizer, beside each variable.
SLOTS = ("adam_m", "adam_v")


@dataclasses.dataclass(frozen=True)
class Described:
    """One network as a checkpoint has it: transformers' config.json and the mapping."""

    config: dict[str, Any]
    mapping: list[Row]


def describe(network: Network, shapes: Shapes, heads: int | None = None) -> Described:
    """Read one network's configuration and mapping off a checkpoint's variable shapes.

    The number of attention heads leaves no trace in shapes: it is hidden size // 64, as upstream has it, or
    `heads`. UsageError, with the names, if the network is not there, is incomplete or is Electric's.
    """
    scope = _SCOPES[network]
    if any(name.startswith("generator_ltr/") for name in shapes):
        raise UsageError(
            "the checkpoint is Electric's, whose generator has two towers; transformers has no such model: "
            "convert an ELECTRA checkpoint"
        )
    tied = f"{scope}/embeddings/word_embeddings" not in shapes
    embeddings = f"{'electra' if tied else scope}/embeddings"
    first = f"{scope}/encoder/layer_0/intermediate/dense/kernel"
    if missing := [name for name in (f"{embeddings}/word_embeddings", first) if name not in shapes]:
        raise UsageError(f"the checkpoint has no {network} ({missing[0]} is missing); give a pre-training checkpoint")
    vocab_size, embedding_size = shapes[f"{embeddings}/word_embeddings"]
    hidden, intermediate = shapes[first]
    layers = 1 + max(int(m[1]) for name in shapes if (m := re.match(rf"{scope}/encoder/layer_(\d+)/", name)))
    heads = heads or max(1, hidden // 64)
    if hidden % heads:
        raise UsageError(f"the {network}'s hidden size {hidden} is not divisible by {heads} heads; give a divisor")
    mapping = rows(network, layers, projection=embedding_size != hidden, tied_embeddings=tied)
    if missing := [row.tensorflow for row in mapping if row.tensorflow not in shapes]:
        raise UsageError(f"the {network} lacks {_list(missing)}; give a complete checkpoint")
    config = {
        **hf_config(network, Shape(embedding_size, hidden, layers, heads, intermediate), vocab_size),
        "max_position_embeddings": shapes[f"{embeddings}/position_embeddings"][0],
        "type_vocab_size": shapes[f"{embeddings}/token_type_embeddings"][0],
    }
    return Described(config, mapping)


def unknown(shapes: Shapes) -> list[str]:
    """Return the variables that neither network nor `NOT_WEIGHTS` accounts for."""
    known: set[str] = set()
    for network in NETWORKS:
        with contextlib.suppress(UsageError):  # one network alone is a complete checkpoint of it
            known |= {row.tensorflow for row in describe(network, shapes).mapping}
    return sorted(name for name in shapes if name not in known and not NOT_WEIGHTS.search(name))


def convert(
    checkpoint: str,
    out: str,
    *,
    step: int | None = None,
    vocabulary: str | None = None,
    networks: Sequence[Network] = NETWORKS,
    heads: Mapping[Network, int] | None = None,
    lowercase: bool = False,
    strip_accents: bool = False,
    max_length: int | None = None,
    expected: Mapping[Network, Any] | None = None,
    slots: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write `out`/discriminator and `out`/generator, as transformers loads them, from a TensorFlow checkpoint.

    `checkpoint` is a prefix (…/model.ckpt-100), its .index file, or a directory, whose `step` or latest is taken.
    `expected` holds config.json contents with which the checkpoint's shapes must agree. With `slots`, the optimizer's
    are beside each model, as adam_m.safetensors and adam_v.safetensors under the same names. Tensors pass one by one:
    memory is that of TensorFlow and the largest of them. Returns the prefix used and the number of variables of
    each network. UsageError for what is no complete ELECTRA checkpoint, for a vocabulary of another size, and
    for existing output without `force`; then nothing is written.
    """
    prefix = find(checkpoint, step)
    import tensorflow as tf  # after what can fail without it

    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        described = {network: describe(network, shapes, (heads or {}).get(network)) for network in networks}
        if names := unknown(shapes):
            raise UsageError(f"variables that are not ELECTRA's: {_list(names)}; give a pre-training checkpoint")
        tokens = vocab.read(Path(vocabulary)) if vocabulary else None
        for network, one in described.items():
            config = one.config
            if tokens is not None and len(tokens) != config["vocab_size"]:
                raise UsageError(
                    f"{vocabulary} has {len(tokens)} tokens, the checkpoint {config['vocab_size']}; give its vocabulary"
                )
            for key, value in (expected or {}).get(network, {}).items():
                if config.get(key) != value:
                    raise UsageError(
                        f"the {network}'s {key} is {config.get(key)}, the profile says {value}; correct it"
                    )
        with contextlib.ExitStack() as stack:
            for network, one in described.items():
                directory = stack.enter_context(output(Path(out) / network, force))
                write_json(directory / "config.json", one.config)
                sizes = {row.pytorch: shapes[row.tensorflow][:: -1 if row.transposed else 1] for row in one.mapping}
                for file, slot in {"model": "", **{slot: f"/{slot}" for slot in SLOTS if slots}}.items():
                    tensors = (_read(reader, row, slot) for row in one.mapping)
                    _save(directory / f"{file}.safetensors", sizes, tensors)
                if tokens is not None:
                    keys = {"lowercase": lowercase, "strip_accents": strip_accents}
                    length = max_length or one.config["max_position_embeddings"]
                    vocab.write_tokenizer(directory, tokens, max_length=length, **keys)
    except UsageError as error:
        raise UsageError(f"{prefix}: {error}") from None
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:  # the reader's, for damaged files
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{prefix}: not a whole checkpoint ({reason}); take another one") from None
    return {"checkpoint": prefix, "variables": {network: len(one.mapping) for network, one in described.items()}}


def find(checkpoint: str, step: int | None = None) -> str:
    """Return the prefix of the checkpoint meant. UsageError if there is none, or none of that `step`."""
    path = Path(checkpoint)
    if not path.is_dir():
        path = path.with_suffix("") if path.suffix == ".index" else path
        if not path.with_name(f"{path.name}.index").is_file():
            raise UsageError(f"{checkpoint}: no checkpoint; give a directory, or a prefix like model.ckpt-1000")
        return str(path)
    found = sorted(p.with_suffix("") for p in path.glob("*.index"))
    if step is not None:
        found = [p for p in found if p.name.endswith(f"-{step}")]
    elif (path / "checkpoint").is_file():
        text = (path / "checkpoint").read_text(encoding="utf-8", errors="replace")
        latest = re.search(r'^model_checkpoint_path: "(?:.*/)?([^"/]+)"$', text, re.M)
        found = [p for p in found if latest and p.name == latest[1]] or found
    if len(found) != 1:
        names = f" ({', '.join(p.name for p in found)})" if found else ""
        of = "" if step is None else f" of step {step}"
        raise UsageError(f"{path} has {len(found) or 'no'} checkpoints{of}{names}; name one")
    return str(found[0])


def _read(reader: Any, row: Row, slot: str) -> np.ndarray:
    value = np.asarray(reader.get_tensor(row.tensorflow + slot), dtype=np.float32)
    if not np.isfinite(value).all():
        raise UsageError(f"{row.tensorflow} has values that are not finite; take an earlier checkpoint")
    return value.T if row.transposed else value


def _save(path: Path, shapes: Shapes, tensors: Iterable[np.ndarray]) -> None:
    """Write float32 tensors as a safetensors file, one after the other.

    The library's writer wants all of them in memory. The format is 8 bytes of header length, the header as JSON,
    then the tensors' bytes in order (https://github.com/huggingface/safetensors, "Format").
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor, "<f4").data)


def convert_back(discriminator: str, generator: str, out: str, *, step: int = 0, force: bool = False) -> dict[str, Any]:
    """Write `out`/model.ckpt-STEP, from which run_pretraining.py continues, from two directories of transformers.

    The optimizer's slots are those beside the models, as `convert` writes them; without those, as transformers has
    no such files, they are zero as at the start of a training. UsageError if the two are not the networks of one
    ELECTRA, or for existing output without `force`.
    """
    directories: dict[Network, Path] = {"discriminator": Path(discriminator), "generator": Path(generator)}
    opened: dict[Network, list[Any]] = {}
    configs: dict[Network, dict[str, Any]] = {}
    for network, directory in directories.items():
        slots = [path for slot in SLOTS if (path := directory / f"{slot}.safetensors").is_file()]
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            sizes = ("hidden_size", "num_attention_heads", "embedding_size", "num_hidden_layers")
            configs[network] = {key: int(config[key]) for key in sizes}
            opened[network] = [safe_open(path, "numpy") for path in (directory / "model.safetensors", *slots)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise UsageError(f"{directory}: no {network} of transformers ({error}); give its directory") from None
    # The output layer's weight is the word embeddings again.
    names = {network: set(files[0].keys()) - {"generator_lm_head.weight"} for network, files in opened.items()}
    tied = all(
        name in names["discriminator"] and np.array_equal(*(files[0].get_tensor(name) for files in opened.values()))
        for name in names["generator"]
        if name.startswith("electra.embeddings.")
    )
    variables: dict[str, tuple[Row, list[Any]]] = {}
    for network, config in configs.items():
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        projection = config["embedding_size"] != hidden
        if heads != max(1, hidden // 64) or (network == "generator" and projection and not tied):
            raise UsageError(
                f"upstream has no {network} of hidden size {hidden} with {heads} heads and embeddings of its own "
                f"of size {config['embedding_size']}; such a model cannot be converted"
            )
        mapping = rows(network, config["num_hidden_layers"], projection=projection, tied_embeddings=tied)
        if wrong := sorted(names[network] ^ {row.pytorch for row in mapping}):
            raise UsageError(f"{_list(wrong)}: missing in or foreign to a {network}; give a whole pre-trained one")
        variables.update({row.tensorflow: (row, opened[network]) for row in mapping})
    import tensorflow as tf  # after what can fail without it

    with output(Path(out), force) as directory:
        saved = {"global_step": tf.constant(step, tf.int64)}
        for name, (row, files) in variables.items():
            values = (file.get_tensor(row.pytorch) for file in files)
            weight, *adam = (tf.constant(v.T if row.transposed else v, tf.float32) for v in values)
            saved[name] = weight
            for slot, value in zip(SLOTS, adam or [tf.zeros_like(weight)] * 2, strict=True):
                saved[f"{name}/{slot}"] = value
        prefix = f"model.ckpt-{step}"
        tf.raw_ops.SaveV2(
            prefix=str(directory / prefix),
            tensor_names=list(saved),
            shape_and_slices=[""] * len(saved),
            tensors=list(saved.values()),
        )
        tf.compat.v1.train.update_checkpoint_state(str(directory), prefix)
    return {"checkpoint": str(Path(out) / prefix), "variables": len(variables)}


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    process.serve(convert, convert_back)
