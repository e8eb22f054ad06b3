"""The native engine: what the pipeline needs of an engine, in PyTorch.

Children import PyTorch; this module does not.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from electra_wrap import files, packages, subprocesses
from electra_wrap.engine import Checkpoint, OnEvent
from electra_wrap.errors import UsageError
from electra_wrap.native import examples
from electra_wrap.native.checkpoints import (
    CHECKSUMS,
    checkpoint_path,
    checkpoint_steps,
    export_weights,
    finish_checkpoint,
)
from electra_wrap.profile import NETWORKS
from electra_wrap.run import Run

NAME = "native"
CREDIT = "electra_wrap's native engine, equal to google-research/electra's objective and optimizer"
NO_GPU = "PyTorch sees none; install the NVIDIA driver and PyTorch's CUDA wheels"
EXAMPLES = ("examples", "heldout_examples")

#: Devices of the drivers of GPUs: NVIDIA's, Windows's in its Linux, AMD's.
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

#: A CPU that has one of these multiplies bfloat16 faster than float32.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}

#: Has a trainer keep the memory that it frees. The GNU C library would return large blocks to the
#: system, and a tenth of a step on a CPU would go into getting them again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}

_PACKAGES = {
    "examples": ("tokenizers", "numpy"),
    "train": ("torch", "transformers", "accelerate"),
    "convert": ("torch", "transformers", "safetensors"),
}


def versions(stage: str) -> dict[str, str]:
    """Return the versions of the packages behind a stage."""
    return packages.versions(*_PACKAGES[stage])


def devices() -> list[str]:
    """Return the names of the GPUs that PyTorch sees."""
    if not any(map(os.path.exists, GPU_DRIVERS)):
        return []  # PyTorch would take seconds to say so
    return list(subprocesses.call("electra_wrap.native.devices", "list_gpus", {}))


def precision(requested: str, devices: Sequence[str]) -> str:
    """Return the precision of matrix products.

    "auto" is bfloat16 on a GPU and on a CPU with instructions for it, float32 on any other CPU.
    """
    if requested == "auto":
        return "bfloat16" if devices or _cpu_multiplies_bfloat16() else "float32"
    return requested


def _cpu_multiplies_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    except OSError:  # not Linux
        return False
    return not BFLOAT16_FLAGS.isdisjoint(flags)


def find_compiler_problem() -> str | None:
    """Return what Triton lacks to compile for a GPU; None if it can."""
    if not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "there is no C compiler; install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h is missing; install Python's development files, e.g. python3-dev"
    return None


def prepare(run: Run) -> None:
    """Check --launch. Nothing has to be fetched."""
    if run.launch:
        _parse_launch(run.launch)


def _parse_launch(launch: str) -> list[str]:
    """Split a --launch command and find its program, on PATH or beside the running Python."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UsageError(f"--launch {launch!r}: {error}; quote it as in a shell") from None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise UsageError(f"--launch {launch!r}: there is no such command; give another")
    return [str(Path(program).absolute()), *words[1:]]


def build_examples(
    run: Run, text: Path, parts: Path, jobs: dict[str, Any], log: Path, on_event: OnEvent
) -> None:
    """Build one part under `parts` for each shard of `text`; `jobs` go to `parts.build`."""
    job = {"profile": run.profile.model_dump(), "vocabulary": str(run.vocabulary)}
    job |= {"text": str(text), "out": str(parts), "jobs": jobs}
    argv = [sys.executable, "-s", "-m", "electra_wrap.native.examples", json.dumps(job)]
    subprocesses.follow(argv, log=log, on_event=on_event)


def join_examples(run: Run, text: Path, parts: Sequence[Path], out: Path) -> None:
    """Fill the directory `out` with one store of the examples of all parts of `text`."""
    examples.join(parts, out, run.vocab_size)


def import_records(run: Run, records: Path, out: Path) -> int:
    """Write a store of upstream's records to `out`. Return the number of examples.

    UsageError if they do not fit the profile.
    """
    job: dict[str, Any] = {"records": str(records), "out": str(out)}
    job |= {"max_length": run.profile.model.max_seq_length, "vocab_size": run.vocab_size}
    log = run.log_file("examples")
    return int(subprocesses.call("electra_wrap.native.examples", "import_records", job, log=log))


def train(run: Run, devices: Sequence[str], on_event: OnEvent) -> None:
    """Train to the profile's last step, with a process for each GPU, or as --launch says."""
    launcher = [sys.executable, "-s"]
    if run.launch:
        launcher = _parse_launch(run.launch)
    elif len(devices) > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        # Saving a checkpoint may take longer than its default of 30 s.
        launcher.append(f"--shutdown-timeout={subprocesses.GRACE_PERIOD}")
        launcher.append(f"--nproc-per-node={len(devices)}")
    argv = [*launcher, "-m", "electra_wrap.native.train", str(run.directory)]
    log = run.log_file("train")
    subprocesses.follow(argv, log=log, env=KEEP_MEMORY, on_event=on_event)


def evaluate(run: Run, checkpoint: Checkpoint, devices: Sequence[str], on_event: OnEvent) -> None:
    """Evaluate a checkpoint on the held-out examples, as `train` does."""
    argv = [sys.executable, "-s", "-m", "electra_wrap.native.evaluate"]
    argv += [str(run.directory), str(_path(checkpoint))]
    log = run.log_file("evaluate")
    subprocesses.follow(argv, log=log, env=KEEP_MEMORY, on_event=on_event)


def checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the checkpoints in a directory, in the order of their steps."""
    return [Checkpoint(NAME, step, directory) for step in checkpoint_steps(directory)]


def checksums(checkpoint: Checkpoint) -> Path:
    """Return the file with the SHA-256 of each file of a checkpoint."""
    return _path(checkpoint) / CHECKSUMS


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that hold a checkpoint's weights."""
    return sorted(_path(checkpoint).rglob("model.safetensors"))


def archive(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint so that it is no longer discovered."""
    files.archive(_path(checkpoint))


def _path(checkpoint: Checkpoint) -> Path:
    return checkpoint_path(checkpoint.directory, checkpoint.step)


def export(run: Run, checkpoint: Checkpoint, out: Path, *, optimizer: bool = False) -> None:
    """Write `out`/discriminator and `out`/generator for transformers.

    With `optimizer`, Adam's slots are written beside each model.
    """
    configs = {network: run.profile.hf_config(network, run.vocab_size) for network in NETWORKS}
    path = _path(checkpoint)
    if optimizer:
        job = {"checkpoint": str(path), "configs": configs, "out": str(out)}
        subprocesses.call(
            "electra_wrap.native.exchange", "export", job, log=run.log_file("convert")
        )
    else:
        export_weights(path, out)
    for network, config in configs.items():
        files.write_json(out / network / "config.json", config)


def import_checkpoint(run: Run, exported: Path, step: int) -> None:
    """Make a checkpoint from the directory that another engine's `export` wrote."""
    finish_checkpoint(exported, run.model_dir, step)
