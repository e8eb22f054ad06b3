"""Files of models on a hub."""

import logging
from pathlib import Path

from electra_wrap.errors import EnvironmentProblem

#: Begins a model's name: hf://NAME[@REVISION].
SCHEME = "hf://"


def download(source: str, file: str) -> Path | None:
    """Return where a file of `hf://NAME[@REVISION]` is in the cache; None if the model lacks it.

    Its directory is named after the commit. EnvironmentProblem if there is no such model, or if the
    hub cannot be reached.
    """
    # Imported here: the import takes 0.3 s.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each retry
    name, _, revision = source.removeprefix(SCHEME).partition("@")
    try:
        return Path(hf_hub_download(name, file, revision=revision or None))
    except RemoteEntryNotFoundError:
        return None
    except (HFValidationError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"{source} cannot be fetched ({reason})"
        fix = "correct the name, or give the path of a local copy"
        raise EnvironmentProblem(f"{problem}; {fix}") from None
