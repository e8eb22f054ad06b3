"""A training's scalars for TensorBoard, its progress and its evaluations, whichever engine trains.

Each model has two TensorBoard runs with the same tags: models/NAME/train and models/NAME/eval.
"""

import contextlib
import logging
import math
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # `api` imports TensorFlow
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.summary.writer.record_writer import RecordWriter

from electra_wrap.architecture import NETWORKS
from electra_wrap.events import Evaluation, Event, Setup, Step
from electra_wrap.progress import ProgressBar, log
from electra_wrap.run import Run

# TensorBoard imports TensorFlow when it first reads or writes, unless this module exists.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))

#: Seconds after which TensorBoard sees what was written.
FLUSH = 10


class Scalars(contextlib.AbstractContextManager["Scalars"]):
    """A new event file in a directory. With `start`, it replaces events from that step on."""

    def __init__(self, directory: Path, start: int | None = None) -> None:
        directory.mkdir(exist_ok=True)  # but not the run directory: if it is gone, so is its disk
        self._writer = EventFileWriter(str(directory), flush_secs=FLUSH)
        if start is not None:
            started = SessionLog(status=SessionLog.START)
            self._writer.add_event(TensorBoardEvent(step=start, session_log=started))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = TensorBoardEvent(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.add_event(event)

    def __exit__(self, *error: object) -> None:
        self._writer.close()


def _write_hyperparameters(run: Run) -> None:
    """Write what TensorBoard's HParams tab compares, beside the evaluations."""
    model, train = run.profile.model, run.profile.train
    values: dict[str, Any] = {"engine": run.profile.engine, "vocab_size": run.vocab_size}
    for network in NETWORKS:
        for key in ("hidden_size", "num_hidden_layers"):
            values[f"{network}.{key}"] = getattr(model.shape(network), key)
    values |= {f"model.{key}": getattr(model, key) for key in ("mask_prob", "max_seq_length")}
    for key in ("batch_size", "learning_rate", "seed", "steps", "warmup_steps", "weight_decay"):
        values[f"train.{key}"] = getattr(train, key)
    summary = hparams_pb(values, trial_id="")  # by default, runs with equal values are averaged
    event = TensorBoardEvent(wall_time=time.time(), summary=summary)
    directory = run.model_dir / "eval"
    directory.mkdir(exist_ok=True)
    # A file of its own, read first: TensorBoard keeps the first values, and train.steps may change.
    with (directory / "events.out.tfevents.0.hparams").open("wb") as file:
        RecordWriter(file).write(event.SerializeToString())


def read_scalars(directory: Path, *, replaced: bool = False) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars in a directory: for each tag, the steps and values.

    With `replaced`, events that a later attempt replaced are included.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.is_dir():
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumed training
    reader = EventAccumulator(str(directory), {"scalars": 0}, purge_orphaned_data=not replaced)
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def total_hours(run: Run) -> float:
    """Return the hours of all attempts to train the model, including those that were killed."""
    logged = read_scalars(run.model_dir / "train", replaced=True)
    return max((hours for _, hours in logged.get("cost/hours", [])), default=0.0)


class TrainingMonitor(contextlib.ExitStack):
    """Takes the events of a training from the step `start`. `loss` is the last total loss."""

    def __init__(self, run: Run, start: int) -> None:
        super().__init__()
        self._run, self.loss = run, math.nan
        self._examples = run.results(run.examples_record)["examples"]
        self._hours_before, self._started = total_hours(run), time.monotonic()
        self._last: Step | None = None
        self._scalars = self.enter_context(Scalars(run.model_dir / "train", start + 1))
        bar = ProgressBar("train", run.profile.train.steps, "steps", done=start)
        self._bar = self.enter_context(bar)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Setup):
            _record_setup(self._run, event)
        elif isinstance(event, Evaluation):
            record_evaluation(self._run, event)
            self._last = None  # the time of an evaluation does not count as that of a step
        elif isinstance(event, Step):
            self.loss = event.scalars["loss/total"]
            self._bar.show(event.step, f"loss {self.loss:.4f}")
            self._scalars.write(event.step, event.scalars | self._measure(event))
            self._last = event

    def _measure(self, event: Step) -> dict[str, float]:
        """Return hours, epochs, and the speed by the trainer's clock."""
        profile, last = self._run.profile, self._last
        values = {
            "cost/hours": self._hours_before + (time.monotonic() - self._started) / 3600,
            "progress/epochs": event.step * profile.train.batch_size / self._examples,
        }
        if last:
            speed = (event.step - last.step) / max(event.clock - last.clock, 1e-9)
            tokens = profile.train.batch_size * profile.model.max_seq_length
            values["speed/steps_per_second"] = speed
            values["speed/tokens_per_second"] = speed * tokens
        return values


def _record_setup(run: Run, event: Setup) -> None:
    """Record what a training runs on, and log what is other than before: results may differ."""
    for name, value in event.values.items():
        before = run.model.setup.get(name, value)
        if before != value:
            log(f"train: continues with {name} {value}; it was {before}")
    run.model.setup = event.values
    run.save()


def record_evaluation(run: Run, event: Evaluation) -> None:
    """Record an evaluation in the manifest and for TensorBoard."""
    _write_hyperparameters(run)
    with Scalars(run.model_dir / "eval") as scalars:
        scalars.write(event.step, event.scalars)
    run.model.evaluations[event.step] = {**event.scalars, "examples": event.examples}
    run.save()
    loss, auc = event.scalars["loss/total"], event.scalars["discriminator/auc"]
    what = f"step {event.step:,} on {event.examples:,} held-out examples"
    log(f"evaluate: {what}: loss {loss:.4f}, AUC {auc:.4f}")


def discard_evaluations_after(run: Run, step: int) -> None:
    """Discard the evaluations of later steps: training continues from `step` to other weights."""
    evaluations = run.model.evaluations
    if any(evaluated > step for evaluated in evaluations):
        run.model.evaluations = {s: metrics for s, metrics in evaluations.items() if s <= step}
        with Scalars(run.model_dir / "eval", start=step + 1):
            pass
