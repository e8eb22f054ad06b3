"""What is known of a model in training: what its engine tells, speed, cost, and how it does on held-out text."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_wrap import corpus, scalars, vocab
from electra_wrap.errors import StageFailed, UsageError
from electra_wrap.progress import Meter, say
from electra_wrap.rundir import link, partial, remove, whole, write_sums

if TYPE_CHECKING:
    from electra_wrap.stages import Run

#: Steps after the warm-up by which the loss must have moved.
PATIENCE = 1000

#: Seconds between two looks at the GPUs' power.
POWER_EVERY = 10.0

#: Share of the held-out text that may be in lines which training has too. (Short ones come again and again.)
MOST_SEEN = 0.5

#: The directory of a checkpoint that is kept because it is the best.
_BEST = re.compile(r"best-(\d+)")

#: By what the best checkpoint is the best: the lowest of this on held-out text.
BEST_BY = "loss/total"


class Monitor:
    """Takes what an engine tells of a training: shows it, writes it down, and ends what does not learn."""

    def __init__(self, run: Run, start: int, gpus: list[str]) -> None:
        self._run, self._start, self._gpus = run, start, gpus
        self._examples = run.recorded(run.engine.DATA)["facts"]["examples"]
        # Of networks that guess: the generator among all words, the discriminator, which counts 50 times, between two.
        self._untrained = math.log(len(vocab.read(run.vocabulary))) + 50 * math.log(2)
        self.lowest, self.loss = math.inf, math.nan
        # What earlier attempts cost, those that were killed too.
        before = scalars.read(run.model_dir / "train", void=True)
        self._spent = {tag: max((v for _, _, v in before.get(tag, ())), default=0.0) for tag in COSTS}

    def __enter__(self) -> Monitor:
        keys = self._run.profile.train
        self._meter = Meter("train", keys.steps, "steps", self._start).__enter__()
        self._writer = scalars.Writer(self._run.model_dir / "train", self._start + 1)
        self._writer.text(self._start, "hparams", self._run.hparams())
        self._writer.text(self._start, "profile", self._run.profile.flat())
        self._began = self._measured = self._last = time.monotonic()
        self._step: int | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self._meter.__exit__()
        self._writer.close()

    def __call__(self, told: dict[str, Any]) -> None:
        """Take a line of an engine's: `step` and scalars, or the step that was `evaluated` and its metrics."""
        if "evaluated" in told:
            record(self._run, told)
            self._step = None  # the time of an evaluation is not that of a step
            return
        step, values = told["step"], {name: value for name, value in told.items() if "/" in name}
        self.loss = values["loss/total"]
        self.lowest = min(self.lowest, self.loss)
        self._meter.update(step, f"loss {self.loss:.4f}")
        self._writer.write(step, {**self._cost(), **values, **self._speed(step, told["clock"])})
        keys = self._run.profile.train
        if not self._start and step >= keys.warmup_steps + PATIENCE and self.lowest > 0.95 * self._untrained:
            raise StageFailed(
                f"the loss is {self.loss:.2f} at step {step:,}, as before training ({self._untrained:.2f}): it does "
                f"not move; look at train.learning_rate = {keys.learning_rate} and at the text, and train another "
                "model_name"
            )

    def _speed(self, step: int, now: float) -> dict[str, float]:
        """Speed and progress; `now` is the trainer's clock, because lines may have waited to be read."""
        profile = self._run.profile
        sequences = step * profile.train.batch_size
        values = {"progress/examples": sequences, "progress/epochs": sequences / self._examples}
        if self._step is not None:
            speed = (step - self._step) / max(now - self._last, 1e-9)
            values |= {
                "speed/steps_per_second": speed,
                "speed/sequences_per_second": speed * profile.train.batch_size,
                "speed/tokens_per_second": speed * profile.train.batch_size * profile.model.max_seq_length,
            }
        self._step, self._last = step, now
        return values

    def _cost(self) -> dict[str, float]:
        now = time.monotonic()
        values = {"cost/hours": self._spent["cost/hours"] + (now - self._began) / 3600}
        if self._gpus and now - self._measured > POWER_EVERY and (told := driver()):
            self._spent["cost/kilowatt_hours"] += told["cost/watts"] * (now - self._measured) / 3.6e6
            self._measured = now
            values |= {**told, "cost/kilowatt_hours": self._spent["cost/kilowatt_hours"]}
        return values


#: What a training has cost so far, over all its attempts.
COSTS = ("cost/hours", "cost/kilowatt_hours")


def driver() -> dict[str, float]:
    """What the GPUs' driver tells of them, added up: the power they draw and the memory in use; nothing if it does not.

    Watts and GB, under TensorBoard's names.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            [*command, *([f"--id={visible}"] if visible else [])],
            capture_output=True,
            text=True,
            check=True,
            timeout=POWER_EVERY,
        ).stdout
        rows = [[float(value) for value in line.split(",")] for line in told.splitlines()]
        watts, mebibytes = map(sum, zip(*rows, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {"cost/watts": watts, "memory/gigabytes": mebibytes * 2**20 / 1e9}


def record(run: Run, told: dict[str, Any]) -> None:
    """Write down an evaluation: in the manifest and for TensorBoard. The best checkpoint is kept.

    A kill at any moment leaves a best one: the new one is there before it is known, the former one until then.
    """
    step, metrics = told["evaluated"], {name: value for name, value in told.items() if name != "evaluated"}
    with scalars.Writer(run.model_dir / "eval") as writer:
        writer.write(step, {name: value for name, value in metrics.items() if "/" in name})
    run.model["evaluations"] = {**evaluations(run), str(step): metrics}
    shown = f"loss {metrics[BEST_BY]:.4f}, AUC {metrics['discriminator/auc']:.4f}"
    if is_best := best(run) == step:
        _keep(run, step)
        shown += ", the best so far"
    run.directory.save()
    for other in run.model_dir.glob("best-*") if is_best else ():
        if _BEST.fullmatch(other.name) and other.name != f"best-{step}":
            remove(other)
    say(f"evaluate: step {step:,} on {metrics['examples']:,} held-out examples: {shown}")


def evaluations(run: Run) -> dict[str, dict[str, float]]:
    """The metrics of each step that was evaluated, by its number as text."""
    return dict(run.model.get("evaluations", {}))


def best(run: Run) -> int | None:
    """The step with the lowest held-out loss of those that were evaluated and whose weights are there."""
    found = sorted((values[BEST_BY], int(step)) for step, values in evaluations(run).items())
    return next((step for _, step in found if locate(run, step)), None)


def locate(run: Run, step: int | None) -> tuple[Path, int, Any] | None:
    """Where a step's whole checkpoint is (by default the latest's), its step, and the engine that made it, if any."""
    kept = run.model_dir / f"best-{step}"
    for made_by in run.engines:
        if step is not None and step in made_by.steps(kept) and whole(made_by.sums(kept, step), run.directory.digest):
            return kept, step, made_by
    found = run.checkpoint(step)
    return (run.model_dir, found[0], found[1]) if found else None


def _keep(run: Run, step: int) -> None:
    """Give the files of a checkpoint's weights a second name, under which they outlive it."""
    found = locate(run, step)
    if found and found[0] == run.model_dir:
        directory, _, made_by = found
        with partial(directory / f"best-{step}") as new:
            new.mkdir()
            for file in made_by.files(directory, step):
                target = new / file.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                link(file, target)
            write_sums(made_by.sums(new, step), made_by.files(new, step))


def forget(run: Run, start: int) -> None:
    """Forget what was evaluated after the step from which training goes on: those were other weights."""
    run.model["evaluations"] = {step: found for step, found in evaluations(run).items() if int(step) <= start}
    with scalars.Writer(run.model_dir / "eval", start + 1):
        pass
    for kept in run.model_dir.glob("best-*"):
        if (match := _BEST.fullmatch(kept.name)) and int(match[1]) > start:
            run.directory.set_aside(kept)
    run.directory.save()


def held_out(run: Run, made_by: Any) -> int:
    """Number of an engine's held-out examples, of whose text training sees little; else UsageError."""
    examples = int(run.recorded(made_by.DATA).get("facts", {}).get("held_out_examples", 0))
    if not examples:
        raise UsageError("no text is held out to evaluate on; raise corpus.held_out, or give more documents")
    facts = run.recorded("corpus")["facts"]
    if "held_out_seen_share" not in facts:
        facts["held_out_seen_share"] = corpus.seen_share(run.directory / "corpus", run.directory / "heldout")
        run.directory.save()
    if (seen := facts["held_out_seen_share"]) > MOST_SEEN:
        raise UsageError(
            f"{seen:.0%} of the held-out text are lines that training has too, so that evaluation would say nothing; "
            'set corpus.deduplicate = "lines"'
        )
    return examples


def evaluate(run: Run, step: int, made_by: Any, gpus: list[str]) -> dict[str, float]:
    """Evaluate a checkpoint on the held-out text, write down what came of it, and return that."""
    made_by.evaluate(run, gpus, step, lambda told: record(run, told))
    return evaluations(run)[str(step)]
