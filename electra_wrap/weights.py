"""The weights of upstream's TensorFlow checkpoints under transformers' names, in both directions.

The tables below are the mapping. TensorFlow multiplies inputs with a kernel [in, out], PyTorch with
a weight [out, in]: kernels are transposed, nothing else changes. A variable of a checkpoint that is
neither in the tables nor in `NOT_WEIGHTS` is an error.

`to_transformers` and `to_tensorflow` import TensorFlow: call them through `subprocesses.call`.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from electra_wrap.architecture import NETWORKS, Network, Shape, hf_config, read_hf_config
from electra_wrap.errors import UsageError
from electra_wrap.files import write_json

Shapes = Mapping[str, tuple[int, ...]]

#: Upstream's variable scope of each network's transformer. transformers calls both `electra`.
SCOPES = {"discriminator": "electra", "generator": "generator"}

#: Under a scope. A generator without embeddings of its own uses the discriminator's.
EMBEDDINGS = {
    "embeddings/word_embeddings": "embeddings.word_embeddings.weight",
    "embeddings/position_embeddings": "embeddings.position_embeddings.weight",
    "embeddings/token_type_embeddings": "embeddings.token_type_embeddings.weight",
    "embeddings/LayerNorm/gamma": "embeddings.LayerNorm.weight",
    "embeddings/LayerNorm/beta": "embeddings.LayerNorm.bias",
}

#: Under a scope, if the embedding size differs from the hidden size.
PROJECTION = {
    "embeddings_project/kernel": "embeddings_project.weight",
    "embeddings_project/bias": "embeddings_project.bias",
}

#: Under a scope's encoder/layer_N, transformers' encoder.layer.N.
LAYER = {
    "attention/self/query/kernel": "attention.self.query.weight",
    "attention/self/query/bias": "attention.self.query.bias",
    "attention/self/key/kernel": "attention.self.key.weight",
    "attention/self/key/bias": "attention.self.key.bias",
    "attention/self/value/kernel": "attention.self.value.weight",
    "attention/self/value/bias": "attention.self.value.bias",
    "attention/output/dense/kernel": "attention.output.dense.weight",
    "attention/output/dense/bias": "attention.output.dense.bias",
    "attention/output/LayerNorm/gamma": "attention.output.LayerNorm.weight",
    "attention/output/LayerNorm/beta": "attention.output.LayerNorm.bias",
    "intermediate/dense/kernel": "intermediate.dense.weight",
    "intermediate/dense/bias": "intermediate.dense.bias",
    "output/dense/kernel": "output.dense.weight",
    "output/dense/bias": "output.dense.bias",
    "output/LayerNorm/gamma": "output.LayerNorm.weight",
    "output/LayerNorm/beta": "output.LayerNorm.bias",
}

DISCRIMINATOR_HEAD = {
    "discriminator_predictions/dense/kernel": "discriminator_predictions.dense.weight",
    "discriminator_predictions/dense/bias": "discriminator_predictions.dense.bias",
    "discriminator_predictions/dense_1/kernel": "discriminator_predictions.dense_prediction.weight",
    "discriminator_predictions/dense_1/bias": "discriminator_predictions.dense_prediction.bias",
}

#: The generator's output weight is the word embeddings again, which transformers ties
#: when it loads the model.
GENERATOR_HEAD = {
    "generator_predictions/dense/kernel": "generator_predictions.dense.weight",
    "generator_predictions/dense/bias": "generator_predictions.dense.bias",
    "generator_predictions/LayerNorm/gamma": "generator_predictions.LayerNorm.weight",
    "generator_predictions/LayerNorm/beta": "generator_predictions.LayerNorm.bias",
    "generator_predictions/output_bias": "generator_lm_head.bias",
}

#: Variables that no model has: the optimizer's, the step, and the temperature of released models.
NOT_WEIGHTS = re.compile(r"^global_step$|/adam_[mv]$|(^|/)temperature$")

#: Slots of upstream's AdamWeightDecayOptimizer for each variable: NAME/adam_m and NAME/adam_v.
SLOTS = ("adam_m", "adam_v")


def mapping(
    network: Network, layers: int, *, projection: bool, tied_embeddings: bool = True
) -> dict[str, str]:
    """Return transformers' name of each TensorFlow variable of a network with `layers` layers."""
    scope = SCOPES[network]
    embeddings_scope = "electra" if tied_embeddings else scope
    names = {f"{embeddings_scope}/{a}": f"electra.{b}" for a, b in EMBEDDINGS.items()}
    if projection:
        names |= {f"{scope}/{a}": f"electra.{b}" for a, b in PROJECTION.items()}
    for n in range(layers):
        names |= {
            f"{scope}/encoder/layer_{n}/{a}": f"electra.encoder.layer.{n}.{b}"
            for a, b in LAYER.items()
        }
    return names | (DISCRIMINATOR_HEAD if network == "discriminator" else GENERATOR_HEAD)


def is_transposed(variable: str) -> bool:
    """Whether a TensorFlow variable is transposed between the two."""
    return variable.endswith("/kernel")


def describe(
    network: Network, shapes: Shapes, heads: int | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a network's config.json and its mapping, given the shapes of a checkpoint's variables.

    Shapes do not tell the number of attention heads: it is `heads`, or hidden size // 64 as in
    upstream. UsageError if the network is missing or incomplete.
    """
    scope = SCOPES[network]
    tied = f"{scope}/embeddings/word_embeddings" not in shapes
    embeddings = f"{'electra' if tied else scope}/embeddings"
    try:
        vocab_size, embedding_size = shapes[f"{embeddings}/word_embeddings"]
        hidden, intermediate = shapes[f"{scope}/encoder/layer_0/intermediate/dense/kernel"]
    except KeyError as error:
        message = f"the checkpoint has no {network} ({error.args[0]} is missing)"
        raise UsageError(f"{message}; give a pre-training checkpoint") from None
    layer_name = re.compile(rf"{scope}/encoder/layer_(\d+)/")
    layers = len({match[1] for match in map(layer_name.match, shapes) if match})
    heads = heads or max(1, hidden // 64)
    if hidden % heads:
        raise UsageError(f"{heads} heads do not divide the {network}'s {hidden}; give a divisor")
    names = mapping(network, layers, projection=embedding_size != hidden, tied_embeddings=tied)
    if missing := [name for name in names if name not in shapes]:
        raise UsageError(f"the {network} lacks {shorten(missing)}; give a complete checkpoint")
    shape = Shape(embedding_size, hidden, layers, heads, intermediate)
    config = hf_config(network, shape, vocab_size)
    config["max_position_embeddings"] = shapes[f"{embeddings}/position_embeddings"][0]
    config["type_vocab_size"] = shapes[f"{embeddings}/token_type_embeddings"][0]
    return config, names


def to_transformers(
    checkpoint: str,
    out: str,
    *,
    heads: Mapping[Network, int | None] = {},
    expected: Mapping[Network, Mapping[str, Any]] = {},
) -> dict[Network, dict[str, Any]]:
    """Write `out`/NETWORK for each network, as transformers loads it, and return their configs.

    `checkpoint` is a prefix, e.g. model.ckpt-100; both paths are absolute. `heads` overrides the
    number of attention heads. `expected` holds config.json values that the checkpoint must have.
    UsageError for anything but a complete ELECTRA checkpoint with finite values.
    """
    import tensorflow as tf

    configs, mappings = dict[Network, dict[str, Any]](), dict[Network, dict[str, str]]()
    path = Path(checkpoint)
    try:
        # In its directory: TensorFlow takes a path with [, ], * or ? for a pattern.
        with contextlib.chdir(path.parent):
            reader = tf.train.load_checkpoint(path.name)
            shapes = {name: tuple(s) for name, s in reader.get_variable_to_shape_map().items()}
            for network in NETWORKS:
                configs[network], mappings[network] = describe(network, shapes, heads.get(network))
                refuse_difference(network, configs[network], expected.get(network, {}))
            known = {variable for names in mappings.values() for variable in names}
            if unknown := [n for n in shapes if n not in known and not NOT_WEIGHTS.search(n)]:
                message = f"variables that are not ELECTRA's: {shorten(sorted(unknown))}"
                raise UsageError(f"{message}; give a pre-training checkpoint")
            for network, names in mappings.items():
                directory = Path(out, network)
                directory.mkdir(parents=True)
                write_json(directory / "config.json", configs[network])
                _write(directory / "model.safetensors", reader, names)
    except UsageError as error:
        raise UsageError(f"{checkpoint}: {error}") from None
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        # What TensorFlow's reader raises for damaged files.
        reason = str(error).strip().splitlines()[0]
        message = f"{checkpoint}: not a complete checkpoint ({reason}); choose another"
        raise UsageError(message) from None
    return configs


def refuse_difference(network: str, config: dict[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if config.get(key) != value:
            message = f"the {network}'s {key} is {config.get(key)}, but {value} is expected"
            raise UsageError(f"{message}; give the profile and vocabulary of its training")


def _write(path: Path, reader: Any, names: Mapping[str, str]) -> None:
    """Write a checkpoint's variables as PyTorch has them. UsageError if a value is not finite."""
    tensors = {}
    for variable, pytorch in names.items():
        value = np.asarray(reader.get_tensor(variable), dtype=np.float32)
        if not np.isfinite(value).all():
            problem = f"{variable} has values that are not finite"
            raise UsageError(f"{problem}; choose an earlier checkpoint")
        tensors[pytorch] = np.ascontiguousarray(value.T if is_transposed(variable) else value)
    save_file(tensors, path, metadata={"format": "pt"})


def to_tensorflow(discriminator: str, generator: str, out: str, *, step: int = 0) -> None:
    """Write `out`/model.ckpt-STEP, from which run_pretraining.py continues.

    `discriminator` and `generator` are directories of transformers' models. The optimizer's slots
    are zero, as at the start of a training. UsageError if the two are not the networks of one
    ELECTRA.
    """
    paths: dict[Network, str] = {"discriminator": discriminator, "generator": generator}
    models = {network: load(Path(path)) for network, path in paths.items()}
    tied = have_same_embeddings(models["discriminator"][1], models["generator"][1])
    values: dict[str, np.ndarray] = {"global_step": np.array(step, np.int64)}
    for network, (config, tensors) in models.items():
        names = _names_in_upstream(network, config, tied)
        refuse_other_parameters(network, tensors, names.values())
        for variable, pytorch in names.items():
            array = tensors[pytorch].astype(np.float32)
            values[variable] = array.T if is_transposed(variable) else array
            for slot in SLOTS:
                values[f"{variable}/{slot}"] = np.zeros_like(values[variable])
    import tensorflow as tf  # after the checks, which can do without

    tf.raw_ops.SaveV2(
        prefix=str(Path(out) / f"model.ckpt-{step}"),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )
    tf.compat.v1.train.update_checkpoint_state(out, f"model.ckpt-{step}")


def load(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the sizes in a model's config.json, and its weights. UsageError if they are damaged.

    Some versions of transformers also write the word embeddings again, as the generator's output
    weight, and the numbers of the positions. They are left out. UsageError if they are others.
    """
    config = read_hf_config(directory)
    try:
        tensors = load_file(directory / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{directory} has no model of transformers ({error}); correct it"
        ) from None
    words = tensors.get("electra.embeddings.word_embeddings.weight")
    output = tensors.pop("generator_lm_head.weight", None)
    positions = tensors.pop("electra.embeddings.position_ids", np.arange(1))
    if output is not None and not np.array_equal(output, words):
        problem = f"{directory} has an output weight of its own, which neither engine has"
        raise UsageError(f"{problem}; give a model whose output weight is its word embeddings")
    if not np.array_equal(positions.ravel(), np.arange(positions.size)):
        raise UsageError(f"{directory} numbers positions in another order; give another model")
    return config, tensors


def refuse_other_parameters(
    network: Network, tensors: Mapping[str, np.ndarray], expected: Iterable[str]
) -> None:
    if difference := sorted(set(expected) ^ tensors.keys()):
        problem = f"{shorten(difference)}: missing in or foreign to a {network}"
        raise UsageError(f"{problem}; give a complete pre-trained model")


def have_same_embeddings(
    discriminator: Mapping[str, np.ndarray], generator: Mapping[str, np.ndarray]
) -> bool:
    names = [name for name in generator if name.startswith("electra.embeddings.")]
    return all(
        name in discriminator and np.array_equal(discriminator[name], generator[name])
        for name in names
    )


def _names_in_upstream(network: Network, config: dict[str, int], tied: bool) -> dict[str, str]:
    """Return the mapping of a model. UsageError if upstream has no such model."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    projection = config["embedding_size"] != hidden
    # The discriminator's heads are in model_hparam_overrides; a generator's follow from its size.
    other_heads = heads != max(1, hidden // 64)
    if network == "generator" and (other_heads or (projection and not tied)):
        sizes = f"{hidden} units, {heads} heads and embeddings of size {config['embedding_size']}"
        raise UsageError(f"upstream has no {network} of {sizes}; such a model cannot be converted")
    layers = config["num_hidden_layers"]
    return mapping(network, layers, projection=projection, tied_embeddings=tied)


def shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
