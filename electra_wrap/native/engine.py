"""The native engine: what the pipeline needs of an engine, in PyTorch.

Children import PyTorch; this module does not.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import load_file, save_file

from electra_wrap import files, subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.errors import UsageError
from electra_wrap.events import OnEvent
from electra_wrap.native import examples
from electra_wrap.run import Run

#: Devices of the drivers of GPUs: NVIDIA's, Windows's in its Linux, AMD's.
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

#: A CPU that has one of these multiplies bfloat16 faster than float32.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}

#: Has a trainer keep the memory that it frees. The GNU C library would return large blocks to the
#: system, and a tenth of a step on a CPU would go into getting them again.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def devices() -> list[str]:
    """Return the names of the GPUs that PyTorch sees."""
    if not any(map(os.path.exists, GPU_DRIVERS)):
        return []  # PyTorch would take seconds to say so
    return list(subprocesses.call("electra_wrap.native.setup", "list_gpus", {}))


def precision(requested: str, devices: Sequence[str]) -> str:
    """Return the precision of matrix products.

    "auto" is bfloat16 on a GPU and on a CPU with instructions for it, float32 on any other CPU.
    """
    if requested != "auto":
        return requested
    flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    return "bfloat16" if devices or not BFLOAT16_FLAGS.isdisjoint(flags) else "float32"


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
    except ValueError:  # an open quote
        words = []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise UsageError(f"--launch {launch!r}: there is no such command; give another")
    return [str(Path(program).absolute()), *words[1:]]


def build_examples(run: Run, text: Path, out: Path) -> int:
    """Fill the directory `out` with a store of the examples of the shards in `text`."""
    return examples.build_store(run.profile, run.vocabulary, text, out, run.log_file("examples"))


def train(run: Run, devices: Sequence[str], on_event: OnEvent) -> None:
    """Train to the profile's last step, with a process for each GPU, or as --launch says."""
    launcher = [sys.executable]
    if run.launch:
        launcher = _parse_launch(run.launch)
    elif len(devices) > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        # Saving a checkpoint may take longer than its default of 30 s.
        launcher.append("--shutdown-timeout=300")
        launcher.append(f"--nproc-per-node={len(devices)}")
    argv = [*launcher, "-m", "electra_wrap.native.train", str(run.directory)]
    log = run.log_file("train")
    subprocesses.follow(argv, log=log, env=KEEP_MEMORY, on_event=on_event)


def evaluate(run: Run, step: int, devices: Sequence[str], on_event: OnEvent) -> None:
    """Evaluate a checkpoint on the held-out examples, as `train` does."""
    argv = [sys.executable, "-m", "electra_wrap.native.evaluate", str(run.directory), str(step)]
    log = run.log_file("evaluate")
    subprocesses.follow(argv, log=log, env=KEEP_MEMORY, on_event=on_event)


def checkpoint_path(model_dir: Path, step: int) -> Path:
    """Return the directory of a checkpoint."""
    return model_dir / f"step-{step}"


def export(run: Run, step: int, out: Path) -> None:
    """Write `out`/discriminator and `out`/generator for transformers, without PyTorch."""
    tensors = load_file(checkpoint_path(run.model_dir, step) / "model.safetensors")
    for name in NETWORKS:
        # The networks share the embeddings, which the file has once.
        weights = {
            key.partition(".")[2]: tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}.") or ".electra.embeddings." in key
        }
        (out / name).mkdir(parents=True)
        save_file(weights, out / name / "model.safetensors", {"format": "pt"})
        files.write_json(out / name / "config.json", run.profile.hf_config(name, run.vocab_size))
