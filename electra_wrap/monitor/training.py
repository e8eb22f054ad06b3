"""Monitoring a training: progress, TensorBoard scalars, cost, and whether it learns."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
from collections.abc import Sequence

from electra_wrap.errors import StageFailed
from electra_wrap.events import Evaluation, Event, Step
from electra_wrap.monitor import evaluation, scalars
from electra_wrap.progress import ProgressBar
from electra_wrap.run import Run
from electra_wrap.upstream.hparams import hparams

#: Steps after the warm-up by which the loss must have fallen.
PATIENCE = 1000

#: Seconds between two measurements of the GPUs' power.
POWER_INTERVAL = 10.0

#: What a training has cost so far, over all its attempts.
COSTS = ("cost/hours", "cost/kilowatt_hours")


class TrainingMonitor:
    """A context manager that takes the events of a training.

    `devices` are the GPUs in use. `loss` is the last total loss, NaN before the first.
    """

    def __init__(self, run: Run, start_step: int, devices: Sequence[str]) -> None:
        self._run, self._start_step, self._devices = run, start_step, devices
        self._examples = run.results(run.examples_record)["examples"]
        # The loss of networks that guess: the generator among all tokens; the discriminator,
        # whose loss has a weight of 50, between two answers.
        self._untrained_loss = math.log(run.vocab_size) + 50 * math.log(2)
        self.loss, self._lowest_loss = math.nan, math.inf
        self._costs = total_costs(run)  # an attempt that was killed cost something, too
        self._last_step: Step | None = None

    def __enter__(self) -> TrainingMonitor:
        profile, start = self._run.profile, self._start_step
        with contextlib.ExitStack() as stack:
            self._bar = stack.enter_context(
                ProgressBar("train", profile.train.steps, "steps", done=start)
            )
            self._writer = stack.enter_context(
                scalars.Writer(self._run.model_dir / "train", start=start + 1)
            )
            self._stack = stack.pop_all()
        self._writer.write_table(start, "hparams", hparams(profile, self._run.vocab_size))
        self._writer.write_table(start, "profile", profile.flat())
        self._started = self._power_measured = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, event: Event) -> None:
        """Take an event. StageFailed if the training does not learn."""
        if isinstance(event, Evaluation):
            evaluation.record(self._run, self._run.profile.engine, event)
            self._last_step = None  # the time of an evaluation does not count as that of a step
        elif isinstance(event, Step):
            self.loss = event.scalars["loss/total"]
            self._lowest_loss = min(self._lowest_loss, self.loss)
            self._bar.update(event.step, f"loss {self.loss:.4f}")
            measured = self._measure_cost() | event.scalars | self._measure_speed(event)
            self._writer.write_scalars(event.step, measured)
            self._check_loss(event.step)

    def _check_loss(self, step: int) -> None:
        keys = self._run.profile.train
        if self._start_step or step < keys.warmup_steps + PATIENCE:
            return
        if self._lowest_loss > 0.95 * self._untrained_loss:
            raise StageFailed(
                f"the model does not learn: at step {step:,} the loss is {self.loss:.2f}, and "
                f"{self._untrained_loss:.2f} before training; check the text and "
                f"train.learning_rate = {keys.learning_rate}, and train again with "
                "--set model_name=NAME"
            )

    def _measure_speed(self, event: Step) -> dict[str, float]:
        """Return progress and speed, by the trainer's clock: its output may be read late."""
        profile, last = self._run.profile, self._last_step
        sequences = event.step * profile.train.batch_size
        values = {"progress/examples": sequences, "progress/epochs": sequences / self._examples}
        if last:
            speed = (event.step - last.step) / max(event.clock - last.clock, 1e-9)
            sequence_speed = speed * profile.train.batch_size
            values["speed/steps_per_second"] = speed
            values["speed/sequences_per_second"] = sequence_speed
            values["speed/tokens_per_second"] = sequence_speed * profile.model.max_seq_length
        self._last_step = event
        return values

    def _measure_cost(self) -> dict[str, float]:
        now = time.monotonic()
        values = {"cost/hours": self._costs["cost/hours"] + (now - self._started) / 3600}
        seconds = now - self._power_measured
        if self._devices and seconds > POWER_INTERVAL and (usage := gpu_usage()):
            self._power_measured = now
            self._costs["cost/kilowatt_hours"] += usage["cost/watts"] * seconds / 3.6e6
            values |= usage
            values["cost/kilowatt_hours"] = self._costs["cost/kilowatt_hours"]
        return values


def total_costs(run: Run) -> dict[str, float]:
    """Return the hours and kilowatt-hours of all attempts to train the model."""
    logged = scalars.read(run.model_dir / "train", replaced=True)
    return {tag: max((value for _, value in logged.get(tag, [])), default=0.0) for tag in COSTS}


def gpu_usage() -> dict[str, float]:
    """Return the power in watts and the memory in GB of all GPUs in use, from nvidia-smi.

    Empty if nvidia-smi does not report them.
    """
    command = ["nvidia-smi", "--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=POWER_INTERVAL
        ).stdout
        rows = [[float(value) for value in line.split(",")] for line in output.splitlines()]
        watts, mebibytes = map(sum, zip(*rows, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {"cost/watts": watts, "memory/gigabytes": mebibytes * 2**20 / 1e9}
