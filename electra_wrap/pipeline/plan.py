"""Which stages a run has to do, and why. Planning has no side effects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from electra_wrap.errors import UsageError
from electra_wrap.pipeline.stage import Stage, data_digests, describe_change, stale_reason
from electra_wrap.run import Run, read_profile


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage to do, and why."""

    stage: Stage
    reason: str


def select(run: Run, stages: Sequence[Stage], until: str | None) -> list[Stage]:
    """Return the enabled stages up to `until` (default: all). UsageError if it does not exist."""
    names = [stage.name for stage in stages]
    if until not in (None, *names):
        raise UsageError(f"--until {until}: no such stage; the stages are {', '.join(names)}")
    last = names.index(until or names[-1])
    return [stage for stage in stages[: last + 1] if stage.enabled(run)]


def plan(run: Run, stages: Sequence[Stage]) -> list[Step]:
    """Return the stages that have to be done, in order, each with the reason.

    A stage that is repeated because its outputs were lost is expected to give the same outputs
    again. A stage after one that is expected to give others is planned, though it may turn out to
    be up to date. UsageError if the run must not continue.
    """
    steps: list[Step] = []
    expected: dict[Path, str] = {}
    changing: list[str] = []

    def digest(path: Path) -> str:
        return expected.get(path) or run.digest(path)

    for stage in stages:
        changed = [name for name in stage.depends_on if name in changing]
        reason = f"depends on {changed[0]}" if changed else stale_reason(run, stage, digest)
        if reason is None:
            continue
        record = run.record(stage.record_name(run))
        done = not changed and record.get("outcome") == "done"
        change = describe_change(record["inputs"], stage.inputs(run, digest)) if done else None
        if change and stage.outputs(run):
            _refuse_other_data(run, f"{stage.name}: {reason}", record["outputs"])
        if done and not change and stage.outputs(run):
            expected |= {run.directory / name: value for name, value in record["outputs"].items()}
        else:
            changing.append(stage.name)
        steps.append(Step(stage, reason))
    return steps


def _refuse_other_data(run: Run, reason: str, recorded_outputs: dict[str, str]) -> None:
    """Raise UsageError if a stage with other inputs would replace the data of a trained model.

    `recorded_outputs` are those that the stage wrote with its former inputs. Where they are not
    what the profile's model was trained on, somebody else replaced them; the stage may then restore
    the model's data, which is verified before training continues.
    """
    model_data = run.record(run.train_record).get("inputs", {})
    names = {"corpus": "corpus", "heldout": "held-out corpus", "vocab.txt": "vocabulary"}
    owner = read_profile(run.directory)
    if owner and owner.model_name != run.profile.model_name:
        try:
            on_disk = data_digests(run, run.digest)
        except FileNotFoundError:
            on_disk = {}
        if not on_disk or any(model_data.get(key) != on_disk[key] for key in on_disk):
            raise UsageError(
                f"{run.directory} belongs to {owner.model_name}, and its data would change "
                f"({reason}); give that model's --profile, or choose another --run-dir"
            )
    is_model_data = [
        model_data.get(names[name]) == value
        for name, value in recorded_outputs.items()
        if name in names
    ]
    if is_model_data and all(is_model_data):
        raise UsageError(
            f"{run.model_dir} was trained on other data ({reason}); restore that setting, or "
            "choose another --run-dir"
        )
