"""The scripts' environment is what the lock says, is made once, and shares nothing with ours.

Most tests install one small package in place of TensorFlow. Those that need TensorFlow with CUDA
are skipped where `vendor --device gpu` has not installed it.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import http.server
import importlib.metadata
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TESTS, tiny
from packaging.requirements import Requirement

from electra_wrap import files, paths, subprocesses
from electra_wrap.errors import EnvironmentProblem, Interrupted
from electra_wrap.pipeline.execute import execute
from electra_wrap.run import Run
from electra_wrap.upstream import engine, environment

#: What the scripts and `engine.devices` import in that environment.
ENTRY_POINTS = "electra_wrap.upstream.tf1", "electra_wrap.upstream.records"
ENTRY_POINTS += ("electra_wrap.upstream.gpus",)


def write_wheel(directory: Path) -> Path:
    """Write a wheel of a package called tensorflow, 8 MB when it is unpacked."""
    path = directory / "tensorflow-2.21.9-py3-none-any.whl"
    info = "tensorflow-2.21.9.dist-info"
    contents = {
        "tensorflow/__init__.py": "",
        "tensorflow/data.bin": "0" * 8_000_000,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tensorflow\nVersion: 2.21.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
            record += f"{name},sha256={digest.decode().rstrip('=')},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty vendor directory, and a lock file with one wheel, which pip gets without network."""
    directory = tmp_path / "vendor"
    wheel = write_wheel(tmp_path)
    lock = tmp_path / "tensorflow.lock"
    lock.write_text(f"tensorflow==2.21.9 --hash=sha256:{files.sha256(wheel)}\n", encoding="utf-8")
    monkeypatch.setattr(environment, "LOCK_FILE", lock)
    monkeypatch.setattr(paths, "vendor_directory", lambda: directory)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return directory


NVIDIA_SMI = "#!/bin/sh\n[ $1 = -L ] && echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command nvidia-smi that lists a GPU."""
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text(NVIDIA_SMI, encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return command


def refusal() -> str:
    """Return the message with which `ensure` fails, leaving no environment behind."""
    with pytest.raises(EnvironmentProblem) as raised:
        environment.ensure()
    assert "\n" not in str(raised.value)
    assert_nothing_is_left()
    return str(raised.value)


def assert_nothing_is_left() -> None:
    names = {path.suffix or path.name for path in paths.vendor_directory().iterdir()}
    assert names == {".lock", ".log"}
    assert environment.python() == sys.executable


def test_run_installs_it_once_for_a_gpu(
    fake_upstream: Path,
    vendor: Path,
    driver: Path,
    make_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.prepare(make_run("train.device=cpu"))
    assert environment.python() == sys.executable
    assert environment.version() == importlib.metadata.version("tensorflow")

    python = environment._python()
    python.parent.mkdir(parents=True)
    python.symlink_to("/nowhere/python3")  # an interpreter that was removed
    (vendor / ".install-killed" / "environment").mkdir(parents=True)
    engine.prepare(make_run("train.device=auto"))
    assert environment.python() == str(python)
    assert environment.version() == engine.versions("train")["tensorflow"] == "2.21.9"
    assert not list(vendor.glob(".install-*"))

    monkeypatch.delenv("PIP_FIND_LINKS")
    assert environment.ensure() == python.parent.parent, "nothing is installed again"
    assert_nothing_of_ours_is_imported(vendor.parent, monkeypatch)


def assert_nothing_of_ours_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pip installed electra_wrap, it is beside other packages."""
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "electra_wrap").symlink_to(paths.PACKAGE)
    (installed / "neighbor.py").touch()
    monkeypatch.setattr(paths, "PACKAGE", installed / "electra_wrap")
    code = "import sys, importlib.util as u, electra_wrap.events, tensorflow as t\n"
    code += "print(sys.prefix, t.__file__, u.find_spec('neighbor'), u.find_spec('torch'))"
    with environment.package_path() as path:
        env = subprocesses.child_environment({"PYTHONPATH": path})
        argv = [environment.python(), "-s", "-c", code]
        output = subprocess.run(argv, env=env, cwd="/", text=True, capture_output=True, check=True)
    prefix, tensorflow, *specs = output.stdout.split()
    directory = environment.ensure()
    assert Path(prefix) == directory and Path(tensorflow).is_relative_to(directory)
    assert specs == ["None", "None"]
    assert not Path(path).exists()


def test_package_with_another_digest_is_refused(vendor: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tensorflow-2.21.9-py3-none-any.whl", "a") as archive:
        archive.writestr("tensorflow/more.py", "")
    message = refusal()
    assert "tensorflow==2.21.9 has another digest than in tensorflow.lock" in message
    assert str(vendor) in message and "Got" in (next(vendor.glob("*.log"))).read_text("utf-8")


def test_package_that_cannot_be_had_is_named(vendor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(vendor))
    assert "No matching distribution found for tensorflow==2.21.9;" in refusal()


def test_full_disk(vendor: Path) -> None:
    """The limit for the size of a file gives an error as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, limits[1]))
    try:
        assert refusal().startswith(os.strerror(27))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_interrupted_download(vendor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives when pip asks a server, which does not answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            self.rfile.read()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    with pytest.raises(Interrupted):
        environment.ensure()
    server.shutdown()
    server.server_close()
    assert_nothing_is_left()


def test_driver_is_asked_for_gpus(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not environment.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    driver.write_text("#!/bin/sh\necho No devices were found\n", encoding="utf-8")
    assert not environment.has_gpu()
    driver.unlink()
    driver.symlink_to("/bin/false")
    assert not environment.has_gpu()


def locked() -> dict[str, str]:
    """Return the versions in vendor/tensorflow.lock."""
    text = environment.LOCK_FILE.read_text("utf-8")
    return dict(re.findall(r"^([\w-]+)==([^\s;]+)", text, re.M))


def imported(module: str, seen: set[str]) -> set[str]:
    """Return what a module of electra_wrap and those that it imports import from elsewhere."""
    seen.add(module)
    names, found = set[str](), set[str]()
    file = paths.PACKAGE.parent / f"{module.replace('.', '/')}.py"
    for node in ast.parse(file.read_text("utf-8")).body if file.is_file() else []:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in names - seen:
        ours = name.startswith("electra_wrap.")
        found |= imported(name, seen) if ours else {name.partition(".")[0]}
    return found


def test_lock_has_what_the_scripts_import() -> None:
    seen: set[str] = set()
    modules = set().union(*(imported(module, seen) for module in ENTRY_POINTS))
    modules -= {*sys.stdlib_module_names, "electra_wrap"}
    assert {"tensorflow", "numpy", "pydantic", "google_crc32c"} <= modules
    distributions = importlib.metadata.packages_distributions()
    for module in modules:
        assert any(name.replace("_", "-") in locked() for name in distributions[module]), module
    assert not {"torch", "transformers"} & locked().keys()


def test_lock_has_a_tensorflow_that_the_package_allows() -> None:
    for text in importlib.metadata.requires("electra-wrap") or []:
        requirement = Requirement(text)
        if requirement.name == "tensorflow":
            assert requirement.specifier.contains(locked()["tensorflow"])
            break
    else:
        pytest.fail("the package does not require tensorflow")


def cuda_versions(python: str, framework: str) -> subprocess.CompletedProcess[str]:
    argv = [python, "-s", str(TESTS / "cuda_versions.py"), framework]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_cuda_libraries_of_our_environment() -> None:
    """PyTorch gets its own; TensorFlow would get PyTorch's, of another CUDA."""
    if "nvidia-cudnn-cu13" not in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("PyTorch is installed without CUDA 13")
    ours = cuda_versions(sys.executable, "torch")
    assert ours.returncode == 0 and ours.stdout.count("is for CUDA 13") == 2, ours.stdout
    mixed = cuda_versions(sys.executable, "tensorflow")
    assert mixed.returncode == 1 and mixed.stdout.count("is for CUDA 13") == 2, mixed.stdout


@pytest.fixture
def tensorflow_with_cuda() -> str:
    """The interpreter of the environment with TensorFlow and CUDA."""
    if environment.python() == sys.executable:
        pytest.skip("TensorFlow with CUDA is not installed; `vendor --device gpu` installs 7 GB")
    return environment.python()


def test_cuda_libraries_of_tensorflow(tensorflow_with_cuda: str) -> None:
    done = cuda_versions(tensorflow_with_cuda, "tensorflow")
    assert done.returncode == 0 and done.stdout.count("is for CUDA 12") == 2, done.stdout


def test_size_is_as_announced(tensorflow_with_cuda: str) -> None:
    directory = Path(tensorflow_with_cuda).parent.parent
    size = sum(path.lstat().st_size for path in directory.rglob("*"))
    assert size == pytest.approx(environment.INSTALLED, rel=0.1)


def test_modules_import_there(tensorflow_with_cuda: str) -> None:
    with environment.package_path() as path:
        env = subprocesses.child_environment({"PYTHONPATH": path})
        argv = [tensorflow_with_cuda, "-s", "-c", f"import {', '.join(ENTRY_POINTS)}"]
        subprocess.run(argv, env=env, cwd="/", check=True)
    assert isinstance(engine.devices(), list)


@pytest.mark.slow
@pytest.mark.upstream
def test_losses_are_those_of_our_tensorflow(
    tensorflow_with_cuda: str,
    upstream: Path,
    corpus_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scalars = []
    for python in (tensorflow_with_cuda, sys.executable):
        monkeypatch.setattr(environment, "python", lambda python=python: python)
        run = Run(tiny(corpus_text), tmp_path / str(len(scalars)))
        execute(run, until="train")
        output = run.log_file("train").read_text("utf-8")
        assert f"$ {python} " in output
        found = [
            json.loads(line)["scalars"]
            for line in re.findall(r'^\{"event": "step".*', output, re.M)
        ]
        scalars.append([{**values, "memory/gigabytes": 0} for values in found])
    assert len(scalars[0]) == 4 and scalars[0] == scalars[1]
