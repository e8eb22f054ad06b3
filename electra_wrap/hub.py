"""Files of models on a hub."""

from __future__ import annotations

import logging
from pathlib import Path

from electra_wrap.errors import EnvironmentProblem, UsageError

#: Begins a model's name: hf://NAME[@REVISION].
SCHEME = "hf://"


def download(source: str, file: str) -> Path | None:
    """Return where a file of `hf://NAME[@REVISION]` is in the cache; None if the model lacks it.

    Its directory is named after the commit. UsageError if there is no such model,
    EnvironmentProblem if the hub cannot be reached.
    """
    # Imported here: the import takes 0.3 s.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    name, _, revision = source.removeprefix(SCHEME).partition("@")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except RemoteEntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"{source}: {_reason(error)}; correct the name") from None
    except (OSError, RuntimeError) as error:
        problem = f"{source} cannot be fetched ({_reason(error)})"
        raise EnvironmentProblem(f"{problem}; give the path of a local copy") from None


def _reason(error: Exception) -> str:
    """Return the first sentence of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
