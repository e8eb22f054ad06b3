"""Versions of installed packages, without importing them."""

from __future__ import annotations

import importlib.metadata

from electra_wrap.errors import EnvironmentProblem


def versions(*names: str) -> dict[str, str]:
    """Return the version of each package. EnvironmentProblem if one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(
            f"{error.name} is not installed; install electra_wrap again"
        ) from None
