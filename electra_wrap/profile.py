"""A profile: everything about one model, written once.

`Profile.load` reads configs/NAME.toml or a file, follows `extends`, applies `--set` and validates.
Upstream's hparams.json (upstream/hparams.py) and transformers' config.json follow from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from electra_wrap import paths
from electra_wrap.errors import UsageError

EngineName = Literal["native", "upstream"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

Network = Literal["discriminator", "generator"]
NETWORKS: tuple[Network, Network] = ("discriminator", "generator")

#: Hidden size and layers of upstream's model sizes (util/training_utils.py of the pin).
SIZES = {"small": (256, 12), "base": (768, 12), "large": (1024, 24)}

#: Rows of the position embeddings, whatever the training length (BertConfig's default in the pin).
MAX_POSITIONS = 512

#: Files that a run keeps open at once, one for each shard, are limited by the system.
MAX_SHARDS = 1000

#: A secret in a URL: a password, a user name alone, or a query parameter that is named like one.
#: An environment variable in its place, ${NAME}, is not a secret.
_SECRET = re.compile(
    r"://[^/@]*:(?!\$\{)[^/@]+@|https?://(?!\$\{)[^/:@]+@"
    r"|[?&]([^=&]*[-_])?(token|(api)?key|sig|signature|secret|pass|passw(or)?d|pwd|auth|credential)"
    r"=(?!\$\{)[^&]",
    re.IGNORECASE,
)

#: Keys whose relative paths start from the directory of the file that sets them.
_PATH_KEYS = ("corpus.source", "tokenizer.source")

Positive = Annotated[int, Field(gt=0, lt=2**40)]
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
    shards: Annotated[int, Field(gt=0, le=MAX_SHARDS)] = 16

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.sources or not all(self.sources):
            yield "source", "it names nothing; give files, globs, URLs or directories"
        if any(map(_SECRET.search, self.sources)):
            yield "source", "a URL contains a secret; write an environment variable: ${NAME}"
        if self.sha256 and len(self.sources) > 1:
            yield "sha256", "it is the digest of one file; name one file in corpus.source"
        if self.deduplicate == "documents" and not self.blank_lines_separate_documents:
            yield "deduplicate", 'without blank lines there are no documents; set it to "lines"'

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source)


class Tokenizer(_Section):
    """The WordPiece vocabulary, and how text is normalized before it is tokenized."""

    source: str
    sha256: Digest | None = None
    vocab_size: Positive | None = None
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


class Model(_Section):
    """The sizes of both networks."""

    size: Literal["small", "base", "large"] = "small"
    max_seq_length: Annotated[int, Field(ge=8, le=MAX_POSITIONS)] = 128
    hidden_size: Positive | None = None
    num_hidden_layers: Positive | None = None
    embedding_size: Positive | None = None
    generator_hidden_size: Fraction = 0.25
    generator_layers: Fraction = 1.0
    mask_prob: Annotated[float, Field(gt=0, lt=1)] = 0.15

    def problems(self) -> Iterator[tuple[str, str]]:
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
        if network == "generator":
            hidden = round(hidden * self.generator_hidden_size)
            layers = round(layers * self.generator_layers)
        return Shape(
            embedding_size=embedding,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=4 * hidden,
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one network under transformers' names."""

    embedding_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int

    @property
    def matrix_parameters(self) -> int:
        """Weights of the layers' matrices and of the embedding projection, without biases."""
        layer = 12 * self.hidden_size**2  # four of attention, and two of 4 x hidden size
        return self.num_hidden_layers * layer + self.embedding_size * self.hidden_size


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
    tokenizer: Tokenizer
    model: Model = Field(default_factory=Model)
    train: Train

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.train.evaluate_every and not self.corpus.held_out:
            yield "train.evaluate_every", "no text is held out; set corpus.held_out, e.g. 0.005"
        if self.engine == "upstream":
            unsupported = {
                "micro_batches": self.train.micro_batches != 1,
                "precision": self.train.precision == "bfloat16",
                "compile": self.train.compile is True,
            }
            for key in (key for key, is_set in unsupported.items() if is_set):
                yield f"train.{key}", 'upstream does not support it; set engine = "native"'

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> Profile:
        """Read the profile `name` (in configs/, or a TOML file) and apply KEY=VALUE `overrides`.

        Relative paths start from the directory of the file that sets them; those of `overrides`
        from the current directory. UsageError, with the file, the key and the value, if the result
        is not a valid profile.
        """
        path = find(name)
        try:
            values, origins = _read(path)
            for key, value in map(parse_override, overrides):
                parts = reversed(key.split("."))
                nested = functools.reduce(lambda inner, part: {part: inner}, parts, value)
                _merge(values, nested, origins, "--set", Path.cwd())
            return cls.model_validate(values)
        except RecursionError:
            raise UsageError(f"{path}: a key is nested too deeply; `show` lists the keys") from None
        except ValidationError as error:
            raise UsageError(_explain(error, origins, path)) from None

    def hf_config(self, network: Network, vocab_size: int) -> dict[str, Any]:
        """Return transformers' config.json of one network."""
        return hf_config(network, self.model.shape(network), vocab_size)

    def flat(self) -> dict[str, Any]:
        """Return all values by dotted key."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump().items():
            if isinstance(value, dict):
                flat |= {f"{name}.{key}": inner for key, inner in value.items()}
            else:
                flat[name] = value
        return flat

    def parameters(self, network: Network, vocab_size: int) -> int:
        """Return about how many parameters a network has; biases, under 1%, are left out."""
        shape = self.model.shape(network)
        return shape.matrix_parameters + shape.embedding_size * (vocab_size + MAX_POSITIONS)


def hf_config(network: Network, shape: Shape, vocab_size: int) -> dict[str, Any]:
    """Return transformers' config.json of a network of this shape.

    Dropout, activation and the other constants are those of upstream's BertConfig.
    """
    architecture = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}
    return {
        "architectures": [architecture[network]],
        "model_type": "electra",
        "vocab_size": vocab_size,
        **dataclasses.asdict(shape),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": MAX_POSITIONS,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def toml(values: Mapping[str, Any]) -> str:
    """Format a profile's values as TOML. Keys without a value are left out."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def shipped() -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each profile in configs/."""
    for path in sorted(paths.CONFIGS.glob("*.toml"), key=lambda path: path.stem):
        values, _ = _read(path)
        yield path.stem, str(values.get("description", ""))


def find(name: str) -> Path:
    """Return the file of a profile, which is given by name or as a path.

    UsageError, with the most similar name, if it does not exist.
    """
    if name.endswith(".toml") or "/" in name:
        path = _expand_user(name)
        if not path.is_file():
            raise UsageError(
                f"no profile file {path}; give a TOML file, or a name that `profiles` lists"
            )
        return path.resolve()
    path = paths.CONFIGS / f"{name}.toml"
    known = [file.stem for file in sorted(paths.CONFIGS.glob("*.toml"))]
    if name not in known:
        names = ", ".join(known)
        raise UsageError(f"no profile {name!r}{_suggestion(name, known)}; the profiles are {names}")
    return path


def parse_override(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE into a dotted key and a TOML value. A bare word is a string."""
    key, separator, raw = text.partition("=")
    key = key.strip()
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise UsageError(
            f"--set {text!r} is not KEY=VALUE; write for example --set train.steps=100"
        )
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        parsed = {}
    if list(parsed) == ["value"]:
        return key, parsed["value"]
    if re.search(r"[\"'\[\]{}\n]", raw):
        raise UsageError(
            f"--set {text!r}: the value is neither TOML nor a bare word; quote it as in TOML"
        )
    return key, raw.strip()


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a profile's values, inherited ones included, and which file set each dotted key."""
    if path in seen:
        cycle = " → ".join(p.stem for p in (*seen, path))
        raise UsageError(f"{path}: extends leads back to itself ({cycle}); remove one of them")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not valid TOML: {reason}; correct the file") from None
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if (base := own.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UsageError(f"{path}: extends = {base!r} is not a name; name one profile")
        sibling = path.parent / f"{base.removesuffix('.toml')}.toml"
        values, origins = _read(sibling if sibling.is_file() else find(base), (*seen, path))
    _merge(values, own, origins, str(path), path.parent)
    return values, origins


def _merge(
    values: dict[str, Any],
    new: dict[str, Any],
    origins: dict[str, str],
    origin: str,
    base: Path,
    prefix: str = "",
) -> None:
    """Merge `new` into `values` key by key. Relative paths start from `base`.

    A new source drops what an inherited profile set for the former one, such as its digest.
    """
    if "source" in new:
        for key in ("sha256", "vocab_size", "sample_bytes"):
            if origins.get(f"{prefix}{key}") != origin:
                values.pop(key, None)
                origins.pop(f"{prefix}{key}", None)
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(values.get(key, {}), dict):
            _merge(values.setdefault(key, {}), value, origins, origin, base, f"{dotted}.")
            continue
        values[key] = _absolute(value, base) if dotted in _PATH_KEYS else value
        origins[dotted] = origin


def _absolute(source: Any, base: Path) -> Any:
    if isinstance(source, list):
        return [_absolute(item, base) for item in source]
    if not isinstance(source, str) or source in ("", "train") or "://" in source:
        return source
    return str(base / _expand_user(source))


def _expand_user(path: str) -> Path:
    # Path.expanduser raises an exception for an unknown user.
    return Path(os.path.expanduser(path))  # noqa: PTH111


def _explain(error: ValidationError, origins: dict[str, str], path: Path) -> str:
    """Return the first of pydantic's errors as one line: file, key, value, what is wrong."""
    first = error.errors()[0]
    branches = ("str", "list[", "literal[", "bool")  # of a union, which pydantic adds to the key
    location = [str(part) for part in first["loc"] if not str(part).startswith(branches)]
    value, kind, message = first["input"], first["type"], first["msg"]
    if kind == "problem":
        for part in first["ctx"]["key"].split("."):
            location.append(part)
            value = value.get(part)
    dotted = ".".join(location)
    # A section is not in `origins`, but its keys are.
    inside = (origins[key] for key in origins if key.startswith(f"{dotted}."))
    origin = origins.get(dotted) or next(inside, str(path))
    if kind == "missing":
        return f"{origin}: {dotted} is missing; set it"
    if kind == "extra_forbidden":
        model: Any = Profile
        for part in location[:-1]:
            model = model.model_fields[part].annotation
        suggestion = _suggestion(location[-1], list(model.model_fields))
        return f"{origin}: unknown key {dotted}{suggestion}; remove or rename it"
    shown = "" if value is None or _SECRET.search(str(value)) else f" = {value!r}"
    if len(shown) > 80:
        shown = f"{shown[:77]}…"
    message = " ".join(message.split())
    message = message[:1].lower() + message[1:]
    hint = "" if ";" in message else "; correct the value"
    return f"{origin}: {dotted}{shown}: {message}{hint}"


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
