"""A profile: everything about one model, written once.

`Profile.load` reads configs/NAME.toml (or a file), follows `extends`, applies `--set` and validates. From the
result come upstream's hparams (`hparams`) and transformers' config.json (`hf_config`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from electra_wrap import paths
from electra_wrap.errors import UsageError

Engine = Literal["native", "upstream"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

Network = Literal["discriminator", "generator"]
NETWORKS: tuple[Network, Network] = ("discriminator", "generator")

#: Hidden size and layers of upstream's model sizes (util/training_utils.py of the pin).
SIZES = {"small": (256, 12), "base": (768, 12), "large": (1024, 24)}

#: Rows of the position embeddings, whatever the training length (BertConfig's default in the pin).
MAX_POSITIONS = 512

#: What of a URL is a secret, unless it is the name of an environment variable: ${NAME}.
_SECRET = re.compile(
    r"://[^/@]*:(?!\$\{)[^/@]+@|https?://(?!\$\{)[^/:@]+@"
    r"|[?&]([^=&]*[-_])?(token|(api)?key|sig|signature|secret|pass|passw(or)?d|pwd|auth|credential)=(?!\$\{)[^&]",
    re.IGNORECASE,
)

#: Profiles' paths that are relative to the file that sets them.
_PATH_KEYS = ("corpus.source", "tokenizer.source")

Positive = Annotated[int, Field(gt=0, lt=2**40)]
Fraction = Annotated[float, Field(gt=0, le=1)]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def wrong(self) -> Iterator[tuple[str, str]]:
        """What is wrong beyond a single value: the key to blame, dotted, and the message with its mend."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, message in self.wrong():
            raise PydanticCustomError("wrong", "{message}", {"key": key, "message": message})
        return self


class Corpus(_Section):
    """Where the text comes from, and how it is divided."""

    source: str | list[str]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    max_lines: Positive | None = None
    bad_lines: Literal["repair", "skip", "stop"] = "repair"
    deduplicate: Literal["off", "lines", "documents"] = "off"
    similarity: Fraction = 1.0
    blank_lines_separate_documents: bool = True
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shards: Positive = 16

    def wrong(self) -> Iterator[tuple[str, str]]:
        if not self.sources or not all(self.sources):
            yield "source", "it names nothing; give files, globs, URLs or directories"
        if any(map(_SECRET.search, self.sources)):
            yield (
                "source",
                "a URL has a secret, which would be written down; set a variable, and put ${NAME} in its place",
            )
        if self.sha256 and len(self.sources) > 1:
            yield "sha256", "it is that of one file; name one in corpus.source"
        if self.deduplicate == "documents" and not self.blank_lines_separate_documents:
            yield "deduplicate", 'without blank lines there are no documents; set it to "lines"'
        if self.similarity < 1 and self.deduplicate == "off":
            yield "similarity", "it is for duplicates; set corpus.deduplicate too"

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else list(self.source)


class Tokenizer(_Section):
    """The WordPiece vocabulary and how text is normalised before it."""

    source: str
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    vocab_size: Positive | None = None
    sample_bytes: Positive | None = None
    lowercase: bool = False
    strip_accents: bool = False

    @property
    def rules(self) -> dict[str, bool]:
        """How text is normalised, as keywords."""
        return {"lowercase": self.lowercase, "strip_accents": self.strip_accents}

    def wrong(self) -> Iterator[tuple[str, str]]:
        if self.strip_accents and not self.lowercase:
            message = "upstream strips accents only from lowercased text; set tokenizer.lowercase = true too"
            yield "strip_accents", message
        if self.source == "train":
            if self.vocab_size is None:
                yield "vocab_size", 'source = "train" needs it; set it, for example 32000'
            if self.sha256:
                yield "sha256", "a vocabulary that is trained has no digest yet; remove it"
        else:
            for key in ("vocab_size", "sample_bytes"):
                if getattr(self, key) is not None:
                    yield key, 'it is for a vocabulary that is trained; remove it, or set source = "train"'


class Model(_Section):
    """The shape of both networks."""

    size: Literal["small", "base", "large"] = "small"
    max_seq_length: Annotated[int, Field(ge=8, le=MAX_POSITIONS)] = 128
    hidden_size: Positive | None = None
    num_hidden_layers: Positive | None = None
    embedding_size: Positive | None = None
    generator_hidden_size: Fraction = 0.25
    generator_layers: Fraction = 1.0
    mask_prob: Annotated[float, Field(gt=0, lt=1)] = 0.15

    def wrong(self) -> Iterator[tuple[str, str]]:
        if int((self.mask_prob + 0.005) * self.max_seq_length) < 1:  # max_predictions_per_seq of the pin
            yield "mask_prob", f"no token of {self.max_seq_length} would be masked; choose more"
        for network, key in zip(NETWORKS, ("hidden_size", "generator_hidden_size"), strict=True):
            shape = self.shape(network)
            size, heads = shape.hidden_size, shape.num_attention_heads
            if size == 0 or size % heads:
                message = f"the {network}'s hidden size {size} is not divisible by its {heads} attention heads"
                yield key, f"{message} (hidden size // 64); choose a multiple of 64"
            if shape.num_hidden_layers == 0:
                yield "generator_layers", f"the {network} has no layers; choose more"

    def shape(self, network: Network) -> Shape:
        """Sizes of one network, as run_pretraining.py and util/training_utils.py of the pin derive them."""
        hidden, layers = SIZES[self.size]
        hidden, layers = self.hidden_size or hidden, self.num_hidden_layers or layers
        embedding = self.embedding_size or (128 if self.size == "small" else hidden)
        if network == "generator":
            hidden, layers = round(hidden * self.generator_hidden_size), round(layers * self.generator_layers)
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


class Train(_Section):
    """Optimisation, checkpoints and the device."""

    steps: Positive
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0, lt=2**40)] = 10_000
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    save_every: Positive = 1000
    log_every: Positive = 100
    evaluate_every: Positive | None = None
    keep: Annotated[int, Field(ge=0, lt=2**40)] = 5
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    micro_batches: Positive = 1
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"

    def wrong(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps >= self.steps:
            message = f"the learning rate would never arrive in {self.steps} steps"
            yield "warmup_steps", f"{message}; choose fewer, about a tenth of train.steps"
        if self.batch_size % self.micro_batches:
            yield "micro_batches", f"they do not divide train.batch_size = {self.batch_size}; choose a divisor"


class Profile(_Section):
    """One model's whole description. See the modules' sections for the keys."""

    description: str
    language: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")]
    model_name: FileName
    engine: Engine = "upstream"
    corpus: Corpus
    tokenizer: Tokenizer
    model: Model = Field(default_factory=Model)
    train: Train

    def wrong(self) -> Iterator[tuple[str, str]]:
        if self.train.evaluate_every and not self.corpus.held_out:
            yield "train.evaluate_every", "no text is held out to evaluate on; set corpus.held_out, for example 0.005"
        for key, allowed in (("micro_batches", (1,)), ("precision", ("auto", "float32", "tf32"))):
            if self.engine == "upstream" and getattr(self.train, key) not in allowed:
                yield f"train.{key}", 'upstream\'s scripts have no such thing; set engine = "native", or remove it'

    @classmethod
    def load(cls, name: str, overrides: Sequence[str] = ()) -> Profile:
        """Read the profile `name` (of configs/, or a path to a TOML file) and apply KEY=VALUE `overrides`.

        Relative paths are taken from the directory of the file that sets them; those of `overrides` from the
        current directory. UsageError, naming file, key, value and mend, for anything that is not a profile.
        """
        try:
            values, origin = _read(find(name))
            for key, value in map(parse_override, overrides):
                nested = functools.reduce(lambda inner, part: {part: inner}, reversed(key.split(".")), value)
                _merge(values, nested, origin, "--set", Path.cwd())
            return cls.model_validate(values)
        except RecursionError:
            raise UsageError(f"{find(name)}: a key is nested too deeply; see `show` for the keys there are") from None
        except ValidationError as error:
            raise UsageError(_explain(error, origin, find(name))) from None

    def hparams(self, vocab_size: int) -> dict[str, Any]:
        """Upstream's hparams.json: the keys of configure_pretraining.py in the pin, with real JSON types."""
        shape = self.model.shape("discriminator")
        return {
            "model_size": self.model.size,
            "model_hparam_overrides": {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers},
            "embedding_size": shape.embedding_size,
            "vocab_size": vocab_size,
            "do_lower_case": self.tokenizer.lowercase,
            "generator_hidden_size": self.model.generator_hidden_size,
            "generator_layers": self.model.generator_layers,
            "mask_prob": self.model.mask_prob,
            "max_seq_length": self.model.max_seq_length,
            "num_train_steps": self.train.steps,
            "train_batch_size": self.train.batch_size,
            "eval_batch_size": self.train.batch_size,
            "learning_rate": self.train.learning_rate,
            "num_warmup_steps": self.train.warmup_steps,
            "weight_decay_rate": self.train.weight_decay,
            "save_checkpoints_steps": self.train.save_every,
            "keep_checkpoint_max": self.train.keep,
            "iterations_per_loop": self.train.log_every,
            "do_train": True,
            "do_eval": False,
            "use_tpu": False,
        }

    def hf_config(self, network: Network, vocab_size: int) -> dict[str, Any]:
        """transformers' config.json of one network."""
        return hf_config(network, self.model.shape(network), vocab_size)

    def flat(self) -> dict[str, Any]:
        """All keys, dotted, and their values."""
        return {
            f"{name}.{key}" if isinstance(value, dict) else name: inner
            for name, value in self.model_dump().items()
            for key, inner in (value.items() if isinstance(value, dict) else [(name, value)])
        }

    def parameters(self, network: Network, vocab_size: int) -> int:
        """About how many parameters a network has: its matrices, without biases (less than 1% of small)."""
        shape = self.model.shape(network)
        body = shape.num_hidden_layers * 12 * shape.hidden_size**2 + shape.embedding_size * shape.hidden_size
        return body + shape.embedding_size * (vocab_size + MAX_POSITIONS)

    def flops_per_step(self, vocab_size: int) -> float:
        """Floating-point operations of one training step of both networks, backward pass included.

        Two for each multiply-add and three passes' worth (one forward, two backward): 6 × weights × tokens for
        the matrices (Kaplan et al. 2020, section 2.1), 12 × layers × hidden × length for attention's two
        products, and the generator's softmax over the vocabulary at the masked positions.
        """
        tokens = self.train.batch_size * self.model.max_seq_length
        total = 0.0
        for network in NETWORKS:
            shape = self.model.shape(network)
            weights = shape.num_hidden_layers * 12 * shape.hidden_size**2 + shape.embedding_size * shape.hidden_size
            attention = 12 * shape.num_hidden_layers * shape.hidden_size * self.model.max_seq_length
            total += tokens * (6 * weights + attention)
        masked = self.train.batch_size * int((self.model.mask_prob + 0.005) * self.model.max_seq_length)
        return total + 6 * masked * self.model.shape("generator").embedding_size * vocab_size


def hf_config(network: Network, shape: Shape, vocab_size: int) -> dict[str, Any]:
    """transformers' config.json of a network of this shape, written by upstream's code (dropout, activation, …)."""
    architecture = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}[network]
    return {
        "architectures": [architecture],
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
    """The TOML of a profile's values; a key without a value is left out."""
    sections = {"": {key: value for key, value in values.items() if not isinstance(value, dict)}}
    sections |= {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = []
    for name, section in sections.items():
        given = {key: value for key, value in section.items() if value is not None}
        lines += ["", f"[{name}]"] if name else []
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return "\n".join(lines) + "\n"


def shipped() -> Iterator[tuple[str, str]]:
    """Yield name and description of each profile in configs/."""
    for path in sorted(paths.CONFIGS.glob("*.toml"), key=lambda path: path.stem):
        values, _ = _read(path)
        yield path.stem, str(values.get("description", ""))


def find(name: str) -> Path:
    """Return the file of a profile given by name or by path. UsageError, with the nearest name, if there is none."""
    if name.endswith(".toml") or "/" in name:
        path = _home(name)
        if not path.is_file():
            raise UsageError(f"no profile file {path}; give a TOML file or a name from `electra_wrap profiles`")
        return path.resolve()
    path = paths.CONFIGS / f"{name}.toml"
    known = [file.stem for file in sorted(paths.CONFIGS.glob("*.toml"))]
    if name not in known:
        raise UsageError(f"no profile {name!r}{_suggest(name, known)}; the profiles are {', '.join(known)}")
    return path


def parse_override(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE: a dotted key and a TOML value; a bare word is a string."""
    key, separator, raw = text.partition("=")
    key = key.strip()
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise UsageError(f"--set {text!r} is not KEY=VALUE; write for example --set train.steps=100")
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        parsed = {}
    if list(parsed) == ["value"]:
        return key, parsed["value"]
    if re.search(r"[\"'\[\]{}\n]", raw):
        raise UsageError(f"--set {text!r}: the value is neither TOML nor a bare word; quote it as TOML does")
    return key, raw.strip()


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a profile's values with those it inherits, and for each dotted key the file that set it."""
    if path in seen:
        raise UsageError(f"{path}: extends leads back to itself ({' → '.join(p.stem for p in (*seen, path))})")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML: {' '.join(str(error).split())}; correct the file") from None
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if (base := own.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UsageError(f"{path}: extends = {base!r} is not a name; name one profile")
        sibling = path.parent / f"{base}.toml"
        values, origin = _read(sibling if sibling.is_file() else find(base), (*seen, path))
    _merge(values, own, origin, str(path), path.parent)
    return values, origin


def _merge(
    values: dict[str, Any], new: dict[str, Any], origin: dict[str, str], where: str, base: Path, prefix: str = ""
) -> None:
    """Merge `new` into `values` key by key, resolving relative paths against `base`.

    A new source has none of what was said of the former one, but for what is said at the same place.
    """
    if "source" in new:
        for former in ("sha256", "vocab_size", "sample_bytes"):
            if origin.get(f"{prefix}{former}") != where:
                values.pop(former, None)
                origin.pop(f"{prefix}{former}", None)
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(values.get(key, {}), dict):
            _merge(values.setdefault(key, {}), value, origin, where, base, f"{dotted}.")
            continue
        values[key] = _absolute(value, base) if dotted in _PATH_KEYS else value
        origin[dotted] = where


def _absolute(source: Any, base: Path) -> Any:
    if isinstance(source, list):
        return [_absolute(one, base) for one in source]
    if not isinstance(source, str) or source in ("", "train") or "://" in source:
        return source
    return str(base / _home(source))


def _home(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own has an exception for a user that is not known


def _explain(error: ValidationError, origin: dict[str, str], path: Path) -> str:
    """The first of pydantic's findings as one line: file, key, value, what is wrong and the mend."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if not str(part).startswith(("str", "list[", "literal[", "bool"))]
    value, kind, message = first["input"], first["type"], first["msg"]
    if kind == "wrong":
        for part in first["ctx"]["key"].split("."):
            location, value = [*location, part], value.get(part)
    dotted = ".".join(location)
    # A section has no origin of its own: its first key's.
    where = origin.get(dotted) or next((origin[k] for k in origin if k.startswith(f"{dotted}.")), str(path))
    if kind == "missing":
        return f"{where}: {dotted} is missing; set it"
    if kind == "extra_forbidden":
        model: Any = Profile
        for part in location[:-1]:
            model = model.model_fields[part].annotation
        return f"{where}: unknown key {dotted}{_suggest(location[-1], list(model.model_fields))}; remove or rename it"
    shown = "" if value is None or _SECRET.search(str(value)) else f" = {value!r}"
    if len(shown) > 80:
        shown = f"{shown[:77]}…"
    message = " ".join(message.split())
    return f"{where}: {dotted}{shown}: {message[:1].lower()}{message[1:]}" + (
        "" if ";" in message else "; correct the value"
    )


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
