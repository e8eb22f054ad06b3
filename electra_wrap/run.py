"""A run: a profile in a run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from electra_wrap import files
from electra_wrap.errors import UsageError
from electra_wrap.events import Evaluation
from electra_wrap.profile import EngineName, Profile

MANIFEST = "manifest.json"

#: Version of the manifest's format.
FORMAT = 2


class Run:
    """A profile in a run directory: its paths, its manifest and its lock.

    The manifest records for each stage what it was made from and how it ended, and for each model
    its evaluations. It also caches the SHA-256 of every file by size and modification time, so
    that asking whether a file changed costs a `stat`. Damage by a disk may keep both: before files
    are used, `forget_digests` has them read again.

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
        self.profile = profile
        self.directory = Path(os.path.realpath(directory))  # resolve() raises an error for loops
        self.upstream = upstream
        self.launch = launch
        self.manifest = read_manifest(self.directory)
        #: The evaluation with which training ended, until the stage `evaluate` takes it over.
        self.last_evaluation: Evaluation | None = None

    @classmethod
    def open(cls, directory: Path) -> Run:
        """Return the run in a directory, with the profile that it last ran with.

        UsageError if the directory is not a run directory.
        """
        read_manifest(directory)
        profile = read_profile(directory)
        if profile is None:
            raise UsageError(
                f"{directory} is not a run directory: it has no valid profile.json; give one that "
                "`run` made"
            )
        return cls(profile, directory)

    @property
    def corpus(self) -> Path:
        return self.directory / "corpus"

    @property
    def held_out(self) -> Path:
        return self.directory / "heldout"

    @property
    def vocabulary(self) -> Path:
        return self.directory / "vocab.txt"

    @property
    def model_dir(self) -> Path:
        return self.directory / "models" / self.profile.model_name

    def make_model_dir(self) -> None:
        """Make the model's directory, but not the run directory: if it is gone, so is its disk."""
        self.model_dir.parent.mkdir(exist_ok=True)
        self.model_dir.mkdir(exist_ok=True)

    @property
    def exported(self) -> Path:
        return self.directory / "hf"

    def log_file(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    @property
    def vocab_size(self) -> int:
        """Number of tokens in vocab.txt; without a readable one, the number it last had."""
        try:
            text = self.vocabulary.read_text(encoding="utf-8")
            return len(text.removesuffix("\n").split("\n"))
        except (FileNotFoundError, ValueError):
            return int(self.results("vocab").get("vocab_size", 0))

    def record(self, stage: str) -> dict[str, Any]:
        """Return the manifest's entry of a stage; empty if the stage never ran."""
        return dict(self.manifest["stages"].get(stage, {}))

    def results(self, stage: str) -> dict[str, Any]:
        """Return what a stage reported when it last ran; empty if it never finished."""
        return dict(self.record(stage).get("results", {}))

    @property
    def examples_record(self) -> str:
        """Name of the manifest's entry of the examples, which differ between engines."""
        return f"examples {self.profile.engine}"

    @property
    def train_record(self) -> str:
        """Name of the manifest's entry of the training: a run directory may hold several models."""
        return f"train {self.profile.model_name}"

    @property
    def model(self) -> dict[str, Any]:
        """The manifest's entry of the model."""
        models: dict[str, dict[str, Any]] = self.manifest["models"]
        return models.setdefault(self.profile.model_name, {})

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, or of a directory's sorted file names and digests.

        FileNotFoundError if it does not exist.
        """
        if path.is_dir():
            names = sorted(p for p in path.rglob("*") if p.is_file())
            lines = "".join(f"{self.digest(p)}  {p.relative_to(path)}\n" for p in names)
            return hashlib.sha256(os.fsencode(lines)).hexdigest()
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        cached = self.manifest["digests"].get(self._cache_key(path))
        if cached and cached[:2] == state:
            return str(cached[2])
        digest = files.sha256(path)
        self.manifest["digests"][self._cache_key(path)] = [*state, digest]
        return digest

    def forget_digests(self, directory: Path) -> None:
        """Have `digest` read the files under a directory again."""
        cached = self.manifest["digests"]
        for key in list(cached):
            if (self.directory / key).is_relative_to(directory):
                del cached[key]

    def _cache_key(self, path: Path) -> str:
        # Relative inside the run directory, so that a run can be moved.
        inside = path.is_relative_to(self.directory)
        return str(path.relative_to(self.directory) if inside else path)

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the run directory. UsageError, naming the holder, if another process holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with files.lock(self.directory / ".lock", shared=shared):
            self.manifest = read_manifest(self.directory)  # another process may have run
            yield

    def save(self) -> None:
        """Write the manifest."""
        files.write_json(self.directory / MANIFEST, self.manifest)


Step = Annotated[str, Field(pattern=r"^\d{1,15}$")]


class _Record(BaseModel, extra="allow", strict=True):
    """The manifest's entry of a stage."""

    outcome: str
    inputs: dict[str, Any]
    versions: dict[str, str]
    outputs: dict[str, str] = {}
    results: dict[str, Any] = {}
    started: str = ""
    seconds: float = 0


class _Segment(BaseModel, strict=True):
    engine: EngineName
    from_step: int
    to_step: int


class _Model(BaseModel, strict=True):
    trained_by: list[_Segment] = []
    precision: str | None = None
    evaluations: dict[EngineName, dict[Step, dict[str, float]]] = {}


class _Manifest(BaseModel, strict=True):
    stages: dict[str, _Record]
    digests: dict[str, tuple[int, int, str]]
    models: dict[str, _Model]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a run directory's manifest; an empty one if there is none.

    UsageError if it is damaged or has another version's format, or if the run directory has links
    or pipes.
    """
    _refuse_special_files(directory)
    path = directory / MANIFEST
    empty: dict[str, Any] = {"format": FORMAT, "stages": {}, "digests": {}, "models": {}}
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        if isinstance(manifest, dict) and manifest.get("format", 1) != FORMAT:
            raise UsageError(
                f"{directory} was made by another version of electra_wrap; continue it with that "
                "version, or choose another --run-dir"
            )
        _Manifest.model_validate_json(text)
        return empty | {key: manifest[key] for key in ("stages", "digests", "models")}
    except (FileNotFoundError, NotADirectoryError):
        return empty
    except (ValueError, RecursionError):
        message = f"{path} is damaged; restore it from a backup, or choose another --run-dir"
        raise UsageError(message) from None


def _refuse_special_files(directory: Path) -> None:
    """Raise UsageError if something in a directory is neither a file nor a directory.

    Through a link, a run would write elsewhere. Reading a pipe or a device may never end.
    """
    with contextlib.suppress(OSError), os.scandir(directory) as entries:  # it may not exist yet
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _refuse_special_files(Path(entry))
            elif not entry.is_file(follow_symlinks=False):
                problem = f"{entry.path} is a link, a pipe or a device in a run directory"
                raise UsageError(f"{problem}; replace it, or link the whole run directory")


def read_profile(directory: Path) -> Profile | None:
    """Return the profile that a run directory last ran with; None if there is none."""
    try:
        text = (directory / "profile.json").read_text(encoding="utf-8")
        return Profile.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
