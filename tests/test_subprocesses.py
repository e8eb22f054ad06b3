"""Child processes: signals, errors, and that they never outlive the command."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest
from conftest import python

from electra_wrap import events, paths, subprocesses
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError

#: Exit code and message of a command that got a signal.
INTERRUPTED = (130, "electra_wrap: error: interrupted; the same command resumes\n")
ENDS = {SIGINT: INTERRUPTED, SIGTERM: INTERRUPTED, SIGHUP: INTERRUPTED, SIGKILL: (-9, "")}

#: In the end, when signals are to have no effect, it sends itself all of them.
COMMAND = """
import argparse, os, sys
from pathlib import Path
from electra_wrap import cli, errors, signals, subprocesses
def function(arguments):
    signals.raise_interrupts()
    print("begins", flush=True)
    {body}
try: cli._main(argparse.Namespace(function=function, debug=False))
finally: [os.kill(os.getpid(), number) for number in signals.NUMBERS]
"""
FOLLOW = """subprocesses.follow([sys.executable, "script.py"], cwd=Path.cwd(), log=Path("log"),
        on_event=lambda event: print(event.bytes, flush=True))"""
#: Does nothing for a minute.
CALL = 'subprocesses.call("multiprocessing.connection", "wait", {"object_list": [], "timeout": 60})'
#: A script that reports its process, and then a 2 for each SIGTERM. A handler must not print: the
#: signal may arrive while the script prints.
WAITS = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
report(os.getpid())
while signal.sigwait([signal.SIGTERM]):
    report(2)
    if {ends}: sys.exit(75)
"""


def start(tmp_path: Path, body: str, script: str = "") -> subprocess.Popen[str]:
    """Start a command. With FOLLOW, it prints the numbers that `script` reports."""
    report = "import os\nfrom electra_wrap import events\n"
    report += "report = lambda number: events.emit(events.Progress(number))\n"
    (tmp_path / "script.py").write_text(report + script, encoding="utf-8")
    argv = [sys.executable, "-c", COMMAND.format(body=body)]
    env, pipe = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent)}, subprocess.PIPE
    command = subprocess.Popen(
        argv, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert command.stdout.readline() == "begins\n"
    return command


def expect_end(leader: int) -> None:
    """Wait until no process of a session is left."""
    ends = time.monotonic() + 10
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            while os.getsid(int(path.name)) == leader and (path / "cmdline").read_bytes():
                assert time.monotonic() < ends, path
                time.sleep(0.05)


@pytest.mark.parametrize("sent", [[SIGINT], [SIGTERM], [SIGHUP], [SIGKILL], [SIGTERM, SIGINT]])
def test_first_signal_lets_a_script_save_and_the_second_kills_it(tmp_path: Path, sent: Any) -> None:
    saves = len(sent) == 1 and sent != [SIGKILL]
    command = start(tmp_path, FOLLOW, WAITS.format(ends=saves))
    script = int(command.stdout.readline())
    command.send_signal(sent[0])
    for number in sent[1:]:
        assert command.stdout.readline() == "2\n"
        command.send_signal(number)
    output, error = command.communicate(timeout=20)
    assert (output, command.returncode, error) == ("2\n" * saves, *ENDS[sent[0]])
    expect_end(script)


@pytest.mark.parametrize("number", ENDS)
def test_signal_ends_a_call_and_its_process_at_once(tmp_path: Path, number: int) -> None:
    """Also while the process starts. A terminal sends the signal to all processes."""
    for seconds in (0.002, 0.005, 0.01, 0.03, 0.2):
        command = start(tmp_path, CALL)
        time.sleep(seconds)
        (os.killpg if number in (SIGINT, SIGTERM) else os.kill)(command.pid, number)
        _, error = command.communicate(timeout=20)
        assert number == SIGKILL or error == ENDS[number][1]
        assert command.returncode == ENDS[number][0]
        expect_end(command.pid)


@pytest.mark.parametrize(
    ("body", "script", "code", "message"),
    [
        ("pass", "", 0, ""),
        ("raise errors.Interrupted('stopped; run again')", "", 130, "stopped; run again"),
        (FOLLOW, "raise SystemExit('x: No space left on device')", 3, "No space left on device;"),
        (FOLLOW, "os.kill(os.getpid(), 9)", 4, "log ended by SIGKILL; run again, or see the log"),
    ],
)
def test_command_ends_in_one_line_and_ignores_later_signals(
    tmp_path: Path, body: str, script: str, code: int, message: str
) -> None:
    command = start(tmp_path, body, script)
    output, error = command.communicate(timeout=20)
    assert (command.returncode, output, error.count("\n")) == (code, "", bool(message))
    assert not message or error.startswith(f"electra_wrap: error: {message}")


def test_signal_while_modules_are_imported_ends_the_command() -> None:
    """Although an import may swallow or convert a KeyboardInterrupt."""
    script = """import os, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "electra_wrap.cli":
            try: os.kill(os.getpid(), int(sys.argv[1]))
            except BaseException: pass
sys.meta_path.insert(0, Finder)
from electra_wrap.__main__ import main
main()"""
    for number in (SIGINT, SIGTERM, SIGHUP):
        done = python("-c", script, str(number.value))
        assert (done.stdout, done.returncode, done.stderr) == ("", *ENDS[number])


def test_child_inherits_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "https_proxy", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "5")
        assert subprocesses.child_environment()[name] == "5"
        assert subprocesses.call("os", "getenv", {"key": name}) == "5"
        assert subprocesses.call("os", "getenv", {"key": name}, env={name: "6"}) == "6"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert subprocesses.child_environment()["GOMP_SPINCOUNT"] == "1000", "waiting threads sleep"


@pytest.mark.parametrize(
    ("module", "function", "arguments", "error", "message"),
    [
        ("electra_wrap.data.vocab", "read", {"path": Path("x")}, UsageError, "x: No such file"),
        ("os", "listdir", {"path": "/x"}, EnvironmentProblem, r"No such file .* \(/x\); fix that"),
        ("json", "loads", {"s": "{"}, StageFailed, "JSONDecodeError: Expecting property name"),
        ("electra_wrap.nothing", "f", {}, StageFailed, r"No module named 'electra_wrap\.nothing'"),
        ("os", "abort", {}, StageFailed, "a process was killed, perhaps .*; see the log: /.*/log$"),
    ],
)
def test_error_of_a_call_is_raised_and_leaves_no_process(
    tmp_path: Path, module: str, function: str, arguments: Any, error: Any, message: str
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n", encoding="utf-8")
    with pytest.raises(error, match=message) as raised:
        subprocesses.call(module, function, arguments, log=log)
    assert "\n" not in str(raised.value) and not multiprocessing.active_children()
    before, _, printed = log.read_text(encoding="utf-8").partition("\n")
    assert before == "before" and bool(printed) == (function in ("listdir", "loads", "f"))


def test_killed_process_of_a_pool_ends_the_others() -> None:
    with pytest.raises(StageFailed, match="a process was killed"), subprocesses.pool(2) as pool:
        sleeping = pool.submit(time.sleep, 60)
        pool.submit(os.abort)
        sleeping.result(timeout=20)
    assert not multiprocessing.active_children()


def test_event_survives_its_line() -> None:
    event = events.Step(3, 1.5, {"loss/total": 2.0})
    line = '{"event": "step", "step": 3, "clock": 1.5, "scalars": {"loss/total": 2.0}}'
    assert events.parse(line + "output of another process") == event
    assert events.parse("any other output") is None
