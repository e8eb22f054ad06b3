"""Stage `train`: from the latest intact checkpoint to the profile's last step."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time

from electra_wrap import files, initial_weights
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import (
    ENGINES,
    checkpoints,
    choose_devices,
    engine_of,
    find_checkpoint,
    is_checkpoint_intact,
)
from electra_wrap.errors import EnvironmentProblem, Interrupted, StageFailed, UsageError
from electra_wrap.monitor import evaluation
from electra_wrap.monitor.training import TrainingMonitor
from electra_wrap.pipeline import examples
from electra_wrap.pipeline.evaluate import evaluate_checkpoint
from electra_wrap.pipeline.stage import Digest, Stage, Values, describe_change
from electra_wrap.profile import ENGINE_NAMES, NETWORKS, POSITIONS
from electra_wrap.progress import log, warn
from electra_wrap.run import Run

#: Names of temporary files in the model's directory. A killed training leaves them.
_TEMPORARY: tuple[str, ...] = ("exported-*", "*.partial", ".*.removed", "model.ckpt-*_temp")
_TEMPORARY += ("model.ckpt-*.tempstate*", "checkpoint.tmp*", "graph.pbtxt.tmp*")

#: Bytes of a checkpoint that are not weights or optimizer state: the graph, logs, scalars.
_OVERHEAD = 3_000_000


def _inputs(run: Run, digest: Digest) -> Values:
    """Return what a model is trained with: all but the keys that may change in mid-training.

    Those say how long, how often and where. Either engine may continue a model of the other.
    """
    inputs = examples.inputs(run, digest)
    for network in NETWORKS:
        shape = dataclasses.asdict(run.profile.model.shape(network))
        inputs |= {f"the {network}'s {key}": value for key, value in shape.items()}
    keys = ("batch_size", "learning_rate", "warmup_steps", "weight_decay")
    inputs |= {f"train.{key}": getattr(run.profile.train, key) for key in keys}
    inputs["model.mask_prob"] = run.profile.model.mask_prob
    if (positions := run.profile.model.max_position_embeddings) != POSITIONS:
        inputs["model.max_position_embeddings"] = positions
    return inputs | initial_weights.identity(run, digest)


def _stale_reason(run: Run, digest: Digest) -> str | None:
    record = run.record(run.train_record)
    if not record and checkpoints(run):
        raise UsageError(f"{run.model_dir} has a model of another run; choose another model_name")
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        return "not done yet"
    step, steps = checkpoint.step, run.profile.train.steps
    _refuse_other_settings(run, step, digest)
    if step > steps:
        where = f"{run.model_dir} is at step {step:,}"
        raise UsageError(f"{where}, train.steps = {steps}; set train.steps={step} or more")
    if step < steps:
        _refuse_other_versions(run, step, record["versions"])
        return f"at step {step:,} of {steps:,}"
    return None if record["outcome"] == "done" else str(record["outcome"])


def _refuse_other_settings(run: Run, step: int, digest: Digest) -> None:
    """Raise UsageError if the model was trained with other settings or on other data."""
    if change := describe_change(run.record(run.train_record)["inputs"], _inputs(run, digest)):
        raise UsageError(
            f"{run.model_dir} has a model trained for {step:,} steps, and {change}; restore that, "
            "or train another model: --set model_name=NAME or --run-dir DIR"
        )


def _refuse_other_versions(run: Run, step: int, former: dict[str, str]) -> None:
    """Raise UsageError if the pin, the patches or a major version changed in mid-training.

    A minor version changes rounding and the order of random numbers. The other engine may continue
    all the same: it takes over weights and optimizer state as numbers.
    """
    now = engine_of(run).versions("train")
    for name in sorted(former.keys() & now.keys()):
        if former[name].partition(".")[0] != now[name].partition(".")[0]:
            other = next(name for name in ENGINE_NAMES if name != run.profile.engine)
            raise UsageError(
                f"{run.model_dir} was trained for {step:,} steps with {name} {former[name][:12]}, "
                f"but {now[name][:12]} is installed; install the former, or --set engine={other}"
            )


def _execute(run: Run) -> Values:
    settings = run.profile.train
    if settings.evaluate_every and not run.results(run.examples_record)["held_out_examples"]:
        warn("train.evaluate_every has no effect: there are no held-out examples")
    devices = choose_devices(run, "train")
    _check_disk_space(run)
    run.make_model_dir()
    start = _prepare_checkpoint(run)
    started = time.monotonic()
    evaluation.discard_after(run, start)
    _record_engine(run, start)
    precision = _record_precision(run, start, devices)
    _evaluate_start(run, start)
    with TrainingMonitor(run, start) as monitor:
        try:
            engine_of(run).train(run, devices, monitor)
        except Interrupted:
            saved = find_checkpoint(run)
            where = f"resumes at step {saved.step:,}" if saved else "starts training again"
            raise Interrupted(f"interrupted; the same command {where}") from None
    last = find_checkpoint(run)
    if last is None or last.step != settings.steps:
        step, log_file = last.step if last else 0, run.log_file("train")
        raise StageFailed(f"training ended at step {step:,}; see the log: {log_file}")
    return {
        "engine": run.profile.engine,
        "device": devices or "cpu",
        "precision": precision,
        "from_step": start,
        "step": last.step,
        "final_loss": None if math.isnan(monitor.loss) else monitor.loss,
        "seconds_training": round(time.monotonic() - started, 1),
    }


def _prepare_checkpoint(run: Run) -> int:
    """Leave the latest intact checkpoint, in the engine's own format; return its step, or 0.

    Without one, the weights in model.init_from, if there are any, become that of step 0.
    """
    latest = find_checkpoint(run)
    for checkpoint in checkpoints(run):
        if latest and checkpoint.step < latest.step:
            break
        if not is_checkpoint_intact(run, checkpoint):
            ENGINES[checkpoint.engine].archive(checkpoint)
            warn(f"the checkpoint of step {checkpoint.step:,} is damaged and was archived")
    for pattern in _TEMPORARY:
        for path in run.model_dir.glob(pattern):
            files.remove(path)
    if latest is None:
        if run.profile.model.init_from:
            initial = run.directory / initial_weights.DIRECTORY
            engine_of(run).import_checkpoint(run, initial, 0)
            files.remove(initial)
        return 0
    log(f"train: resumes at step {latest.step:,} of {run.profile.train.steps:,}")
    if latest.engine != run.profile.engine:
        log(f"train: converts the checkpoint for the {run.profile.engine} engine")
        exported = run.model_dir / f"exported-{latest.step}"
        ENGINES[latest.engine].export(run, latest, exported, optimizer=True)
        engine_of(run).import_checkpoint(run, exported, latest.step)
        shutil.rmtree(exported, ignore_errors=True)
    return latest.step


def _check_disk_space(run: Run) -> None:
    """Raise EnvironmentProblem if the disk has no room for the checkpoints and the export."""
    settings = run.profile.train
    sizes = [4 * run.profile.parameters(network, run.vocab_size) for network in NETWORKS]
    shared = 4 * run.vocab_size * run.profile.model.shape("discriminator").embedding_size
    number = settings.steps // settings.save_every + 1
    if settings.evaluate_every:
        number += settings.steps // settings.evaluate_every
    number = min(settings.keep or number, number)
    number += 1 + bool(settings.evaluate_every)  # the one being written, and the best
    # Weights and two slots of Adam; the networks share their embeddings.
    needed = number * (3 * (sum(sizes) - shared) + _OVERHEAD) + sum(sizes)
    existing = sum(p.stat().st_size for p in run.model_dir.rglob("*") if p.is_file())
    free = shutil.disk_usage(run.directory).free
    if needed - existing > free:
        raise EnvironmentProblem(
            f"{run.directory} has {free / 1e9:.2g} GB free, but training will write about "
            f"{(needed - existing) / 1e9:.2g} GB ({number} checkpoints); make room, lower "
            "train.keep, or choose another --run-dir"
        )


def _record_engine(run: Run, start: int) -> None:
    """Record for the model card which engine trains from the step `start`."""
    segments = [
        {**segment, "to_step": min(segment["to_step"], start)}
        for segment in run.model.get("trained_by", [])
        if segment["from_step"] < start
    ]
    name, steps = run.profile.engine, run.profile.train.steps
    if segments and segments[-1]["engine"] == name:
        segments[-1]["to_step"] = steps
    elif start < steps:
        segments.append({"engine": name, "from_step": start, "to_step": steps})
    run.model["trained_by"] = segments


def _record_precision(run: Run, start: int, devices: list[str]) -> str:
    """Record and return the precision of training, and log if it was another one before."""
    precision = engine_of(run).precision(run.profile.train.precision, devices)
    former = run.model.get("precision")
    if start and former not in (None, precision):
        log(f"train: continues in {precision}; the steps before were in {former}")
    run.model["precision"] = precision
    run.save()
    return precision


def _evaluate_start(run: Run, start: int) -> None:
    """Evaluate the weights in model.init_from before training, so that it has a baseline.

    And evaluate the checkpoint to resume from, if an attempt was killed before it did.
    """
    every = run.profile.train.evaluate_every
    is_due = every and start % every == 0 if start else run.profile.model.init_from
    if not is_due or start in evaluation.evaluations(run, run.profile.engine):
        return
    if run.results(run.examples_record)["held_out_examples"]:
        evaluate_checkpoint(run, Checkpoint(run.profile.engine, start, run.model_dir))


STAGE = Stage(
    name="train",
    inputs=_inputs,
    execute=_execute,
    versions=lambda run: engine_of(run).versions("train"),
    record=lambda run: run.train_record,
    stale_reason=_stale_reason,
    depends_on=("corpus", "vocab"),
)
