"""The environment in which the scripts run on a GPU: TensorFlow with its CUDA libraries.

TensorFlow's CUDA packages and PyTorch's overwrite each other's files, so these are installed apart.
vendor/tensorflow.lock names each package with its version and digests, which pip verifies. Where
the environment was not made, the scripts run with the TensorFlow beside electra_wrap.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from electra_wrap import files, paths
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.progress import log

LOCK_FILE = paths.LOCK_FILE.with_name("tensorflow.lock")

#: Size of the packages, and of their files when they are installed, in GB.
DOWNLOADED, INSTALLED = 3.5, 6.6


def _directory() -> Path:
    """Return the environment's directory, whether it exists or not."""
    return paths.vendor_directory() / f"tensorflow-{files.sha256(LOCK_FILE)[:12]}"


def python() -> str:
    """Return the interpreter for the scripts: the environment's if there is one, else ours."""
    found = _directory() / "bin" / "python"
    return str(found) if found.exists() else sys.executable


def list_gpus() -> list[str]:
    """Return the names of the GPUs that this TensorFlow sees."""
    code = (
        "import tensorflow as tf\n"
        "for gpu in tf.config.list_physical_devices('GPU'):\n"
        "    details = tf.config.experimental.get_device_details(gpu)\n"
        "    print('GPU', details.get('device_name', gpu.name))"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [python(), "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        raise EnvironmentProblem(f"TensorFlow does not start ({reason}); install it again")
    return [line[4:] for line in done.stdout.splitlines() if line.startswith("GPU ")]


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

    EnvironmentProblem if pip fails, which says why; then there is no environment.
    """
    directory = _directory()
    if python() == sys.executable:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(directory.parent / ".lock", wait=True):
            if python() == sys.executable:
                _install(directory)
    return directory


def _install(directory: Path) -> None:
    """Install in a temporary directory, then rename it: `bin/python` finds its packages there."""
    needed = f"downloads {DOWNLOADED} GB, needs {DOWNLOADED + INSTALLED:.0f} GB of disk"
    log(f"installs TensorFlow with CUDA in {directory}: {needed}")
    for abandoned in directory.parent.glob(".install-*"):  # by a process that was killed
        shutil.rmtree(abandoned)
    files.remove(directory)  # its interpreter is gone
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".install-") as temporary:
        work = Path(temporary, "environment")
        pip = [str(work / "bin" / "python"), "-I", "-m", "pip", "install", "--require-hashes"]
        pip += ["--only-binary=:all:", "--no-input", f"--requirement={LOCK_FILE}"]
        try:
            subprocess.run([sys.executable, "-I", "-m", "venv", str(work)], check=True)
            # pip's own configuration applies: index, proxy, cache.
            environment = {**os.environ, "TMPDIR": temporary}
            subprocess.run(pip, env=environment, stdout=sys.stderr, check=True)
        except subprocess.CalledProcessError:
            raise EnvironmentProblem(
                "TensorFlow with CUDA cannot be installed; see pip's message above, or do without "
                "it: --set engine=native"
            ) from None
        os.sync()
        work.rename(directory)
