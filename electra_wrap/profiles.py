"""Loading profiles: from configs/NAME.toml or a file, with `extends` and `--set`."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from electra_wrap import paths
from electra_wrap.errors import UsageError, mask
from electra_wrap.profile import Model, Profile

#: Keys whose relative paths start from the directory of the file that sets them.
_PATH_KEYS = ("corpus.source", "tokenizer.source", "model.init_from")

#: Keys that follow from the weights in model.init_from, if a profile that inherits them names it.
_OF_WEIGHTS = {
    "model": (
        *("size", "hidden_size", "num_hidden_layers", "embedding_size", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings", "generator_hidden_size"),
        *("generator_layers", "generator_num_attention_heads", "generator_intermediate_size"),
    ),
    "tokenizer": ("source", "sha256", "vocab_size", "sample_bytes", "lowercase", "strip_accents"),
}

#: Origin of those keys, until a later profile sets them.
_INHERITED = ""


def load(name: str, overrides: Sequence[str] = ()) -> Profile:
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
        if isinstance(model := values.get("model"), dict) and model.get("init_from"):
            _complete(values, origins)
        return Profile.model_validate(values)
    except RecursionError:
        raise UsageError(f"{path}: a key is nested too deeply; `show` lists the keys") from None
    except ValidationError as error:
        raise UsageError(_explain(error, origins, path)) from None


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
    if isinstance(new.get("model"), dict) and "init_from" in new["model"]:
        for section, names in _OF_WEIGHTS.items():
            for name in names:
                if origins.get(f"{section}.{name}", origin) != origin:
                    origins[f"{section}.{name}"] = _INHERITED
    if "source" in new:
        for key in ("sha256", "vocab_size", "sample_bytes"):
            if origins.get(f"{prefix}{key}") != origin:
                values.pop(key, None)
                origins.pop(f"{prefix}{key}", None)
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        is_section = isinstance(value, dict) and dotted not in _PATH_KEYS
        if is_section and isinstance(values.get(key, {}), dict):
            _merge(values.setdefault(key, {}), value, origins, origin, base, f"{dotted}.")
            continue
        # A profile that ships starts from a run, which is where `run` puts it.
        is_run = dotted == "model.init_from" and base == paths.CONFIGS
        start = Path.cwd() if is_run else base
        values[key] = _absolute(value, start) if dotted in _PATH_KEYS else value
        origins[dotted] = origin


def _complete(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Set the keys that follow from the weights in model.init_from.

    UsageError if the profile itself sets one of them to another value.
    """
    from electra_wrap import initial_weights

    tokenizer = values.setdefault("tokenizer", {})
    try:
        init_from = Model(init_from=values["model"]["init_from"]).init_from
    except ValidationError:
        return  # that of the whole profile reports it
    if init_from is None or not isinstance(tokenizer, dict):
        return
    own = {key for key, origin in origins.items() if origin != _INHERITED}
    values["model"]["init_from"], found, vocab_size = initial_weights.resolve(init_from)
    source = tokenizer.get("source")
    if source and ("tokenizer.source" in own or "tokenizer.source" not in found):
        vocabulary = found.pop("tokenizer.source", None)
        initial_weights.refuse_other_vocabulary(source, vocabulary, vocab_size)
    else:
        for key in ("sha256", "vocab_size", "sample_bytes"):  # of an inherited source
            tokenizer.pop(key, None)
    for dotted, value in found.items():
        section, _, key = dotted.partition(".")
        if dotted not in own:
            values[section][key] = value
        elif value is not None and not _is_close(values[section][key], value):
            message = f"{origins[dotted]}: {dotted} = {values[section][key]!r}, but the weights in"
            raise UsageError(f"{message} model.init_from have {value!r}; remove the key")


def _is_close(one: Any, other: Any) -> bool:
    """Whether two values are equal, or fractions that are equal to three digits."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3)
    return bool(one == other)


def _absolute(source: Any, base: Path) -> Any:
    if isinstance(source, list):
        return [_absolute(item, base) for item in source]
    if isinstance(source, dict):
        return {key: _absolute(item, base) for key, item in source.items()}
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
    shown = "" if value is None else mask(f" = {value!r}")  # before a part is cut off
    if len(shown) > 80:
        shown = f"{shown[:77]}…"
    message = " ".join(message.split())
    message = message[:1].lower() + message[1:]
    hint = "" if ";" in message else "; correct the value"
    return f"{origin}: {dotted}{shown}: {message}{hint}"


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
