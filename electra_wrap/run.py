"""A run: a profile in a run directory."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from electra_wrap import files
from electra_wrap.errors import UsageError
from electra_wrap.profile import EngineName, Profile

MANIFEST = "manifest.json"

#: Version of the manifest's format.
FORMAT = 3

#: Names of the directories of each engine's examples: for training, and held out.
EXAMPLES: dict[EngineName, tuple[str, str]] = {
    "native": ("examples", "heldout_examples"),
    "upstream": ("pretrain_tfrecords", "heldout_tfrecords"),
}


class Record(BaseModel):
    """What a stage was made from, and how it ended."""

    inputs: dict[str, Any]
    started: str
    done: bool = False
    seconds: float = 0.0
    results: dict[str, int | float | list[dict[str, Any]] | None] = {}


class ModelRecord(BaseModel):
    """What is known of a model: a run directory may hold several."""

    #: The metrics of each step that was evaluated.
    evaluations: dict[int, dict[str, float]] = {}
    #: What the last attempt to train it ran on (`events.Setup`).
    setup: dict[str, str] = {}
    #: The SHA-256 of its vocab.txt.
    vocabulary: str = ""
    #: What model.init_from gave when the training began (initial_weights.py).
    initial: dict[str, Any] = {}


class Manifest(BaseModel):
    """The contents of manifest.json."""

    format: int = FORMAT
    stages: dict[str, Record] = {}
    models: dict[str, ModelRecord] = {}


class Run:
    """A profile in a run directory: its paths, its manifest and its lock.

    `upstream` is where to fetch google-research/electra from; `launch` starts the native trainer.
    """

    def __init__(
        self,
        profile: Profile,
        directory: Path,
        *,
        upstream: str | None = None,
        launch: str | None = None,
    ) -> None:
        self.profile, self.upstream, self.launch = profile, upstream, launch
        self.directory = path = directory.absolute()
        self.manifest = _read_manifest(path)
        self.corpus, self.held_out, self.vocabulary = (
            path / "corpus",
            path / "heldout",
            path / "vocab.txt",
        )
        #: The examples for training, the held-out ones, and the name of their record.
        training, held_out = EXAMPLES[profile.engine]
        self.examples = path / training, path / held_out
        self.examples_record = f"examples {profile.engine}"
        #: The verified weights in model.init_from, as two models, until training ends.
        self.initial = path / "initial"
        self.model_dir = path / "models" / profile.model_name
        self.exported = path / "hf"

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Return the run in a directory, with the profile that it last ran with.

        UsageError if the directory is not a run directory.
        """
        _read_manifest(directory)
        try:
            text = (directory / "profile.json").read_text(encoding="utf-8")
            return cls(Profile.model_validate_json(text), directory)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise UsageError(
                f"{directory} is not a run directory: it has no valid profile.json; give one that "
                "`run` made"
            ) from None

    def save(self) -> None:
        """Write the manifest."""
        files.write_json(self.directory / MANIFEST, self.manifest.model_dump())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory. UsageError if another process holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with files.lock(self.directory / ".lock"):
            self.manifest = _read_manifest(self.directory)  # another process may have run
            yield

    def results(self, stage: str) -> dict[str, Any]:
        """Return what a stage reported when it last finished; empty if it never did."""
        record = self.manifest.stages.get(stage)
        return record.results if record else {}

    @property
    def model(self) -> ModelRecord:
        """The manifest's entry of the model."""
        return self.manifest.models.setdefault(self.profile.model_name, ModelRecord())

    @property
    def vocab_size(self) -> int:
        """Number of tokens in vocab.txt, 0 before the stage `vocab`."""
        return int(self.results("vocab").get("vocab_size", 0))

    def make_model_dir(self) -> None:
        """Make the model's directory, but not the run directory: if it is gone, so is its disk."""
        self.model_dir.parent.mkdir(exist_ok=True)
        self.model_dir.mkdir(exist_ok=True)

    def refuse_other_vocabulary(self) -> None:
        """Raise UsageError unless vocab.txt is that of the training."""
        if files.sha256(self.vocabulary) != self.model.vocabulary:
            problem = f"{self.vocabulary} is not the one that the model was trained with"
            raise UsageError(f"{problem}; move it away, and `run` makes that again")

    def log_file(self, name: str) -> Path:
        path = self.directory / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        return path


def _read_manifest(directory: Path) -> Manifest:
    """Return a run directory's manifest; an empty one if there is none.

    UsageError if it is damaged or has another version's format.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise UsageError(
                f"{directory} was made by another version of electra_wrap; continue it with that "
                "version, or choose another --run-dir"
            )
        return Manifest.model_validate(values)
    except (FileNotFoundError, NotADirectoryError):
        return Manifest()
    except (ValueError, RecursionError):
        message = f"{path} is damaged; restore it from a backup, or choose another --run-dir"
        raise UsageError(message) from None
