"""The weights in `model.init_from`, from which a training starts.

They are those of a run, of two models of transformers, or of a TensorFlow checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from electra_wrap import files, hub, subprocesses, weights
from electra_wrap.data import vocab
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES, find_checkpoint
from electra_wrap.errors import UsageError
from electra_wrap.profile import (
    NETWORKS,
    SIZES,
    Network,
    Shape,
    TwoModels,
    hf_config,
    read_hf_config,
    select_sizes,
)
from electra_wrap.progress import log
from electra_wrap.run import MANIFEST, Run

Configs = dict[Network, dict[str, Any]]

#: Name of the directory in the run directory with the verified weights, until training takes them.
DIRECTORY = "initial"

#: Keys of config.json of which both engines support one value.
_CONSTANTS = ("hidden_act", "layer_norm_eps", "type_vocab_size")


class Source(Protocol):
    """Where weights come from. Functions raise UsageError or EnvironmentProblem."""

    def configs(self) -> Configs:
        """Return the config.json of each network, without reading weights."""

    def tokenizer(self) -> dict[str, Any]:
        """Return the keys of the profile's tokenizer; empty if there is no vocabulary."""

    def files(self) -> list[Path]:
        """Return the files with the weights, if they are on this machine already."""

    def export(self, out: Path, *, optimizer: bool) -> dict[Network, Path]:
        """Return the directory of each network as a model of transformers, new ones in `out`.

        With `optimizer`, Adam's slots are beside each model.
        """


@dataclasses.dataclass(frozen=True)
class RunSource:
    """The latest checkpoint of a run."""

    directory: Path

    def configs(self) -> Configs:
        run = self._open()[0]
        return {network: run.profile.hf_config(network, run.vocab_size) for network in NETWORKS}

    def tokenizer(self) -> dict[str, Any]:
        run = self._open()[0]
        return {"source": str(run.vocabulary), **run.profile.tokenizer.normalization}

    def files(self) -> list[Path]:
        _, checkpoint = self._open()
        return ENGINES[checkpoint.engine].weight_files(checkpoint)

    def export(self, out: Path, *, optimizer: bool) -> dict[Network, Path]:
        run, checkpoint = self._open()
        ENGINES[checkpoint.engine].export(run, checkpoint, out, optimizer=optimizer)
        return {network: out / network for network in NETWORKS}

    def _open(self) -> tuple[Run, Checkpoint]:
        run = Run.open(self.directory)
        checkpoint = find_checkpoint(run)
        if checkpoint is None:
            raise UsageError(f"{self.directory} has no checkpoint; `run` trains the model")
        return run, checkpoint


@dataclasses.dataclass(frozen=True)
class ModelsSource:
    """Two models of transformers: directories, or hf://NAME[@REVISION]."""

    sources: TwoModels

    def configs(self) -> Configs:
        return {network: self._config(network) for network in NETWORKS}

    def tokenizer(self) -> dict[str, Any]:
        paths = (self._find("discriminator", name) for name in ("vocab.txt", "tokenizer.json"))
        vocabulary = next(filter(None, paths), None)
        if vocabulary is None:
            return {}
        config = self._read_json("discriminator", "tokenizer_config.json")
        lowercase = bool(config.get("do_lower_case", True))  # the default of transformers
        accents = config.get("strip_accents")
        strip_accents = lowercase if accents is None else bool(accents)
        is_remote = self.sources.discriminator.startswith(hub.SCHEME)
        source = self.sources.discriminator if is_remote else str(vocabulary)
        return {"source": source, "lowercase": lowercase, "strip_accents": strip_accents}

    def files(self) -> list[Path]:
        sources = (self.sources.discriminator, self.sources.generator)
        return [Path(s, "model.safetensors") for s in sources if not s.startswith(hub.SCHEME)]

    def export(self, out: Path, *, optimizer: bool) -> dict[Network, Path]:
        if optimizer:
            raise UsageError("model.init_optimizer needs a run as model.init_from; remove it")
        directories: dict[Network, Path] = {}
        for network in NETWORKS:
            weights = self._find(network, "model.safetensors")
            if weights is None:
                problem = f"{getattr(self.sources, network)} has no model.safetensors"
                raise UsageError(f"{problem}; save the model in that format")
            directories[network] = weights.parent
            read_hf_config(weights.parent)  # the file has room for so many parameters
        return directories

    def pinned(self) -> TwoModels:
        """Return the sources, with the commits of those on a hub."""
        pinned = {}
        for network in NETWORKS:
            pinned[network] = source = str(getattr(self.sources, network))
            if source.startswith(hub.SCHEME) and (path := self._find(network, "config.json")):
                pinned[network] = f"{source.partition('@')[0]}@{path.parent.name}"
        return TwoModels(**pinned)

    def _config(self, network: Network) -> dict[str, Any]:
        source = getattr(self.sources, network)
        raw = self._read_json(network, "config.json")
        expected = hf_config(network, Shape(1, 1, 1, 1, 1), vocab_size=1)
        if raw.get("architectures") != expected["architectures"]:
            problem = f"{source} is {raw.get('architectures')}, not {expected['architectures']}"
            raise UsageError(f"{problem}; name both networks of one pre-trained ELECTRA")
        try:
            config = select_sizes({**expected, **raw})
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{source}: config.json is damaged ({error}); replace it") from None
        for key in _CONSTANTS:
            if config[key] != expected[key]:
                problem = f"{source}: {key} is {config[key]!r}, not {expected[key]!r}"
                raise UsageError(f"{problem}; such a model cannot be continued")
        return config

    def _read_json(self, network: Network, name: str) -> dict[str, Any]:
        path = self._find(network, name)
        try:
            value = json.loads(files.read_text(path)) if path else {}
        except (OSError, ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UsageError(f"{path} is damaged; replace it")
        return value

    def _find(self, network: Network, name: str) -> Path | None:
        source = str(getattr(self.sources, network))
        if source.startswith(hub.SCHEME):
            return hub.download(source, name)
        if not Path(source).is_dir():
            raise UsageError(f"model.init_from: no such {network}: {source}; correct it")
        path = Path(source, name)
        return path if path.is_file() else None


@dataclasses.dataclass(frozen=True)
class TensorFlowSource:
    """A TensorFlow checkpoint of google-research/electra: its prefix."""

    prefix: str

    def configs(self) -> Configs:
        arguments = {"checkpoint": self.prefix, "out": None}
        configs: Configs = subprocesses.call("electra_wrap.weights", "to_transformers", arguments)
        for config in configs.values():
            config["num_attention_heads"] = None  # a checkpoint does not tell
        return configs

    def tokenizer(self) -> dict[str, Any]:
        return {}

    def files(self) -> list[Path]:
        prefix = Path(self.prefix)
        return sorted(prefix.parent.glob(f"{prefix.name}.*"))

    def export(self, out: Path, *, optimizer: bool) -> dict[Network, Path]:
        arguments = {"checkpoint": self.prefix, "out": str(out), "slots": optimizer}
        subprocesses.call("electra_wrap.weights", "to_transformers", arguments)
        return {network: out / network for network in NETWORKS}


def find(init_from: str | TwoModels) -> Source:
    """Return the source that `model.init_from` names. UsageError if there is none."""
    if isinstance(init_from, TwoModels):
        return ModelsSource(init_from)
    path = Path(init_from)
    if (path / MANIFEST).is_file():
        return RunSource(path)
    if (path / "discriminator").is_dir() and (path / "generator").is_dir():
        return ModelsSource(TwoModels(**{network: str(path / network) for network in NETWORKS}))
    if init_from.startswith(hub.SCHEME) or (path / "config.json").is_file():
        both = 'init_from = {discriminator = "…", generator = "…"}'
        raise UsageError(f"{init_from} is one model, and a training needs two; set {both}")
    if not path.exists() and not Path(f"{init_from}.index").exists():
        kinds = "a run, its hf/, a TensorFlow checkpoint or two models of transformers"
        raise UsageError(f"model.init_from = {init_from!r} is not there; give {kinds}")
    return TensorFlowSource(weights.find_prefix(init_from))


def resolve(init_from: str | TwoModels) -> tuple[Any, dict[str, Any], int]:
    """Return `model.init_from` with the commits of models on a hub, and what follows from it.

    That is the value of each dotted key of the profile, and the size of the vocabulary.
    """
    if isinstance(init_from, TwoModels):
        init_from = ModelsSource(init_from).pinned()
    source = find(init_from)
    configs = source.configs()
    discriminator, generator = (configs[network] for network in NETWORKS)
    for key in ("vocab_size", "embedding_size", "max_position_embeddings"):
        if discriminator[key] != generator[key]:
            sizes = f"{key} is {discriminator[key]:,} for the discriminator"
            sizes += f", {generator[key]:,} for the generator"
            raise UsageError(f"model.init_from: {sizes}; name both networks of one ELECTRA")
    hidden, layers = discriminator["hidden_size"], discriminator["num_hidden_layers"]
    names = [name for name, size in SIZES.items() if size == (hidden, layers)]
    keys = {
        "size": names[0] if names else "small",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "embedding_size": discriminator["embedding_size"],
        "num_attention_heads": discriminator["num_attention_heads"],
        "intermediate_size": discriminator["intermediate_size"],
        "max_position_embeddings": discriminator["max_position_embeddings"],
        "generator_hidden_size": generator["hidden_size"] / hidden,
        "generator_layers": generator["num_hidden_layers"] / layers,
        "generator_num_attention_heads": generator["num_attention_heads"],
        "generator_intermediate_size": generator["intermediate_size"],
    }
    found = {f"model.{key}": value for key, value in keys.items()}
    found |= {f"tokenizer.{key}": value for key, value in source.tokenizer().items()}
    value = init_from if isinstance(init_from, str) else init_from.model_dump()
    return value, found, discriminator["vocab_size"]


def refuse_other_vocabulary(source: str, expected: str | None, size: int) -> None:
    """Raise UsageError unless `tokenizer.source` is the vocabulary of the weights.

    `expected` is that vocabulary; if it is not known, only its size is compared.
    """
    if source == "train":
        problem = 'tokenizer.source = "train", but the weights in model.init_from have a vocabulary'
        raise UsageError(f"{problem} already; name it, or remove the key")
    tokens = vocab.read(vocab.locate(source))
    others = vocab.read(vocab.locate(expected)) if expected else []
    for number, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            problem = f"token {number} of {source} is {token!r}"
            raise UsageError(f"{problem}, but {other!r} in model.init_from; use its vocabulary")
    if len(tokens) != size:
        problem = f"{source} has {len(tokens):,} tokens, but the weights in model.init_from"
        raise UsageError(f"{problem} have {size:,}; give the vocabulary they were trained with")


def identity(run: Run, digest: Callable[[Path], str]) -> dict[str, Any]:
    """Return what tells other weights from these, as inputs of the training."""
    init_from = run.profile.model.init_from
    if init_from is None:
        return {}
    names = init_from.model_dump().values() if isinstance(init_from, TwoModels) else ()
    lines = [name for name in names if name.startswith(hub.SCHEME)]  # with its commit
    lines += [f"{digest(file)}  {file.name}" for file in find(init_from).files()]
    weights = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"model.init_from": weights, "model.init_optimizer": run.profile.model.init_optimizer}


def prepare(run: Run) -> None:
    """Verify the weights, and write them to DIRECTORY for an engine's `import_checkpoint`.

    UsageError unless they are the complete and finite weights of one ELECTRA.
    """
    settings = run.profile.model
    if settings.init_from is None:
        return
    log("train: reads the weights in model.init_from")
    with files.new_directory(run.directory / DIRECTORY, replace=True) as out:
        exported = out / "exported"
        source = find(settings.init_from)
        models = source.export(exported, optimizer=settings.init_optimizer)
        size = read_hf_config(models["discriminator"])["vocab_size"]
        configs = {network: run.profile.hf_config(network, size) for network in NETWORKS}
        arguments = {
            "models": {network: str(directory) for network, directory in models.items()},
            "configs": configs,
            "out": str(out),
            "optimizer": settings.init_optimizer,
        }
        subprocesses.call("electra_wrap.native.exchange", "collect", arguments)
        for network, config in configs.items():
            files.write_json(out / network / "config.json", config)
        files.remove(exported)
