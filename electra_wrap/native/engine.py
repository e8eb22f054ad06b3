"""The native engine: what stages.py asks of an engine, done in PyTorch. Nothing here imports it; train.py does."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_wrap import metrics, process, vocab
from electra_wrap.errors import UsageError
from electra_wrap.native import checkpoints, examples
from electra_wrap.profile import NETWORKS
from electra_wrap.rundir import write_json

if TYPE_CHECKING:
    from electra_wrap.stages import Run

DATA, OUTPUTS = "examples", ("examples", "heldout_examples")
PACKAGES = {
    DATA: ("tokenizers", "numpy"),
    "train": ("torch", "transformers", "accelerate"),
    "convert": ("torch", "transformers", "safetensors"),
}

GPUS, NO_GPU = "electra_wrap.native.devices", "PyTorch sees none; install the NVIDIA driver and PyTorch's CUDA wheels"

CREDIT = "electra_wrap's native engine, equal to google-research/electra's objective and optimizer"


def versions() -> dict[str, str]:
    return {}


def precision(wanted: str, gpus: list[str]) -> str:
    """The precision of products: the profile's, where `auto` is bfloat16 on a GPU."""
    return ("bfloat16" if gpus else "float32") if wanted == "auto" else wanted


def prepare(run: Run) -> None:
    """Nothing has to be fetched."""


steps, sums = checkpoints.steps, checkpoints.sums


def set_aside(run: Run, step: int) -> None:
    """Give a checkpoint a name that is no checkpoint's."""
    run.directory.set_aside(checkpoints.path(run.model_dir, step))


def build(run: Run, text: Path, out: Path, jobs: dict[str, Any], log: Path, on_line: Callable[[str], None]) -> None:
    """Build parts of the examples of `text`, a shard each, under `out`; `jobs` are the keywords of `parts.build`."""
    job = {
        "text": str(text),
        "vocabulary": str(run.vocabulary),
        "rules": run.profile.tokenizer.rules,
        "length": run.profile.model.max_seq_length,
        "documents": run.profile.corpus.blank_lines_separate_documents,
        "seed": run.profile.train.seed,
        "out": str(out),
        "jobs": jobs,
    }
    argv = [sys.executable, "-s", "-m", "electra_wrap.native.examples", json.dumps(job)]
    process.run(argv, cwd=Path("/"), env=process.environment({}), log=log, on_line=on_line)


def bytes_per_token(vocab_size: int) -> float:
    """Bytes that a token takes in the parts, and again in what they are joined to."""
    return 2 * (2 if vocab_size <= 2**16 else 4)


def join(run: Run, text: Path, parts: Sequence[Path], out: Path) -> None:
    """Fill `out` with one store of those of the parts of `text`."""
    examples.join(parts, out)


def take(run: Run, records: Path, out: Path | None) -> int:
    """Read upstream's records that were made elsewhere, into a store if `out` is given; return their number.

    UsageError if they do not fit.
    """
    size, length = len(vocab.read(run.vocabulary)), run.profile.model.max_seq_length
    job = {"directory": str(records), "length": length, "vocab_size": size, "out": out and str(out)}
    return int(process.call("electra_wrap.native.records", job, log=run.log(DATA)))


def train(run: Run, gpus: list[str], on_scalars: Callable[[dict[str, Any]], None]) -> None:
    """Train until the profile's last step, with a process for each GPU or as `run.launch` says.

    `on_scalars` gets what each logged step gave, with its `step`, and each evaluation's metrics, with the step that
    was `evaluated`.
    """
    launcher = [sys.executable, "-s"]
    if run.launch:
        try:
            launcher = shlex.split(run.launch)
        except ValueError as error:
            raise UsageError(f"--launch {run.launch}: {error}; quote it as a shell does") from None
        if not launcher or shutil.which(launcher[0]) is None:
            raise UsageError(f"--launch {run.launch!r}: there is no such command; give one, such as torchrun")
    elif len(gpus) > 1:
        patience = f"--shutdown-timeout={process.GRACE}"  # torchrun's own is 30 s, which a checkpoint may take
        launcher += ["-m", "torch.distributed.run", "--standalone", patience, f"--nproc-per-node={len(gpus)}"]
    argv = [*launcher, "-m", "electra_wrap.native.train", str(run.directory.path)]
    _trainer(argv, run.log("train"), on_scalars)


def evaluate(run: Run, gpus: list[str], step: int, on_scalars: Callable[[dict[str, Any]], None]) -> None:
    """Evaluate a checkpoint on the held-out examples, as `train` does on its way."""
    profile = run.directory / "logs" / "evaluate.profile.json"  # the run's own is what it was trained with
    write_json(profile, run.profile.model_dump())
    argv = [sys.executable, "-s", "-m", "electra_wrap.native.train", str(run.directory.path), str(step), str(profile)]
    _trainer(argv, run.log("evaluate"), on_scalars)


def _trainer(argv: list[str], log: Path, on_scalars: Callable[[dict[str, Any]], None]) -> None:
    process.run(argv, cwd=Path("/"), env=process.environment({}), log=log, on_line=metrics.follow(on_scalars))


def files(model_dir: Path, step: int) -> list[Path]:
    """The files of a checkpoint that have its weights."""
    return sorted(checkpoints.path(model_dir, step).rglob("model.safetensors"))


def export(run: Run, model_dir: Path, step: int, out: Path, *, slots: bool = False) -> dict[str, Any]:
    """Write `out`/discriminator and `out`/generator as transformers loads them; `slots`: with Adam's, for training."""
    size = len(vocab.read(run.vocabulary))
    configs = {network: run.profile.hf_config(network, size) for network in NETWORKS}
    job = {"checkpoint": str(checkpoints.path(model_dir, step)), "configs": configs, "out": str(out)}
    process.call("electra_wrap.native.exchange", {**job, "slots": slots}, log=run.log("convert"))
    for network, config in configs.items():
        write_json(out / network / "config.json", config)
    return {}


def adopt(run: Run, step: int, exported: Path) -> None:
    """Make a checkpoint of what another engine exported with slots, from which `train` goes on."""
    checkpoints.finish(exported, run.model_dir, step)
