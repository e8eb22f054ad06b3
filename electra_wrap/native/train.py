"""Training, in one process or several: `python -m electra_wrap.native.train RUN_DIR`.

On one machine, `run` starts it, with a process for each GPU. On several machines, start `torchrun …
-m electra_wrap.native.train RUN_DIR` on each, in a run directory that all of them see.
"""

import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_wrap import subprocesses

if __name__ == "__main__":
    subprocesses.die_with_parent()  # before imports that take seconds

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from electra_wrap import events
from electra_wrap.data import vocab
from electra_wrap.errors import UsageError, diverged
from electra_wrap.native import engine, model, setup
from electra_wrap.native.batches import Batches
from electra_wrap.native.evaluate import Accumulator, evaluate
from electra_wrap.native.examples import Store
from electra_wrap.native.saving import Saver
from electra_wrap.profile import Train
from electra_wrap.run import Run

#: Processes that prepare batches for a GPU. A CPU has no time to spare for them.
WORKERS = 2

#: Largest norm of the gradients, as upstream clips them.
MAX_GRADIENT_NORM = 1.0


def train(directory: Path) -> bool:
    """Train the run's model from its latest checkpoint to the last step.

    Return False if a signal ended the training before. Every `log_every` steps, the scalars of that
    step's batch are reported, and every `evaluate_every` steps and after the last, an evaluation.
    """
    run = Run.open(directory)
    settings, tokens = run.profile.train, vocab.read(run.vocabulary)
    run.make_model_dir()
    stop = StopRequest()
    accelerator = setup.make_accelerator(settings)
    parts = _count_parts(settings, accelerator.num_processes)
    set_seed(settings.seed)
    network = setup.make_network(run.profile, run.vocab_size)
    set_seed(settings.seed, device_specific=True)  # dropout differs between processes
    setup.compile_network(network, settings, accelerator)
    prepared, adam = accelerator.prepare(network, model.optimizer(network, settings.weight_decay))
    with Saver(accelerator, network, adam, run.model_dir) as saver:
        start = saver.resume(run.initial)
        _report_setup(accelerator, settings)
        if not start and run.initial.is_dir():
            evaluate(run, tokens, accelerator, network, start)  # the weights that it starts from
        batches = _batches(run, tokens, accelerator, start)
        parameters = list(network.parameters())
        evaluate_every = settings.evaluate_every or settings.steps
        prepared.train()
        for step in range(start + 1, settings.steps + 1):
            for group in adam.param_groups:
                group["lr"] = model.learning_rate(step - 1, settings)
            accumulator = Accumulator(accelerator) if step % settings.log_every == 0 else None
            for _ in range(settings.micro_batches):
                batch = setup.to_device(next(batches), accelerator.device)
                with accelerator.accumulate(prepared):
                    outputs = prepared(batch)
                    # The losses of the parts add up to the batch's; DDP and accelerate take means.
                    accelerator.backward(outputs["loss"] * parts)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                    adam.step()
                    adam.zero_grad()
                if accumulator:
                    accumulator.add(batch, outputs)
            if accumulator:
                _report(accelerator, accumulator, step, adam, norm.item())
            stopping = stop.is_requested(accelerator, step)
            evaluating = step % evaluate_every == 0 or step == settings.steps
            if step % settings.save_every == 0 or evaluating or stopping:
                # Gradients that are not finite have made weights that are not finite either.
                _check_finite(step, outputs["loss"].item(), norm.item())
                saver.save(step, settings)
            if stopping or evaluating:
                saver.wait()
            if stopping:
                return False
            if evaluating:
                evaluate(run, tokens, accelerator, network, step)
        saver.wait()
    return True


def _report_setup(accelerator: Accelerator, settings: Train) -> None:
    """Report what this training runs on."""
    if accelerator.is_main_process:
        gpu = accelerator.device.type == "cuda"
        name = torch.cuda.get_device_name() if gpu else "CPU"
        values = {
            "device": f"{accelerator.num_processes} × {name}",
            "precision": engine.precision(settings.precision, [name] if gpu else []),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }
        events.emit(events.Setup(values))


def _count_parts(settings: Train, processes: int) -> int:
    """Return the number of parts of a batch: micro-batches of all processes.

    UsageError if the batch cannot be divided into so many.
    """
    parts = processes * settings.micro_batches
    if settings.batch_size % parts:
        size = f"train.batch_size = {settings.batch_size}"
        divisor = f"{processes} processes × {settings.micro_batches} micro-batches"
        raise UsageError(f"{size} is not divisible by {divisor}; change one of them")
    return parts


def _batches(
    run: Run, tokens: list[str], accelerator: Accelerator, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over this process's micro-batches of the steps after `start`."""
    settings = run.profile.train
    batches = Batches(
        Store(run.examples[0]),
        run.profile.model,
        tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        micro_batches=settings.micro_batches,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
    )
    gpu = accelerator.device.type == "cuda"
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start * settings.micro_batches, settings.steps * settings.micro_batches),
        collate_fn=lambda batch: batch,  # a tensor costs a file descriptor on its way here
        # The loader draws from its generator. The global one must stay as dropout left it.
        generator=torch.Generator(),
        num_workers=WORKERS if gpu else 0,
        prefetch_factor=8 if gpu else None,
        worker_init_fn=_ignore_signals,
    )
    return iter(loader)


def _ignore_signals(worker: int) -> None:
    """Leave signals to the trainer, which still needs batches from this worker, and end with it."""
    subprocesses.die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _report(
    accelerator: Accelerator, accumulator: Accumulator, step: int, adam: Any, norm: float
) -> None:
    """Report the scalars of a step. StageFailed if the loss is not finite."""
    losses, scalars = accumulator.reduce()
    del scalars["generator/sampled_accuracy"]  # upstream computes it only when it evaluates
    scalars |= losses
    scalars["train/learning_rate"] = adam.param_groups[0]["lr"]
    scalars["train/gradient_norm"] = norm
    scalars["memory/gigabytes"] = _peak_memory(accelerator.device)
    if accelerator.is_main_process:
        events.emit(events.Step(step, time.monotonic(), scalars))
    _check_finite(step, losses["loss/total"], norm)


def _check_finite(step: int, loss: float, gradient_norm: float) -> None:
    if not math.isfinite(loss + gradient_norm):
        raise diverged(step, loss)


def _peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has used, in GB: on the GPU, or its own on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved()) / 1e9  # with the pool of CUDA graphs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class StopRequest:
    """Records SIGINT and SIGTERM. All processes have to stop after the same step."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._received = True

    def is_requested(self, accelerator: Accelerator, step: int) -> bool:
        """Return whether to stop after this step.

        Several processes ask each other every tenth step only, because that makes a GPU wait.
        """
        if accelerator.num_processes == 1:
            return self._received
        if step % 10:
            return False
        if self._received:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())


if __name__ == "__main__":
    with setup.report_errors():
        finished = train(Path(sys.argv[1]))
    sys.exit(0 if finished else subprocesses.INTERRUPTED)
