"""A profile: everything about one model, written once.

profiles.py loads it from files. Upstream's hparams.json (upstream/hparams.py) and transformers'
config.json follow from it.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from electra_wrap.architecture import NETWORKS, POSITIONS, SIZES, Network, Shape, hf_config

EngineName = Literal["native", "upstream"]
#: Keys that follow from the weights in model.init_from, by section.
OF_WEIGHTS = {
    "model": (
        *("size", "hidden_size", "num_hidden_layers", "embedding_size", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings", "generator_hidden_size"),
        *("generator_layers", "generator_num_attention_heads", "generator_intermediate_size"),
    ),
    "tokenizer": ("source", "sha256", "vocab_size", "sample_bytes", "lowercase", "strip_accents"),
}

Positive = Annotated[int, Field(gt=0, lt=2**40)]
Size = Annotated[int, Field(gt=0, le=2**16)]
VocabSize = Annotated[int, Field(gt=0, le=2**24)]
NotNegative = Annotated[int, Field(ge=0, lt=2**40)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield contradictions between keys: the dotted key to blame, and the message."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, message in self.problems():
            raise PydanticCustomError("problem", "{message}", {"key": key, "message": message})
        return self


class Corpus(_Section):
    """Where the text comes from, and how it is divided into shards."""

    source: str | list[str]
    sha256: Digest | None = None
    max_lines: Positive | None = None
    bad_lines: Literal["repair", "skip", "stop"] = "repair"
    deduplicate: Literal["off", "lines", "documents"] = "off"
    blank_lines_separate_documents: bool = True
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shards: Annotated[int, Field(gt=0, le=1000)] = 16

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.sources or not all(self.sources):
            yield "source", "it names nothing; give files, globs, URLs or directories"
        if self.sha256 and len(self.sources) > 1:
            yield "sha256", "it is the digest of one file; name one file in corpus.source"
        if self.deduplicate == "documents" and not self.blank_lines_separate_documents:
            yield "deduplicate", 'without blank lines there are no documents; set it to "lines"'

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source)


class Tokenizer(_Section):
    """The WordPiece vocabulary, and how text is normalized before it is tokenized.

    `source` is empty if the vocabulary is that of the weights in model.init_from.
    """

    source: str = ""
    sha256: Digest | None = None
    vocab_size: VocabSize | None = None
    sample_bytes: Positive | None = None
    lowercase: bool = False
    strip_accents: bool = False

    @property
    def normalization(self) -> dict[str, bool]:
        """The normalization as keyword arguments."""
        return {"lowercase": self.lowercase, "strip_accents": self.strip_accents}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.strip_accents and not self.lowercase:
            yield "strip_accents", "it needs lowercased text; set tokenizer.lowercase = true"
        if self.source == "train":
            if self.vocab_size is None:
                yield "vocab_size", 'source = "train" needs it; set it, for example 32000'
            if self.sha256:
                yield "sha256", "a vocabulary that is trained has no digest yet; remove it"
        else:
            for key in ("vocab_size", "sample_bytes"):
                if getattr(self, key) is not None:
                    yield key, 'it needs a trained vocabulary; remove it, or set source = "train"'


class TwoModels(_Section):
    """Models of transformers: directories, or hf://OWNER/NAME[@REVISION]."""

    discriminator: str
    generator: str


class Model(_Section):
    """The sizes of both networks, and the weights that a training starts from."""

    init_from: str | TwoModels | None = None
    size: Literal["small", "base", "large"] = "small"
    max_seq_length: Annotated[int, Field(ge=8, le=4096)] = 128
    max_position_embeddings: Annotated[int, Field(ge=8, le=4096)] = POSITIONS
    hidden_size: Size | None = None
    num_hidden_layers: Size | None = None
    embedding_size: Size | None = None
    num_attention_heads: Size | None = None
    intermediate_size: Size | None = None
    generator_hidden_size: Fraction = 0.25
    generator_layers: Fraction = 1.0
    generator_num_attention_heads: Size | None = None
    generator_intermediate_size: Size | None = None
    mask_prob: Annotated[float, Field(gt=0, lt=1)] = 0.15

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.init_from and set(OF_WEIGHTS["model"]) - self.model_fields_set:
            return  # the sizes are not known yet
        if self.max_seq_length > self.max_position_embeddings:
            positions = f"model.max_position_embeddings = {self.max_position_embeddings}"
            yield "max_seq_length", f"it is larger than {positions}; change one of them"
        if self.max_predictions_per_seq < 1:
            yield "mask_prob", f"it masks no token of {self.max_seq_length}; choose a larger one"
        for network, key in zip(NETWORKS, ("hidden_size", "generator_hidden_size"), strict=True):
            shape = self.shape(network)
            size, heads = shape.hidden_size, shape.num_attention_heads
            if size == 0 or size % heads:
                problem = f"the {network}'s hidden size {size} does not fit {heads} attention heads"
                yield key, f"{problem}; choose a multiple of 64"
            if shape.num_hidden_layers == 0:
                yield "generator_layers", f"the {network} has no layers; choose a larger one"

    @property
    def max_predictions_per_seq(self) -> int:
        """Most masked tokens in an example, as configure_pretraining.py of the pin computes it."""
        return int((self.mask_prob + 0.005) * self.max_seq_length)

    def shape(self, network: Network) -> Shape:
        """Return a network's sizes, as run_pretraining.py and util/training_utils.py of the pin."""
        hidden, layers = SIZES[self.size]
        hidden, layers = self.hidden_size or hidden, self.num_hidden_layers or layers
        embedding = self.embedding_size or (128 if self.size == "small" else hidden)
        heads, intermediate = self.num_attention_heads, self.intermediate_size
        if network == "generator":
            hidden = round(hidden * self.generator_hidden_size)
            layers = round(layers * self.generator_layers)
            heads = self.generator_num_attention_heads
            intermediate = self.generator_intermediate_size
        return Shape(
            embedding_size=embedding,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads or max(1, hidden // 64),
            intermediate_size=intermediate or 4 * hidden,
        )


class Train(_Section):
    """Optimization, checkpoints and the device."""

    steps: Positive
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_steps: NotNegative = 10_000
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    save_every: Positive = 1000
    log_every: Positive = 100
    evaluate_every: Positive | None = None
    keep: NotNegative = 5
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    micro_batches: Positive = 1
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps >= self.steps:
            yield "warmup_steps", f"it does not end in {self.steps} steps; choose about a tenth"
        if self.batch_size % self.micro_batches:
            yield "micro_batches", f"it does not divide train.batch_size = {self.batch_size}"


class Profile(_Section):
    """Everything about one model."""

    description: str
    language: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")]
    model_name: FileName
    engine: EngineName = "upstream"
    corpus: Corpus
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    model: Model = Field(default_factory=Model)
    train: Train

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.tokenizer.source and not self.model.init_from:
            yield "tokenizer.source", 'it is missing; give a file, hf://NAME or "train"'
        if self.train.evaluate_every and not self.corpus.held_out:
            yield "train.evaluate_every", "no text is held out; set corpus.held_out, e.g. 0.005"
        if self.engine == "upstream":
            shape, train = self.model.shape("generator"), self.train
            size, heads = shape.hidden_size, shape.num_attention_heads
            unsupported = {
                "model.generator_num_attention_heads": heads != max(1, size // 64),
                "model.generator_intermediate_size": shape.intermediate_size != 4 * size,
                "train.micro_batches": train.micro_batches != 1,
                "train.precision": train.precision == "bfloat16",
                "train.compile": train.compile is True,
            }
            for key in (key for key, is_set in unsupported.items() if is_set):
                yield key, 'upstream does not support it; set engine = "native"'

    def hf_config(self, network: Network, vocab_size: int) -> dict[str, Any]:
        """Return transformers' config.json of one network."""
        shape, positions = self.model.shape(network), self.model.max_position_embeddings
        return hf_config(network, shape, vocab_size, positions)

    def explicit(self) -> dict[str, Any]:
        """Return the keys of `OF_WEIGHTS` that the profile sets, by dotted name."""
        return {
            f"{section}.{key}": getattr(getattr(self, section), key)
            for section, keys in OF_WEIGHTS.items()
            for key in keys
            if key in getattr(self, section).model_fields_set
        }

    def known_values(self) -> dict[str, Any]:
        """Return all values but those that follow from weights which were not read yet."""
        values = self.model_dump()
        if self.model.init_from:
            for section, keys in OF_WEIGHTS.items():
                for key in set(keys) - getattr(self, section).model_fields_set:
                    del values[section][key]
        return values

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return the profile with other values of keys, by dotted name."""
        dumped = self.model_dump()
        for dotted, value in values.items():
            section, _, key = dotted.partition(".")
            dumped[section][key] = value
        return self.model_validate(dumped)

    def parameters(self, network: Network, vocab_size: int) -> int:
        """Return about how many parameters a network has; biases, under 1%, are left out."""
        shape = self.model.shape(network)
        rows = vocab_size + self.model.max_position_embeddings
        return shape.matrix_parameters + shape.embedding_size * rows


def toml(values: Mapping[str, Any]) -> str:
    """Format a profile's values as TOML. Keys without a value are left out."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
