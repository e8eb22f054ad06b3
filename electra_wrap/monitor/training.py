"""Monitoring a training: progress, TensorBoard scalars, hours, and whether it learns."""

from __future__ import annotations

import contextlib
import math
import time

from electra_wrap.errors import StageFailed
from electra_wrap.events import Evaluation, Event, Step
from electra_wrap.monitor import evaluation, scalars
from electra_wrap.progress import ProgressBar
from electra_wrap.run import Run
from electra_wrap.upstream.hparams import hparams

#: Steps after the warm-up by which the loss must have fallen.
PATIENCE = 1000


class TrainingMonitor:
    """A context manager that takes the events of a training.

    `loss` is the last total loss, NaN before the first.
    """

    def __init__(self, run: Run, start_step: int) -> None:
        self._run, self._start_step = run, start_step
        self._examples = run.results(run.examples_record)["examples"]
        # The loss of networks that guess: the generator among all tokens; the discriminator,
        # whose loss has a weight of 50, between two answers.
        self._untrained_loss = math.log(run.vocab_size) + 50 * math.log(2)
        self.loss, self._lowest_loss = math.nan, math.inf
        self._earlier_hours = total_hours(run)
        self._last_step: Step | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> TrainingMonitor:
        profile, start = self._run.profile, self._start_step
        writer = scalars.Writer(self._run.model_dir / "train", start=start + 1)
        bar = ProgressBar("train", profile.train.steps, "steps", done=start)
        self._writer = self._stack.enter_context(writer)
        self._bar = self._stack.enter_context(bar)
        self._writer.write_table(start, "hparams", hparams(profile, self._run.vocab_size))
        self._writer.write_table(start, "profile", profile.flat())
        self._started = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, event: Event) -> None:
        """Take an event. StageFailed if the training does not learn."""
        if isinstance(event, Evaluation):
            evaluation.record(self._run, self._run.profile.engine, event)
            self._run.last_evaluation = event
            self._last_step = None  # the time of an evaluation does not count as that of a step
        elif isinstance(event, Step):
            self.loss = event.scalars["loss/total"]
            self._lowest_loss = min(self._lowest_loss, self.loss)
            self._bar.update(event.step, f"loss {self.loss:.4f}")
            self._writer.write_scalars(event.step, event.scalars | self._measure(event))
            self._check_loss(event.step)

    def _check_loss(self, step: int) -> None:
        keys = self._run.profile.train
        if self._start_step or step < keys.warmup_steps + PATIENCE:
            return
        if self._lowest_loss > 0.95 * self._untrained_loss:
            raise StageFailed(
                f"the model does not learn: at step {step:,} the loss is {self.loss:.2f}, and "
                f"{self._untrained_loss:.2f} before training; check the text and "
                f"train.learning_rate = {keys.learning_rate}, or set another model_name"
            )

    def _measure(self, event: Step) -> dict[str, float]:
        """Return hours, progress, and speed by the trainer's clock: its output may be read late."""
        profile, last = self._run.profile, self._last_step
        sequences = event.step * profile.train.batch_size
        values = {
            "cost/hours": self._earlier_hours + (time.monotonic() - self._started) / 3600,
            "progress/examples": sequences,
            "progress/epochs": sequences / self._examples,
        }
        if last:
            speed = (event.step - last.step) / max(event.clock - last.clock, 1e-9)
            sequence_speed = speed * profile.train.batch_size
            values["speed/steps_per_second"] = speed
            values["speed/sequences_per_second"] = sequence_speed
            values["speed/tokens_per_second"] = sequence_speed * profile.model.max_seq_length
        self._last_step = event
        return values


def total_hours(run: Run) -> float:
    """Return the hours of all attempts to train the model, including those that were killed."""
    logged = scalars.read(run.model_dir / "train", replaced=True)
    return max((hours for _, hours in logged.get("cost/hours", [])), default=0.0)
