"""Loading profiles: from configs/NAME.toml or a file, with `extends` and `--set`."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from electra_wrap import paths
from electra_wrap.errors import UsageError
from electra_wrap.profile import OF_WEIGHTS, Profile

#: Keys whose relative paths start from the directory of the file that sets them.
_PATH_KEYS = ("corpus.source", "tokenizer.source", "model.init_from")


def load(name: str, overrides: Sequence[str] = ()) -> Profile:
    """Read the profile `name` (in configs/, or a TOML file) and apply KEY=VALUE `overrides`.

    Relative paths start from the directory of the file that sets them; those of `overrides`
    from the current directory. UsageError, with the key and the value, if the result is not a
    valid profile.
    """
    path = find(name)
    changes: dict[str, Any] = {}
    for override in overrides:
        key, value = _parse_override(override)
        *sections, last = key.split(".")
        section = changes
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UsageError(f"--set {override!r}: {part} is a value, not a section")
        section[last] = value
    values = _read(path)
    _merge(values, changes, Path.cwd())
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error)}") from None


def shipped() -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each profile in configs/."""
    for path in sorted(paths.CONFIGS.glob("*.toml"), key=lambda path: path.stem):
        yield path.stem, str(_read(path).get("description", ""))


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
    known = [file.stem for file in sorted(paths.CONFIGS.glob("*.toml"))]
    if name not in known:
        names = ", ".join(known)
        raise UsageError(f"no profile {name!r}{_suggestion(name, known)}; the profiles are {names}")
    return paths.CONFIGS / f"{name}.toml"


def _parse_override(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE into a dotted key and a TOML value. What is no TOML is a string."""
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
    return key, parsed["value"] if list(parsed) == ["value"] else raw.strip()


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a profile's values, inherited ones included."""
    if path in seen:
        cycle = " → ".join(p.stem for p in (*seen, path))
        raise UsageError(f"{path}: extends leads back to itself ({cycle}); remove one of them")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not valid TOML: {reason}; correct the file") from None
    values: dict[str, Any] = {}
    if (base := own.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UsageError(f"{path}: extends = {base!r} is not a name; name one profile")
        sibling = path.parent / f"{base.removesuffix('.toml')}.toml"
        values = _read(sibling if sibling.is_file() else find(base), (*seen, path))
    _merge(values, own, path.parent)
    return values


def _merge(values: dict[str, Any], new: dict[str, Any], base: Path, prefix: str = "") -> None:
    """Merge `new` into `values` key by key. Relative paths start from `base`.

    A new source drops what is inherited of the former one, such as its digest; new weights to
    start from drop sizes and vocabulary.
    """
    if "source" in new:
        for key in ("sha256", "vocab_size", "sample_bytes"):
            values.pop(key, None)
    if isinstance(new.get("model"), dict) and new["model"].get("init_from"):
        for section, keys in OF_WEIGHTS.items():
            for key in keys:
                values.get(section, {}).pop(key, None)
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if dotted in _PATH_KEYS:
            # A profile that ships starts from a run, which is where `run` puts it.
            is_run = dotted == "model.init_from" and base == paths.CONFIGS
            values[key] = _absolute(value, Path.cwd() if is_run else base)
        elif isinstance(value, dict) and isinstance(values.get(key, {}), dict):
            _merge(values.setdefault(key, {}), value, base, f"{dotted}.")
        else:
            values[key] = value


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


def _explain(error: ValidationError) -> str:
    """Return the first of pydantic's errors as one line: key, value, what is wrong."""
    first = error.errors()[0]
    branches = ("str", "list[", "literal[", "bool", "TwoModels")  # of a union
    parts = [str(part) for part in first["loc"] if not str(part).startswith(branches)]
    value, message = first["input"], " ".join(first["msg"].split())
    if first["type"] == "problem":
        for part in first["ctx"]["key"].split("."):
            parts.append(part)
            value = value.get(part) if isinstance(value, dict) else None
    dotted = ".".join(parts)
    if first["type"] == "extra_forbidden":
        model: Any = Profile
        for part in parts[:-1]:
            model = model.model_fields[part].annotation
        suggestion = _suggestion(parts[-1], list(model.model_fields))
        return f"unknown key {dotted}{suggestion}; remove or rename it"
    shown = "" if value is None or first["type"] == "missing" else f" = {value!r:.80}"
    hint = "" if ";" in message else "; correct it"
    return f"{dotted}{shown}: {message[:1].lower()}{message[1:]}{hint}"


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
