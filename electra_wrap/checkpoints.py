"""Checkpoints in a model's directory, whichever engine wrote them.

step-N.sha256 names the files of the checkpoint of step N with their SHA-256. It is written last:
without it, there is no checkpoint.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from electra_wrap import files
from electra_wrap.errors import UsageError
from electra_wrap.progress import warn


def checksums(model_dir: Path, step: int) -> Path:
    """Return the checksum file of a checkpoint, whether it exists or not."""
    return model_dir / f"step-{step}.sha256"


def steps(model_dir: Path) -> list[int]:
    """Return the steps that have a checkpoint, in order."""
    names = (path.stem.removeprefix("step-") for path in model_dir.glob("step-*.sha256"))
    return sorted(int(name) for name in names if name.isdecimal())


def finish(model_dir: Path, step: int, written: Iterable[Path]) -> None:
    """Make files that are in place the checkpoint of `step`."""
    files.write_checksums(checksums(model_dir, step), written)


def latest_intact(model_dir: Path, step: int | None = None) -> int | None:
    """Return the step of the latest intact checkpoint, or `step` if that is intact.

    None if there is none. Reads the files. Damaged checkpoints are renamed, with a warning.
    """
    for candidate in reversed(steps(model_dir) if step is None else [step]):
        digests = files.read_checksums(checksums(model_dir, candidate))
        if digests and all(p.is_file() and files.sha256(p) == d for p, d in digests.items()):
            return candidate
        warn(f"the checkpoint of step {candidate:,} is damaged; its files are renamed to *.old-1")
        name = re.compile(rf"(step|model\.ckpt)-{candidate}(\.(index|data-[\d-]+of-\d+|sha256))?")
        for path in [path for path in model_dir.iterdir() if name.fullmatch(path.name)]:
            files.archive(path)
    return None


def require(model_dir: Path, step: int | None) -> int:
    """Return the step of the latest intact checkpoint, or `step`. UsageError if there is none."""
    if step not in (None, *steps(model_dir)):
        raise UsageError(f"{model_dir} has no checkpoint of step {step:,}; choose another --step")
    found = latest_intact(model_dir, step)
    if found is None:
        raise UsageError(f"{model_dir} has no intact checkpoint; `run` trains the model")
    return found


def find_prefix(checkpoint: str, step: int | None = None) -> str:
    """Return the prefix of a TensorFlow checkpoint, e.g. DIRECTORY/model.ckpt-100.

    `checkpoint` is a prefix, its .index file, or a directory, of which the checkpoint of `step` or
    that of the highest step is chosen. UsageError if there is none.
    """
    prefix: Path | None = Path(checkpoint.removesuffix(".index"))
    if Path(checkpoint).is_dir():
        by_step = {}
        for index in sorted(Path(checkpoint).glob("*.index")):
            number = re.search(r"-(\d+)$", index.stem)
            by_step[int(number[1]) if number else 0] = index.with_suffix("")
        prefix = by_step.get(max(by_step, default=0) if step is None else step)
    if prefix is None or not Path(f"{prefix}.index").is_file():
        of_step = "" if step is None else f" of step {step}"
        problem = f"{checkpoint}: there is no checkpoint{of_step}"
        raise UsageError(f"{problem}; give a directory, or a prefix like model.ckpt-1000")
    return str(prefix)
