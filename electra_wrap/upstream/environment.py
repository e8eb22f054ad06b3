"""The environment in which the scripts run on a GPU: TensorFlow with its CUDA libraries.

TensorFlow's CUDA packages and PyTorch's overwrite each other's files, so these are installed apart.
vendor/tensorflow.lock names each package with its version and digests, which pip verifies. Where
the environment was not made, the scripts run with the TensorFlow beside electra_wrap.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from electra_wrap import files, packages, paths, subprocesses
from electra_wrap.errors import EnvironmentProblem, StageFailed
from electra_wrap.progress import ProgressBar, log

LOCK_FILE = paths.LOCK_FILE.with_name("tensorflow.lock")

#: Bytes of the packages, and of their files when they are installed.
DOWNLOADED, INSTALLED = 3_450_000_000, 6_600_000_000

#: Seconds between two looks at how far the installation is.
INTERVAL = 5


def _directory() -> Path:
    """Return the environment's directory, whether it exists or not."""
    return paths.vendor_directory() / f"tensorflow-{files.sha256(LOCK_FILE)[:12]}"


def _python() -> Path:
    return _directory() / "bin" / "python"


def python() -> str:
    """Return the interpreter for the scripts: the environment's if there is one, else ours."""
    return str(_python()) if _python().exists() else sys.executable


def version() -> str:
    """Return the version of the TensorFlow that the scripts import."""
    if not _python().exists():
        return packages.versions("tensorflow")["tensorflow"]
    where = [str(path) for path in _directory().glob("lib/python*/site-packages")]
    return next(iter(importlib.metadata.distributions(name="tensorflow", path=where))).version


@contextlib.contextmanager
def package_path() -> Iterator[str]:
    """Yield a directory for PYTHONPATH that has electra_wrap and nothing else.

    Beside an installed package are the packages of its own environment.
    """
    with tempfile.TemporaryDirectory(prefix="electra_wrap-") as directory:
        Path(directory, "electra_wrap").symlink_to(paths.PACKAGE)
        yield directory


def has_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU, and CUDA_VISIBLE_DEVICES does not hide all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.stdout.startswith(b"GPU ")


def ensure() -> Path:
    """Return the directory of the environment. Install it if it does not exist.

    EnvironmentProblem if a package cannot be fetched or differs from the lock, or the disk is full;
    Interrupted after a signal. Neither leaves an environment.
    """
    directory = _directory()
    if not _python().exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        download, size = DOWNLOADED / 1e9, (DOWNLOADED + INSTALLED) / 1e9
        log(
            f"installs TensorFlow with CUDA in {directory}: downloads {download:.1f} GB, needs "
            f"{size:.1f} GB of disk"
        )
        with files.lock(directory.parent / ".lock", wait=True):
            if not _python().exists():
                _install(directory)
    return directory


def _install(directory: Path) -> None:
    """Install in a temporary directory, then rename it: `bin/python` finds its packages there."""
    vendor = directory.parent
    for abandoned in vendor.glob(".install-*"):  # by a process that was killed
        shutil.rmtree(abandoned)
    files.remove(directory)  # its interpreter is gone
    log_file = vendor / f"{directory.name}.log"
    log_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=vendor, prefix=".install-") as temporary:
        work = Path(temporary, "environment")
        pip = [str(work / "bin" / "python"), "-I", "-m", "pip", "install", "--require-hashes"]
        pip += ["--only-binary=:all:", "--no-input", f"--requirement={LOCK_FILE}"]
        try:
            subprocesses.follow([sys.executable, "-I", "-m", "venv", str(work)], log=log_file)
            # pip's own configuration applies: index, proxy, cache. Its paths may be relative.
            env = {**os.environ, "TMPDIR": temporary}
            with _progress(Path(temporary)):
                subprocesses.follow(pip, cwd=Path(), env=env, log=log_file)
        except StageFailed:
            reason = _reason(log_file.read_text("utf-8", "replace"))
            raise EnvironmentProblem(
                f"TensorFlow with CUDA cannot be installed: {reason}; see {log_file}, or do "
                "without it: --set engine=native"
            ) from None
        os.sync()
        work.rename(directory)


def _reason(output: str) -> str:
    """Return why pip failed, from its output."""
    if changed := re.search(r"DO NOT MATCH THE HASHES.*\n\s+(\S+) from", output):
        return f"{changed[1]} has another digest than in {LOCK_FILE.name}"
    errors = re.findall(r"^ERROR: (.+)", output, re.M)
    return str(errors[-1]) if errors else output.strip().rpartition("\n")[2]


@contextlib.contextmanager
def _progress(directory: Path) -> Iterator[None]:
    """Show how much has been written to a directory, from a thread."""
    finished = threading.Event()

    def show() -> None:
        with ProgressBar("TensorFlow", DOWNLOADED + INSTALLED, "MB") as bar:
            while not finished.wait(INTERVAL):
                with contextlib.suppress(OSError):  # files vanish while they are counted
                    bar.update(sum(path.lstat().st_size for path in directory.rglob("*")))

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
