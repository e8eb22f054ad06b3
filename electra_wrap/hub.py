"""Uploading a run's models to a hub, which is done if it is asked for and at no other time."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from electra_wrap import stages
from electra_wrap.errors import ElectraWrapError, EnvironmentLacks, UsageError
from electra_wrap.profile import NETWORKS
from electra_wrap.progress import say

#: The files of a model that go up.
FILES = ("README.md", "config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json")

#: What a person may have said in a card on the hub that no card of ours says; it stays.
LICENCE = ("license", "license_name", "license_link")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def push(run: stages.Run, name: str, *, public: bool) -> Iterator[str]:
    """Upload a run's models to the repositories `name`-discriminator and `name`-generator; yield their URLs.

    `name` is MODEL, which is the user's, or OWNER/MODEL. UsageError if the models are not those of the profile, if the
    hub refuses the name, or if a repository is public and that was not asked for; then nothing is uploaded.
    EnvironmentLacks if there is no token, the hub refuses it, or cannot be reached.
    """
    (convert,) = (stage for stage in stages.stages(run) if stage.name == "convert")
    if why := stages.reason(run, convert):
        raise UsageError(f"{run.directory / 'hf'} is not what the profile gives (convert: {why}); first `run`")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each time that it tries again
    api = HfApi(library_name="electra_wrap")
    with run.directory.lock(shared=True), _one_line(api.endpoint):
        step = run.recorded("convert")["facts"]["step"]
        user = api.whoami()["name"]  # of a token that is wrong, other answers say that there is no such repository
        names = {network: f"{name if '/' in name else f'{user}/{name}'}-{network}" for network in NETWORKS}
        for repository in names.values():
            with contextlib.suppress(RepositoryNotFoundError):
                _look(api, repository, public)
        for repository in names.values():
            api.create_repo(repository, private=not public, exist_ok=True)
        # Once more: one that was made meanwhile is as others made it.
        found = {network: _look(api, repository, public) for network, repository in names.items()}
        for network, repository in names.items():
            if public and found[network].private:
                say(f"export: {api.endpoint}/{repository} is private, and stays so")
            folder = run.directory / "hf" / network
            files: dict[str, Any] = {file: folder / file for file in FILES}
            theirs = found[network].card_data or {}
            if kept := {key: theirs.get(key) for key in LICENCE if theirs.get(key)}:
                card = ModelCard.load(folder / "README.md")
                for key, value in kept.items():
                    card.data[key] = value
                files["README.md"] = str(card).encode()
            operations = [CommitOperationAdd(file, content) for file, content in files.items()]
            api.create_commit(repository, operations, commit_message=f"{run.profile.model_name}, step {step:,}")
            yield f"{api.endpoint}/{repository}"


def _look(api: HfApi, repository: str, public: bool) -> Any:
    """What the hub says of a repository. UsageError if it is public and must not be."""
    info = api.model_info(repository)
    if not public and not info.private:
        raise UsageError(
            f"{api.endpoint}/{repository} is public, and nothing was uploaded; make it private in its settings, choose "
            "another name, or give --public"
        )
    return info


@contextlib.contextmanager
def _one_line(endpoint: str) -> Iterator[None]:
    """Say what goes wrong between the hub and us, in a line that has no secret."""
    try:
        yield
    except (ElectraWrapError, GeneratorExit):
        raise
    except LocalTokenNotFoundError:
        raise EnvironmentLacks(f"there is no token for {endpoint}; {_LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise EnvironmentLacks("HF_HUB_OFFLINE is set; unset it to upload") from None
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub: {_short(str(error))}; choose another name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f"{endpoint} says {status}" + (f" ({_short(error.server_message)})" if error.server_message else "")
        if status in (401, 403):
            raise EnvironmentLacks(f"{said}; {_LOG_IN}") from None
        if status in (400, 422):
            raise UsageError(f"{said}; correct what it names, or choose another name") from None
        raise EnvironmentLacks(f"{said}; run again, what is there is not sent twice") from None
    except Exception as error:  # each library behind it has errors of its own
        said = _short(f"{type(error).__name__}: {error}")
        raise EnvironmentLacks(f"{endpoint} cannot be reached, or broke off ({said}); run again") from None


def _short(text: str) -> str:
    """A text of others as a part of a line, without a token: h11 shows the header that it refuses."""
    return re.sub("Bearer .*", "Bearer …", " ".join(text.split()))[:200].rstrip(".")
