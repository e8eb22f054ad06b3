"""The weights in `model.init_from`, from which a training starts.

They are those of a run, of two models of transformers, or of a TensorFlow checkpoint. Whatever they
are, they become two models of transformers in the run directory, once, before any other work. Sizes
and vocabulary of the profile follow from these.
"""

import contextlib
import dataclasses
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save_file

from electra_wrap import checkpoints, files, hub, subprocesses, weights
from electra_wrap.architecture import NETWORKS, SIZES, Network, Shape
from electra_wrap.data import released, vocab
from electra_wrap.engines import engine_of
from electra_wrap.errors import UsageError
from electra_wrap.profile import OF_WEIGHTS, Profile, TwoModels
from electra_wrap.progress import log
from electra_wrap.run import MANIFEST, Run

#: Keys of config.json of which both engines support one value, or the value that weights have.
_FIXED = ("vocab_size", *(field.name for field in dataclasses.fields(Shape)))
_FIXED += ("max_position_embeddings", "type_vocab_size", "hidden_act", "layer_norm_eps")


def resolve(run: Run, *, dry_run: bool = False) -> None:
    """Write the weights in model.init_from to `run.initial`, and complete the run's profile.

    When the model has checkpoints, the profile gets what was found when its training began. With
    `dry_run`, nothing is written. UsageError unless the weights are the complete and finite ones of
    one ELECTRA, and if the profile sets a key to another value than theirs.
    """
    init_from = run.profile.model.init_from
    if init_from is None:
        run.model.initial = {}
        return
    if isinstance(init_from, str) and Path(init_from).resolve() == run.directory.resolve():
        raise UsageError("model.init_from is this run directory; choose another --run-dir")
    given = init_from if isinstance(init_from, str) else init_from.model_dump()
    has_begun = bool(checkpoints.steps(run.model_dir))
    if not has_begun or run.model.initial.get("given") != given:
        log(f"reads the weights in model.init_from = {given}")
        with contextlib.ExitStack() as stack:
            if dry_run or has_begun:
                out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                files.remove(run.initial)
                out = stack.enter_context(files.atomic(run.initial, directory=True))
            values, vocabulary = _collect(init_from, run.profile, out)
            digests = [files.sha256(out / network / "model.safetensors") for network in NETWORKS]
        identity = " ".join(digest[:12] for digest in digests)
        run.model.initial = {"given": given, "values": values, "identity": identity, **vocabulary}
    own, values = run.profile.explicit(), run.model.initial["values"]
    _refuse_contradiction(own, values)
    try:
        run.profile = run.profile.with_values({**values, **own})
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UsageError(f"the weights in model.init_from: {problem}") from None


def _collect(
    init_from: str | TwoModels, profile: Profile, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write both networks to `out`/NETWORK; return the keys that follow from them, by dotted name.

    Those of models on a hub include their commits. Also return `vocab_size`, the rows of the
    embeddings, and `tokenizer`, the vocabulary of the weights or None.
    """
    exported, path = out / "exported", Path(str(init_from))
    own, tokenizer = profile.explicit(), dict[str, Any]()
    models: dict[Network, Path] = {network: exported / network for network in NETWORKS}
    if isinstance(init_from, str) and all((path / network).is_dir() for network in NETWORKS):
        init_from = TwoModels(**{network: str(path / network) for network in NETWORKS})
    if isinstance(init_from, TwoModels):
        models = {network: _find_model(getattr(init_from, network)) for network in NETWORKS}
        init_from = _pin(init_from, models)
        tokenizer = _describe_tokenizer(init_from.discriminator)
    elif (path / MANIFEST).is_file():
        source = Run.open(path)
        source.refuse_other_vocabulary()
        exported.mkdir()
        engine_of(source).export(source, checkpoints.require(source.model_dir, None), exported)
        tokenizer = {"source": str(source.vocabulary), **source.profile.tokenizer.normalization}
    elif path.exists() or Path(f"{path}.index").exists():
        prefix = checkpoints.find_prefix(str(path))
        heads = {"discriminator": own.get("model.num_attention_heads")}
        job = {"checkpoint": prefix, "out": str(exported), "heads": heads}
        subprocesses.call("electra_wrap.weights", "to_transformers", job)
    else:
        kinds = "a run, its hf/, a TensorFlow checkpoint or two models of transformers"
        raise UsageError(f"model.init_from = {init_from!r} is not there; give {kinds}")
    configs = _copy(models, out)
    files.remove(exported)
    found = _keys(configs["discriminator"], configs["generator"])
    found |= {f"tokenizer.{key}": value for key, value in tokenizer.items()}
    chosen = profile.tokenizer.source or tokenizer.get("source", "")
    size = configs["discriminator"]["vocab_size"]
    _refuse_other_vocabulary(chosen, tokenizer.get("source"), size)
    found["tokenizer.source"] = chosen
    _refuse_contradiction(own, found)
    subprocesses.call("electra_wrap.inference", "load", {"directory": str(out)})
    pinned = init_from if isinstance(init_from, str) else init_from.model_dump()
    vocabulary = {"vocab_size": size, "tokenizer": tokenizer.get("source")}
    return {**found, "model.init_from": pinned}, vocabulary


def _refuse_contradiction(own: dict[str, Any], found: dict[str, Any]) -> None:
    for key in found.keys() & own.keys():
        if not _is_close(own[key], found[key]):
            message = f"{key} = {own[key]!r}, but the weights in model.init_from have"
            raise UsageError(f"{message} {found[key]!r}; remove the key")


def _find_model(source: str) -> Path:
    """Return the directory with config.json and model.safetensors of a model of transformers."""
    paths = [_find(source, name) for name in ("config.json", "model.safetensors")]
    if None in paths:
        raise UsageError(f"{source} has no config.json or no model.safetensors; save both there")
    return Path(str(paths[0])).parent


def _find(source: str, name: str) -> Path | None:
    """Return a file of a model on a hub or on disk; None if the model lacks it."""
    if source.startswith(hub.SCHEME):
        return hub.download(source, name)
    if not Path(source).is_dir():
        raise UsageError(f"model.init_from: there is no {source}; correct it")
    path = Path(source, name)
    return path if path.is_file() else None


def _pin(sources: TwoModels, models: dict[Network, Path]) -> TwoModels:
    """Return the sources with the commits of those on a hub, which name their directories."""
    pinned: dict[Network, str] = {}
    for network in NETWORKS:
        source: str = getattr(sources, network)
        remote = source.startswith(hub.SCHEME)
        pinned[network] = f"{source.partition('@')[0]}@{models[network].name}" if remote else source
    return TwoModels(**pinned)


def _describe_tokenizer(source: str) -> dict[str, Any]:
    """Return the keys of the profile's tokenizer for a model; empty without a vocabulary."""
    vocabulary = _find(source, "vocab.txt") or _find(source, "tokenizer.json")
    if vocabulary is None:
        return {}
    name = source if source.startswith(hub.SCHEME) else str(vocabulary)
    job = {"path": str(released.find_tokenizer(name) or vocabulary.parent), "texts": []}
    found = subprocesses.call("electra_wrap.inference", "read_tokenizer", job)
    return {"source": name, **{key: found[key] for key in ("lowercase", "strip_accents")}}


def _copy(models: Mapping[Network, Path], out: Path) -> dict[Network, dict[str, Any]]:
    """Copy two models of transformers, directories, to `out`/NETWORK, and return their configs.

    UsageError unless they are complete and finite, and share their embeddings: both engines train
    such models.
    """
    configs, loaded = dict[Network, dict[str, Any]](), {}
    for network, directory in models.items():
        config, loaded[network] = weights.load(directory)
        projection = config["embedding_size"] != config["hidden_size"]
        names = weights.mapping(network, config["num_hidden_layers"], projection=projection)
        weights.refuse_other_parameters(network, loaded[network], names.values())
        shapes = {
            variable: loaded[network][pytorch].shape[
                :: -1 if weights.is_transposed(variable) else 1
            ]
            for variable, pytorch in names.items()
        }
        configs[network], _ = weights.describe(network, shapes, config["num_attention_heads"])
        fixed = {key: config[key] for key in _FIXED if key in config}
        weights.refuse_difference(network, configs[network], fixed)
        if bad := [name for name, value in loaded[network].items() if not np.isfinite(value).all()]:
            problem = f"{directory}: {weights.shorten(bad)} has values that are not finite"
            raise UsageError(f"{problem}; give another model")
    if not weights.have_same_embeddings(loaded["discriminator"], loaded["generator"]):
        problem = f"{models['generator']} has other embeddings than the discriminator"
        raise UsageError(f"{problem}; give two networks that share them")
    for network, tensors in loaded.items():
        (out / network).mkdir()
        save_file(tensors, out / network / "model.safetensors", {"format": "pt"})
        files.write_json(out / network / "config.json", configs[network])
    return configs


def _keys(discriminator: dict[str, Any], generator: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the profile's model for the config.json of both networks."""
    hidden, layers = discriminator["hidden_size"], discriminator["num_hidden_layers"]
    names = [name for name, size in SIZES.items() if size == (hidden, layers)]
    found: dict[str, Any] = {
        "model.size": names[0] if names else "small",
        "model.generator_hidden_size": generator["hidden_size"] / hidden,
        "model.generator_layers": generator["num_hidden_layers"] / layers,
        "model.generator_num_attention_heads": generator["num_attention_heads"],
        "model.generator_intermediate_size": generator["intermediate_size"],
    }
    for key in OF_WEIGHTS["model"]:
        found.setdefault(f"model.{key}", discriminator.get(key))
    return found


def _is_close(one: Any, other: Any) -> bool:
    """Whether two values are equal, or fractions that are equal to three digits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3)
    return bool(one == other)


def _refuse_other_vocabulary(source: str, expected: str | None, size: int) -> None:
    """Raise UsageError unless `tokenizer.source` is the vocabulary of the weights.

    `expected` is that vocabulary; if it is not known, only its size is compared with that of the
    weights. Words in place of [unusedN] are welcome.
    """
    if source in ("", "train"):
        problem = f"tokenizer.source = {source!r}, but the weights in model.init_from have"
        raise UsageError(f"{problem} a vocabulary already; name it")
    tokens = vocab.read(vocab.locate(source))
    others = vocab.read(vocab.locate(expected)) if expected else tokens
    changed = [n for n, pair in enumerate(zip(tokens, others, strict=False)) if len(set(pair)) > 1]
    for number in changed:
        if not re.fullmatch(r"\[unused\d+\]", others[number]):
            problem = f"token {number} of {source} is {tokens[number]!r}, but {others[number]!r}"
            raise UsageError(f"{problem} in model.init_from; use its vocabulary")
    if changed:
        log(f"new tokens in place of [unusedN]: {len(changed):,}")
    if len(tokens) != len(others):
        problem = f"{source} has {len(tokens):,} tokens, but the vocabulary in model.init_from has"
        raise UsageError(f"{problem} {len(others):,}; give that")
    vocab.refuse_other_size(source, tokens, size)
