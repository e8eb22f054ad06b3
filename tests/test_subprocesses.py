"""Child processes: signals, errors, and that they never outlive the command."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from electra_wrap import events, paths, subprocesses
from electra_wrap.errors import StageFailed

COMMAND = """
import sys
from pathlib import Path
from electra_wrap import cli, subprocesses

class Arguments:
    debug = False

    @staticmethod
    def function(arguments):
        subprocesses.follow(
            [sys.executable, "-u", "script.py"],
            cwd=Path.cwd(),
            log=Path("log"),
            on_event=lambda event: print(event.file, flush=True),
        )

cli._main(Arguments)
"""


def start(tmp_path: Path, script: str) -> subprocess.Popen[str]:
    """Start a command that follows `script`. It prints `file` of each Progress event."""
    report = "from electra_wrap.events import Progress, emit\n"
    report += "def report(text): emit(Progress(str(text), 0))\n"
    (tmp_path / "script.py").write_text(report + script, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that can import electra_wrap."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


WAITS = """
import signal, sys, time
def stop(number, frame):
    report("saving")
    if "{stubborn}" == "no":
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
report("ready")
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_lets_the_script_save(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WAITS.format(stubborn="no"))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, error = process.communicate(timeout=20)
    assert (process.returncode, output) == (130, "saving\n")
    assert error.strip() == "electra_wrap: error: interrupted; the same command resumes"


def test_second_signal_kills_the_script(tmp_path: Path) -> None:
    process = start(tmp_path, WAITS.format(stubborn="yes"))
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (
            "errors.Interrupted('stopped; run again')",
            130,
            "electra_wrap: error: stopped; run again",
        ),
        ("None", 0, ""),
    ],
)
def test_signal_after_the_command_is_ignored(raised: str, code: int, printed: str) -> None:
    script = f"""
import os, signal, sys
from electra_wrap import cli, errors

class Arguments:
    debug = False

    @staticmethod
    def function(arguments):
        if error := {raised}:
            raise error

try:
    cli._main(Arguments)
finally:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = run_script(script)
    assert (done.returncode, done.stderr.strip()) == (code, printed)


def test_script_does_not_outlive_the_command(tmp_path: Path) -> None:
    command = start(tmp_path, "import os\nreport(os.getpid())\n" + WAITS.format(stubborn="yes"))
    assert command.stdout
    script = Path("/proc") / command.stdout.readline().strip()
    assert script.exists()
    command.kill()
    command.communicate(timeout=20)
    for _ in range(400):
        if not script.exists():
            return
        time.sleep(0.05)
    raise AssertionError("the script is still running")


def test_launched_process_ends_without_its_command() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    code = "from electra_wrap import subprocesses; subprocesses.die_with_command()"
    here = platform.node()
    for machine, command, expected in (
        (here, os.getpid(), 0),
        (here, ended.pid, -9),
        ("elsewhere", ended.pid, 0),
    ):
        environment = subprocesses.child_environment(
            {"ELECTRA_WRAP_COMMAND": f"{machine} {command}"}
        )
        assert (
            subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode
            == expected
        )


def test_disk_error_of_a_library_is_an_environment_problem(tmp_path: Path) -> None:
    fails = "raise SystemExit('library: writing failed: No space left on device')"
    command = start(tmp_path, fails)
    error = command.communicate(timeout=20)[1]
    assert (
        command.returncode == 3
        and error == "electra_wrap: error: No space left on device; fix that and run again\n"
    )


def test_killed_script_is_reported_as_killed(tmp_path: Path) -> None:
    command = start(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    error = command.communicate(timeout=20)[1]
    assert (
        command.returncode == 4
        and "ended by SIGKILL (which the system sends when memory is short)" in error
    )


def test_child_that_dies_shows_its_last_lines() -> None:
    with pytest.raises(StageFailed, match="nothing ended with code 1") as raised:
        subprocesses.call("electra_wrap.nothing", "f", {})
    assert "No module named electra_wrap.nothing" in raised.value.log_tail


def test_event_survives_its_line() -> None:
    event = events.Step(3, 1.5, {"loss/total": 2.0})
    line = '{"event": "step", "step": 3, "clock": 1.5, "scalars": {"loss/total": 2.0}}'
    assert events.parse(line + "output of another process") == event
    assert events.parse("any other output") is None


def test_child_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["NVIDIA_API_KEY", "TF_API_KEY", "LC_TOKEN", "NCCL_SECRET", "CUDA_PASSWORD"]
    secrets += ["NVIDIA_CREDENTIALS", "HF_TOKEN", "TF_TOKEN_host", "TF_VAR_x", "SLURM_JWT"]
    settings = ["NCCL_DEBUG", "TF_CPP_MIN_LOG_LEVEL", "LC_ALL", "TOKENIZERS_PARALLELISM"]
    settings += ["SLURM_PROCID", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"]
    settings += ["PYTORCH_ALLOC_CONF", "GLOO_SOCKET_IFNAME", "UCX_TLS", "FI_PROVIDER"]
    for name in secrets + settings:
        monkeypatch.setenv(name, "1")
    environment = subprocesses.child_environment({})
    assert not set(secrets) & set(environment) and set(settings) <= set(environment)


def test_waiting_threads_sleep_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert subprocesses.child_environment({})["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    assert subprocesses.child_environment({})["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    environment = subprocesses.child_environment({})
    assert environment["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in environment


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_modules_are_imported_ends_the_command(number: signal.Signals) -> None:
    """Although an import may swallow or convert a KeyboardInterrupt."""
    script = f"""
import importlib.abc, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "electra_wrap.cli":
            try:
                os.kill(os.getpid(), {number.value})
            except BaseException:
                pass

sys.meta_path.insert(0, Finder())
sys.argv = ["electra_wrap", "profiles"]
from electra_wrap.__main__ import main
main()
"""
    done = run_script(script)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "electra_wrap: error: interrupted; the same command resumes\n"
