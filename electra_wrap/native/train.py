"""Training, as a module of its own process or of several: `python -m electra_wrap.native.train RUN_DIR`.

On one machine `run` starts it, with a process for each GPU. On several machines `torchrun … -m
electra_wrap.native.train RUN_DIR` does, in a run directory that all of them see. With a step and a
profile behind it, that checkpoint is evaluated instead. What it prints are lines of JSON.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from electra_wrap import process

if __name__ == "__main__":
    process.die_with_command()  # before imports that take seconds

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader

from electra_wrap import metrics, vocab
from electra_wrap.errors import EnvironmentLacks, UsageError, diverged
from electra_wrap.native import checkpoints, engine, exchange, model
from electra_wrap.native.batches import Batches, Masking
from electra_wrap.native.examples import Store
from electra_wrap.profile import NETWORKS, Profile, Train

#: The losses of a batch, under TensorBoard's names.
LOSSES = {"loss": "loss/total", "generator": "loss/generator", "discriminator": "loss/discriminator"}

#: Processes beside the trainer that prepare batches for a GPU. A CPU has no time to spare for them.
WORKERS = 2


def train(directory: Path) -> bool:
    """Train the run's model from its latest checkpoint to the last step; return False if a signal ended it before.

    Each `log_every` steps a line with the scalars of that step's whole batch is printed, and each `evaluate_every`
    steps but the last one with the metrics of the held-out text.
    """
    profile = _profile(directory / "profile.json")
    keys, model_dir = profile.train, directory / "models" / profile.model_name
    model_dir.mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    accelerator = _accelerator(profile)
    share = accelerator.num_processes * keys.micro_batches
    if keys.batch_size % share:
        raise UsageError(
            f"train.batch_size = {keys.batch_size} is not divisible by {accelerator.num_processes} processes × "
            f"{keys.micro_batches} micro-batches; change one of them"
        )
    tokens = vocab.read(directory / "vocab.txt")
    set_seed(keys.seed)
    network = model.Electra({name: profile.hf_config(name, len(tokens)) for name in NETWORKS})
    set_seed(keys.seed, device_specific=True)  # dropout differs between processes
    _compile(network, profile, accelerator)
    prepared, adam = accelerator.prepare(network, model.optimizer(network, keys.weight_decay))
    start = _restore(accelerator, network, adam, model_dir)
    batches = _batches(profile, directory, tokens, accelerator, start)
    prepared.train()
    parameters = list(network.parameters())
    for step in range(start + 1, keys.steps + 1):
        for group in adam.param_groups:
            group["lr"] = model.learning_rate(step - 1, keys.learning_rate, keys.steps, keys.warmup_steps)
        parts, tally = [], metrics.Tally()
        for _ in range(keys.micro_batches):
            batch = _to(accelerator.device, next(batches))
            with accelerator.accumulate(prepared):
                found = prepared(batch)
                # Losses are sums over this part; the mean that DDP and accelerate take of the parts is not wanted.
                accelerator.backward(found["loss"] * share)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, 1.0)
                adam.step()
                adam.zero_grad()
            if step % keys.log_every == 0:
                parts.append(torch.stack([found[name].detach() for name in LOSSES]))
                _count(tally, batch, found)
        if parts:
            optimizing = {"train/learning_rate": adam.param_groups[0]["lr"], "train/gradient_norm": norm.item()}
            values = _scalars(accelerator, tally, torch.stack(parts).sum(0))
            del values["generator/sampled_accuracy"]  # which upstream counts when it evaluates
            _report(accelerator, step, {**values, **optimizing, "memory/gigabytes": _memory(accelerator)})
        stopped = stop.asked(accelerator, step)
        evaluated = step % (keys.evaluate_every or keys.steps) == 0 and step < keys.steps
        if step % keys.save_every == 0 or evaluated or step == keys.steps or stopped:
            # A step whose gradients are not finite has made weights that are none either.
            _check(step, found["loss"].item(), norm.item())
            _save(accelerator, model_dir, step, keys)
        if stopped:
            return False
        if evaluated:
            _evaluate(profile, directory, tokens, accelerator, prepared, step)
    return True


def evaluate(directory: Path, step: int, profile: Path) -> bool:
    """Evaluate the checkpoint of a step on the held-out examples: print a line with the metrics, and return True."""
    keys, tokens = _profile(profile), vocab.read(directory / "vocab.txt")
    accelerator = _accelerator(keys)
    network = model.Electra({name: keys.hf_config(name, len(tokens)) for name in NETWORKS})
    exchange.restore(checkpoints.path(directory / "models" / keys.model_name, step), network, None)
    _evaluate(keys, directory, tokens, accelerator, accelerator.prepare(network), step)
    return True


@torch.no_grad()
def _evaluate(
    profile: Profile, directory: Path, tokens: list[str], accelerator: Accelerator, prepared: Any, step: int
) -> None:
    """Evaluate on the held-out examples, with the same masks and samples at each step.

    Each is read once, but for those that do not fill a batch. Processes take batches in turn, so that batches, masks
    and samples do not depend on how many there are.
    """
    store = Store(directory / engine.OUTPUTS[1])
    size = min(profile.train.batch_size // profile.train.micro_batches, len(store))
    number = len(store) // size
    batches = Batches(
        store,
        _masking(profile, tokens),
        length=profile.model.max_seq_length,
        batch_size=size,
        seed=profile.train.seed,
        shuffled=False,
    )
    tally, totals = metrics.Tally(), torch.zeros(len(LOSSES), device=accelerator.device)
    network = getattr(prepared, "module", prepared)  # which DDP wraps
    network.eval()
    for place in range(accelerator.process_index, number, accelerator.num_processes):
        batch = _to(accelerator.device, batches[place])
        found = network(batch)
        totals += torch.stack([found[name] for name in LOSSES])
        _count(tally, batch, found)
    network.train()
    values = _scalars(accelerator, tally, totals / number)
    # As upstream has it: the total is a mean over batches, the other two over masked tokens and over examples.
    values |= {name: tally.values()[name] for name in ("loss/generator", "loss/discriminator")}
    if accelerator.is_main_process:
        print(json.dumps({"evaluated": step, "examples": number * size, **values}), flush=True)


def _count(tally: metrics.Tally, batch: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Add what the networks made of this process's part of a batch."""
    right, sampled, losses, weights, logits, replaced, sizes = (
        value.cpu().numpy()
        for value in (
            *(found[name] for name in ("right", "sampled", "masked_losses")),
            *(batch["weights"], found["logits"], found["replaced"], batch["sizes"]),
        )
    )
    tally.add_generator(right, sampled, losses, weights)
    tally.add_discriminator(logits, replaced, np.arange(logits.shape[1]) < sizes[:, None])


def _scalars(accelerator: Accelerator, tally: metrics.Tally, losses: torch.Tensor) -> dict[str, float]:
    """Add up what the processes counted, in `tally` too; return the metrics, with the batches' losses."""
    if accelerator.num_processes > 1:
        sums = torch.from_numpy(tally.sums).to(accelerator.device)
        tally.sums = accelerator.reduce(sums, "sum").cpu().numpy()
        losses = accelerator.reduce(losses, "sum")
    return {**tally.values(), **dict(zip(LOSSES.values(), losses.tolist(), strict=True))}


def _memory(accelerator: Accelerator) -> float:
    """The most memory that this process has had, in GB: the GPU's, or on a CPU its own."""
    if accelerator.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _profile(path: Path) -> Profile:
    return Profile.model_validate_json(path.read_text(encoding="utf-8"))


def _accelerator(profile: Profile) -> Accelerator:
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it wonders at embeddings that two networks share
    keys = profile.train
    gpu = keys.device != "cpu" and torch.cuda.is_available()
    if keys.device == "gpu" and not gpu:
        raise EnvironmentLacks(f'train.device = "gpu", but {engine.NO_GPU}')
    precision = engine.precision(keys.precision, ["cuda"] if gpu else [])
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        cpu=not gpu,
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        gradient_accumulation_steps=keys.micro_batches,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # they are constants
    )


def _compile(network: model.Electra, profile: Profile, accelerator: Accelerator) -> None:
    """Compile the network in one graph if the profile wants it: the network, not what DDP wraps it in."""
    keys, gpu = profile.train, accelerator.device.type == "cuda"
    compiler = any(map(shutil.which, ("gcc", "clang", "cc")))  # which Triton needs on a GPU's machine, too
    if keys.compile is True or (keys.compile == "auto" and gpu and compiler):
        # CUDA graphs: a small model's kernels take less time than launching them one by one. Gradients that are
        # summed over micro-batches may not live in a graph's memory.
        graphs = gpu and keys.micro_batches == 1
        network.compile(mode="reduce-overhead" if graphs else "default", fullgraph=True, dynamic=False)


def _restore(accelerator: Accelerator, network: model.Electra, adam: Any, model_dir: Path) -> int:
    """Load the latest checkpoint, if there is one; return its step."""
    start = max(checkpoints.steps(model_dir), default=0)
    checkpoint = checkpoints.path(model_dir, start)
    if start and exchange.is_exchanged(checkpoint):
        exchange.load(checkpoint, network, adam.optimizer)
    elif start:
        accelerator.load_state(str(checkpoint))
        accelerator.step = 0  # its count of micro-batches, of which there may have been more or fewer
    return start


def _batches(profile: Profile, directory: Path, tokens: list[str], accelerator: Accelerator, start: int) -> Any:
    """Return an iterator over this process's micro-batches of the steps after `start`."""
    keys, store = profile.train, Store(directory / engine.OUTPUTS[0])
    batches = Batches(
        store,
        _masking(profile, tokens),
        length=profile.model.max_seq_length,
        batch_size=keys.batch_size,
        seed=keys.seed,
        micro_batches=keys.micro_batches,
        processes=accelerator.num_processes,
        process=accelerator.process_index,
    )
    numbers = range(start * keys.micro_batches, keys.steps * keys.micro_batches)
    gpu = accelerator.device.type == "cuda"
    more = {"num_workers": WORKERS, "prefetch_factor": 8, "worker_init_fn": _ignore_signals} if gpu else {}
    # Arrays, because a tensor costs a file descriptor on its way from a worker. And a generator of the loader's own,
    # because it takes a number of the global one, which dropout needs undisturbed.
    return iter(
        DataLoader(batches, None, sampler=numbers, collate_fn=lambda batch: batch, generator=torch.Generator(), **more)
    )


def _masking(profile: Profile, tokens: list[str]) -> Masking:
    ids = {token: number for number, token in enumerate(tokens)}
    return Masking(profile.model.mask_prob, ids["[MASK]"], (ids["[SEP]"], ids["[CLS]"]))


def _to(device: torch.device, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Put a batch on the device, without waiting for it."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    if device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}


def _ignore_signals(worker: int) -> None:
    """A signal is for the trainer, whose last batches still come from here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _report(accelerator: Accelerator, step: int, values: dict[str, float]) -> None:
    """Print what a step gave. StageFailed if the loss is not finite."""
    if accelerator.is_main_process:
        print(json.dumps({"step": step, "clock": time.monotonic(), **values}), flush=True)
    _check(step, values["loss/total"], values["train/gradient_norm"])


def _check(step: int, loss: float, gradient_norm: float) -> None:
    if not math.isfinite(loss + gradient_norm):
        raise diverged(step, loss)


class _Stop:
    """Notes SIGINT and SIGTERM; every process has to hear of it before the same step ends."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._received = True

    def asked(self, accelerator: Accelerator, step: int) -> bool:
        """Return whether to stop after this step: at once, but several processes ask each other every tenth step only.

        (Asking makes a GPU wait.)
        """
        if accelerator.num_processes == 1:
            return self._received
        if step % 10:
            return False
        if self._received:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())


def _save(accelerator: Accelerator, model_dir: Path, step: int, keys: Train) -> None:
    """Save a checkpoint and remove those beyond the `keep` latest (0: keep all).

    The last one that was evaluated stays: the command may not have had the time yet to keep it as the best.
    """
    partial = model_dir / f"step-{step}.partial"
    if accelerator.is_main_process:
        partial.mkdir()  # an error if the model's directory is gone, with what it was mounted on, say
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoints.finish(partial, model_dir, step)
        evaluated = step - step % keys.evaluate_every if keys.evaluate_every else None
        for old in checkpoints.steps(model_dir)[: -keys.keep if keys.keep else 0]:
            if old != evaluated:
                shutil.rmtree(checkpoints.path(model_dir, old))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with process.telling():
        try:
            run_dir, *evaluated = sys.argv[1:]
            if evaluated:
                step, profile = evaluated
                done = evaluate(Path(run_dir), int(step), Path(profile))
            else:
                done = train(Path(run_dir))
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(".")[0]
            raise EnvironmentLacks(f"the GPU's memory is too small ({reason}); raise train.micro_batches") from None
    sys.exit(0 if done else process.INTERRUPTED)
