"""The scripts' environment is what the lock says, is made once, and shares nothing with ours.

Most tests install one small package in place of TensorFlow. The last is skipped where `vendor
--device gpu` has not installed TensorFlow with CUDA.
"""

import importlib.metadata
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TESTS, python, tiny

from electra_wrap import files, paths
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.pipeline import execute
from electra_wrap.run import Run
from electra_wrap.upstream import engine, environment


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vendor directory, and a lock file with one wheel, which pip gets without network."""
    wheel, lock = tmp_path / "tensorflow-2.21.9-py3-none-any.whl", tmp_path / "tensorflow.lock"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        metadata = "Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.21.9\n"
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, content in (("METADATA", metadata), ("WHEEL", tags), ("RECORD", "")):
            archive.writestr(f"tensorflow-2.21.9.dist-info/{name}", content)
        archive.writestr("tensorflow/__init__.py", "")
        archive.writestr("tensorflow/data.bin", "0" * 8_000_000)
    lock.write_text(f"tensorflow==2.21.9 --hash=sha256:{files.sha256(wheel)}\n", encoding="utf-8")
    monkeypatch.setattr(environment, "LOCK_FILE", lock)
    monkeypatch.setattr(paths, "vendor_directory", lambda: tmp_path / "vendor")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "vendor"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command nvidia-smi that lists a GPU."""
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: NVIDIA H100 80GB'\n", "utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return command


@pytest.mark.usefixtures("fake_upstream", "driver")
def test_environment_is_installed_once_for_a_gpu_and_scripts_see_nothing_else(
    vendor: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.prepare(make_run("train.device=cpu"))
    theirs = environment._directory() / "bin" / "python"
    assert environment.python() == sys.executable and not theirs.parent.exists()
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to("/nowhere/python3")  # an interpreter that was removed
    (vendor / ".install-killed" / "environment").mkdir(parents=True)
    engine.prepare(run := make_run("train.device=auto"))
    assert environment.python() == str(theirs) and not list(vendor.glob(".install-*"))
    monkeypatch.delenv("PIP_FIND_LINKS")
    environment.ensure()  # installs nothing again
    # Where pip installed electra_wrap, it is beside other packages.
    run.directory.mkdir()
    for name in ("neighbor", "electra_wrap"):
        (run.directory / name).symlink_to(paths.PACKAGE)
    code = "import importlib.util as u, sys, electra_wrap.events, tensorflow\n"
    code += "print(sys.prefix, tensorflow.__file__, u.find_spec('neighbor'), u.find_spec('torch'))"
    (vendor.parent / "script.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(paths, "PACKAGE", run.directory / "electra_wrap")
    monkeypatch.setattr(engine.checkout, "ensure", lambda source: vendor.parent)
    engine._run_script(run, "script.py", [], {}, run.directory / "log", lambda event: None)
    prefix, package, *others = (run.directory / "log").read_text("utf-8").split()[-4:]
    assert Path(prefix) == environment.ensure() and Path(package).is_relative_to(prefix)
    assert others == ["None", "None"]


@pytest.mark.parametrize("problem", ["another digest", "full disk"])
def test_installation_that_fails_leaves_nothing(
    vendor: Path, capfd: pytest.CaptureFixture[str], problem: str
) -> None:
    """The limit for the size of a file gives an error as a full disk does."""
    limits, reason = resource.getrlimit(resource.RLIMIT_FSIZE), "File too large"
    if problem == "another digest":
        reason = "Got  "
        with zipfile.ZipFile(next(vendor.parent.glob("*.whl")), "a") as wheel:
            wheel.writestr("tensorflow/more.py", "")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match="cannot be installed; see pip's message abov"):
            environment.ensure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reason in capfd.readouterr().err
    assert [path.name for path in vendor.iterdir()] == [".lock"]
    assert environment.python() == sys.executable


def test_driver_is_asked_for_gpus(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.has_gpu()
    for hidden, script in (("-1", "echo GPU 0: x"), ("0", "echo No devices"), ("0", "exit 1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        driver.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        assert not environment.has_gpu()


IMPORTS = """
import sys, unittest.mock
before = set(sys.modules)
for name in ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1"):
    sys.modules[name] = unittest.mock.MagicMock()
import electra_wrap.upstream.records, electra_wrap.upstream.tf1
print(*{name.partition(".")[0] for name in sys.modules.keys() - before})
"""


def test_lock_has_what_the_scripts_import() -> None:
    locked = dict(re.findall(r"(?m)^([\w-]+)==([^\s;]+)", environment.LOCK_FILE.read_text("utf-8")))
    modules = python("-c", IMPORTS).stdout.split()
    assert {"tensorflow", "numpy", "pydantic", "google_crc32c"} <= {*modules}
    distributions = importlib.metadata.packages_distributions()
    for module in {*modules} & distributions.keys() - {"electra_wrap"}:
        assert any(name.replace("_", "-") in locked for name in distributions[module]), module
    assert locked["tensorflow"].startswith("2.21.")  # as in pyproject.toml
    assert not {"torch", "transformers"} & locked.keys()


def cuda_of(interpreter: str, framework: str) -> str:
    """Return the CUDA of the libraries that a framework loads, after 0 if it is the right one."""
    script = TESTS.parent / "benchmarks" / "cuda_versions.py"
    argv = [interpreter, "-s", str(script), framework]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    return f"{done.returncode} {re.findall('is for (CUDA [0-9]+)', done.stdout)}"


def test_cuda_libraries_of_our_environment() -> None:
    """PyTorch gets its own; TensorFlow would get PyTorch's, of another CUDA."""
    if "nvidia-cudnn-cu13" not in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("PyTorch is installed without CUDA 13")
    assert cuda_of(sys.executable, "torch") == "0 ['CUDA 13', 'CUDA 13']"
    assert cuda_of(sys.executable, "tensorflow") == "1 ['CUDA 13', 'CUDA 13']"


@pytest.mark.slow
@pytest.mark.upstream
def test_tensorflow_with_cuda_trains_as_ours_does(
    upstream: Path, corpus_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment.python() == sys.executable:
        pytest.skip("TensorFlow with CUDA is not installed; `vendor --device gpu` installs 7 GB")
    assert cuda_of(environment.python(), "tensorflow") == "0 ['CUDA 12', 'CUDA 12']"
    losses = []
    for interpreter in (environment.python(), sys.executable):
        monkeypatch.setattr(environment, "python", lambda interpreter=interpreter: interpreter)
        run = Run(tiny(corpus_text), tmp_path / str(len(losses)))
        execute(run, until="train")
        output = run.log_file("train").read_text("utf-8")
        assert f"$ {interpreter} " in output
        losses.append(re.findall(r'"loss/total": [\d.]+', output))
    assert len(losses[0]) == 4 and losses[0] == losses[1]
