"""Runs the stages of a plan and records them in the manifest."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from electra_wrap import files, initial_weights
from electra_wrap.engines import choose_devices, engine_of, find_checkpoint
from electra_wrap.errors import Interrupted
from electra_wrap.pipeline.plan import plan, select
from electra_wrap.pipeline.stage import Stage, Values, describe_change, stale_reason
from electra_wrap.pipeline.stages import STAGES
from electra_wrap.progress import format_duration, log
from electra_wrap.run import Run

UP_TO_DATE = "nothing to do: everything is up to date"


def execute(
    run: Run, *, until: str | None = None, dry_run: bool = False, verify: bool = False
) -> int:
    """Do what has to be done up to the stage `until`; return how many stages that were.

    Sizes and modification times decide whether there is anything to do. Before something is done,
    or to `verify`, all outputs are read and compared with their checksums.
    """
    started = time.monotonic()
    selected = select(run, STAGES, until)
    if dry_run:
        if verify:
            run.forget_digests(run.directory)
        steps = plan(run, selected)
        for step in steps:
            log(f"would do: {step.stage.name} ({step.reason})")
        if not steps:
            log(UP_TO_DATE)
        return 0
    with run.lock():
        if verify or plan(run, selected):
            run.forget_digests(run.directory)
        steps = plan(run, selected)
        for step in steps:
            log(f"to do: {step.stage.name} ({step.reason})")
        planned = {step.stage.name for step in steps}
        _prepare(run, planned)
        (run.directory / "logs").mkdir(exist_ok=True)
        files.write_json(run.directory / "profile.json", run.profile.model_dump())
        done = 0
        for stage in selected:
            if stale_reason(run, stage, run.digest):
                _execute_stage(run, stage)
                done += 1
            elif stage.name in planned:
                log(f"{stage.name}: up to date after all")
            for name in stage.scratch(run):
                files.remove(run.directory / name)
        run.save()
    took = format_duration(time.monotonic() - started)
    log(f"{done} of {len(selected)} stages done, {took}" if done else f"{UP_TO_DATE}, {took}")
    return done


def _prepare(run: Run, planned: set[str]) -> None:
    """Do what can fail before hours of other work."""
    if planned & {"examples", "train"}:
        engine_of(run).prepare(run)
    if "train" in planned:
        if run.profile.train.device == "gpu":
            choose_devices(run, "train")
        if find_checkpoint(run) is None:
            initial_weights.prepare(run)


def _execute_stage(run: Run, stage: Stage) -> None:
    """Do a stage. Record its inputs before, and its outcome after."""
    name = stage.record_name(run)
    former = run.record(name)
    record: Values = {
        "outcome": "interrupted",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": stage.inputs(run, run.digest),
        "versions": stage.versions(run),
        "outputs": former.get("outputs", {}),
    }
    archived = _make_room(run, stage, former, record)
    if stage.name == "train" and former:
        _log_changed_versions(former["versions"], record["versions"])
    run.manifest["stages"][name] = record
    run.save()
    started = time.monotonic()
    try:
        record["results"] = stage.execute(run)
    except Interrupted:
        raise
    except Exception:
        record["outcome"] = "failed"
        raise
    else:
        outputs = stage.outputs(run)
        record["outputs"] = {output: run.digest(run.directory / output) for output in outputs}
        record["outcome"] = "done"
        for output, old in archived.items():
            if run.digest(old) == record["outputs"][output]:
                files.remove(old)  # the same content is in place again
    finally:
        record["seconds"] = round(time.monotonic() - started, 1)
        run.save()


def _make_room(run: Run, stage: Stage, former: Values, record: Values) -> dict[str, Path]:
    """Archive the outputs that a stage is about to write again; return where they are now.

    Outputs of an interrupted attempt at the same work are not archived: they are kept if the stage
    continues that attempt, and removed otherwise.
    """
    same = ("outcome", "inputs", "versions")
    is_same_attempt = all(former.get(key) == record[key] for key in same)
    continues = any((run.directory / name).exists() for name in stage.scratch(run))
    archived: dict[str, Path] = {}
    for name in stage.outputs(run):
        path = run.directory / name
        if not path.exists() or (is_same_attempt and continues):
            continue
        untouched = run.digest(path) == former.get("outputs", {}).get(name)
        if stage.replaces_outputs and untouched:
            continue
        if is_same_attempt:
            files.remove(path)
        elif old := files.archive(path):
            archived[name] = old
            log(f"{stage.name}: the former {name} is now {old.name}")
    return archived


def _log_changed_versions(former: dict[str, str], now: dict[str, str]) -> None:
    common = former.keys() & now.keys()  # the other engine depends on other packages
    change = describe_change(
        {name: former[name] for name in common}, {name: now[name] for name in common}
    )
    if change:
        log(f"train: continues with other versions: {change}")
