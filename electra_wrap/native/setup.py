"""What training and evaluation start from: devices, networks, weights and batches."""

import contextlib
import datetime
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from electra_wrap import subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.errors import EnvironmentProblem, UsageError
from electra_wrap.native import engine, model
from electra_wrap.profile import Profile, Train

#: How long processes wait for each other. The first one writes checkpoints, which takes minutes for
#: a large model on a slow network file system.
TIMEOUT = datetime.timedelta(hours=2)


def make_accelerator(settings: Train) -> Accelerator:
    """Return the accelerator for the profile's device and precision.

    EnvironmentProblem if the profile requires a GPU and there is none.
    """
    # It warns of the embeddings that the two networks share.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    gpu = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "gpu" and not gpu:
        raise EnvironmentProblem('train.device = "gpu", but PyTorch sees none; see `doctor`')
    precision = engine.precision(settings.precision, ["cuda"] if gpu else [])
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return Accelerator(
        cpu=not gpu,
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        gradient_accumulation_steps=settings.micro_batches,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # they are constants
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
    )


def make_network(profile: Profile, vocab_size: int) -> model.Electra:
    """Return both networks with initial weights."""
    return model.Electra({network: profile.hf_config(network, vocab_size) for network in NETWORKS})


@torch.no_grad()
def load(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file to `targets`. UsageError unless it has exactly these."""
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read ({error}); move its directory away") from None
    if {n: t.shape for n, t in values.items()} != {n: t.shape for n, t in targets.items()}:
        raise UsageError(f"{path} has other tensors than this model; move its directory away")
    for name, target in targets.items():
        target.copy_(values[name])


def compile_network(network: model.Electra, settings: Train, accelerator: Accelerator) -> None:
    """Compile the networks into one graph, if the profile and the machine allow it."""
    gpu = accelerator.device.type == "cuda"
    problem = engine.find_compiler_problem() if settings.compile == "auto" and gpu else None
    if problem:
        print(f"warning: training is not compiled: {problem}")
    if settings.compile is True or (settings.compile == "auto" and gpu and not problem):
        # With CUDA graphs, because launching a small model's kernels takes longer than they do.
        # Gradients that are summed over micro-batches must not live in a graph's memory. Under DDP,
        # graphs have open defects (pytorch issues 113809 and 128218).
        graphs = gpu and settings.micro_batches == 1 and accelerator.num_processes == 1
        mode = "reduce-overhead" if graphs else "default"
        network.compile(mode=mode, fullgraph=True, dynamic=False)


def list_gpus() -> list[str]:
    """Return the names of the GPUs."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def to_device(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy a batch to the device, without waiting for it."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    if device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Report an exception to the parent process, also that the GPU's memory is too small."""
    with subprocesses.report_errors():
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(".")[0]
            raise EnvironmentProblem(
                f"the GPU's memory is too small ({reason}); raise train.micro_batches"
            ) from None
