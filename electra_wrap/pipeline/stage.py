"""What a stage is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_wrap.run import Run

Values = dict[str, Any]

#: Returns the SHA-256 of a file or directory: today's, or in a plan the expected one.
Digest = Callable[[Path], str]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step from text to model: a function of some keys of the profile and of earlier outputs."""

    name: str

    #: What the stage is made from. It is redone when one of these changes.
    inputs: Callable[[Run, Digest], Values]

    #: Does the work and returns results for the manifest.
    execute: Callable[[Run], Values]

    #: Names of the outputs in the run directory.
    outputs: Callable[[Run], tuple[str, ...]] = lambda run: ()

    #: Versions of what the results depend on beside the inputs. They do not make a stage stale.
    versions: Callable[[Run], dict[str, str]] = lambda run: {}

    #: Name of the stage's record in the manifest, if it is not the stage's own.
    record: Callable[[Run], str] | None = None

    #: Working directories that an interrupted attempt leaves, and that the next one continues.
    scratch: Callable[[Run], tuple[str, ...]] = lambda run: ()

    #: Replaces `stale_reason` where inputs and outputs do not tell whether the stage is up to date.
    #: UsageError if the run must not continue.
    stale_reason: Callable[[Run, Digest], str | None] | None = None

    #: Names of the stages whose results this one uses.
    depends_on: tuple[str, ...] = ()

    #: Whether outputs that nobody changed are replaced rather than archived.
    replaces_outputs: bool = False

    enabled: Callable[[Run], bool] = lambda run: True

    def record_name(self, run: Run) -> str:
        return self.record(run) if self.record else self.name


def data_digests(run: Run, digest: Digest) -> Values:
    """Return the inputs of a stage that uses the corpus, held-out text included, and vocabulary."""
    return {
        "corpus": digest(run.corpus),
        "held-out corpus": digest(run.held_out),
        "vocabulary": digest(run.vocabulary),
    }


def stale_reason(run: Run, stage: Stage, digest: Digest) -> str | None:
    """Return why a stage has to be done; None if it is up to date."""
    if stage.stale_reason:
        return stage.stale_reason(run, digest)
    record = run.record(stage.record_name(run))
    if not record:
        return "not done yet"
    if record["outcome"] != "done":
        return str(record["outcome"])
    if change := describe_change(record["inputs"], stage.inputs(run, digest)):
        return change
    return changed_output(run, stage)


def changed_output(run: Run, stage: Stage) -> str | None:
    """Return which output is missing or is not as the stage wrote it; None if none is."""
    written = run.record(stage.record_name(run)).get("outputs", {})
    for name in stage.outputs(run):
        path = run.directory / name
        if not path.exists():
            return f"{name} is missing"
        if run.digest(path) != written.get(name):
            return f"{name} has changed since this stage wrote it"
    return None


def describe_change(before: Values, now: Values) -> str | None:
    """Describe the first input that changed, with both values; None if none did."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            return f"{key} was {_shorten(old)} and is {_shorten(new)}"
    return None


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        items = ", ".join(_shorten(item) for item in value[:3])
        return f"[{items}, …]" if len(value) > 3 else f"[{items}]"
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_digest else repr(value)
