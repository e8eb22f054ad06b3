"""Child processes: upstream's scripts, and our modules that import TensorFlow or PyTorch.

TensorFlow and PyTorch's CUDA wheels abort in one process: TensorFlow 2.21 and triton register the
same LLVM options. Either also takes seconds to import. So the command line imports neither.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from electra_wrap import events, paths
from electra_wrap.errors import (
    ElectraWrapError,
    EnvironmentProblem,
    Interrupted,
    StageFailed,
    from_os_error,
)
from electra_wrap.signals import MESSAGE, NUMBERS

#: Environment variables that a child gets: none that injects code or may hold a secret.
_PASSED = {"PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM", "LD_LIBRARY_PATH"}
_PASSED |= {"TOKENIZERS_PARALLELISM", "CC", "CXX"}
_PASSED_PATTERN = re.compile(
    "LC_|CUDA_|NVIDIA_|NCCL_|TF_(?!VAR_)|SLURM_|PYTORCH_|TORCH|TRITON_|GLOO_|UCX_|FI_|G?OMP_|MKL_"
)
_SECRET_PATTERN = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|JWT", re.IGNORECASE)

#: For children that load local models: nothing is fetched from a hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

#: Exit code of a child that saved a checkpoint and stopped because of a signal.
INTERRUPTED = 75

#: Seconds that a child has to save its work after the first signal.
GRACE_PERIOD = 300

#: Lines of a child's output that an error shows.
TAIL_LINES = 15

#: Longest message of an exception that is not ours.
MAX_MESSAGE = 300

#: A full or failing disk. A library may raise the system's message for it as any exception.
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTCONN)
_DISK_ERROR = re.compile("|".join(map(os.strerror, _DISK_ERRNOS)))

#: Loaded once: a process that was just forked must not wait for the loader.
_libc = ctypes.CDLL(None)

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)  # it ended before the kernel knew


def die_with_command() -> None:
    """Call `die_with_parent` in a process that a launcher such as torchrun started for a command.

    A process that outlived the command on this machine ends, too. A scheduler's launcher such as
    srun may start processes that do not descend from the command; those go on.
    """
    parent = os.getppid()
    die_with_parent(parent)
    machine, _, command = os.environ.get("ELECTRA_WRAP_COMMAND", "").rpartition(" ")
    orphaned = (parent == 1 and command != "1") or not Path("/proc", command).exists()
    if machine == platform.node() and orphaned:
        os.kill(os.getpid(), signal.SIGKILL)


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child: ours without secrets and injected code, plus `extra`."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or (_PASSED_PATTERN.match(name) and not _SECRET_PATTERN.search(name))
    }
    if "OMP_WAIT_POLICY" not in passed:
        # Threads that wait for others spin this often, and then sleep. By default they spin for
        # milliseconds, which takes the processor from any other process.
        passed.setdefault("GOMP_SPINCOUNT", "1000")
    return {
        "TF_CPP_MIN_LOG_LEVEL": "1",
        **passed,
        "PYTHONPATH": str(paths.PACKAGE.parent),  # the patched scripts import electra_wrap
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a checkout with additional files is refused
        "PYTHONUTF8": "1",
        "ELECTRA_WRAP_COMMAND": f"{platform.node()} {os.getpid()}",
        **extra,
    }


def follow(
    argv: Sequence[str],
    *,
    cwd: Path = Path("/"),
    env: Mapping[str, str] = {},
    log: Path,
    on_event: Callable[[events.Event], None] = lambda event: None,
) -> None:
    """Run a command to its end. Append its output to `log` and pass its events to `on_event`.

    The first SIGINT, SIGTERM or SIGHUP asks the child to save and stop; the second kills it.
    Either ends in Interrupted. A child that fails ends in the error that it reported, in
    EnvironmentProblem if its last lines tell of a disk error, or else in StageFailed.
    """
    with log.open("ab", buffering=0) as file, _forwarded_signals() as signals:
        file.write(f"$ {shlex.join(argv)}\n".encode())
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=child_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we forward it
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509
        )
        assert child.stdout is not None
        failure: events.Failure | None = None
        last_lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        try:
            signals.forward_to(child)
            for line in child.stdout:
                with contextlib.suppress(OSError):  # a full disk must not end the work
                    file.write(line.encode())
                event = events.parse(line)
                if isinstance(event, events.Failure):
                    failure = failure or event
                elif event is not None:
                    on_event(event)
                elif line.strip():
                    last_lines.append(line.rstrip())
            code = child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    tail = "\n".join(last_lines)
    disk_error = find_disk_error(failure.message if failure else tail) if code else None
    if (signals.count and disk_error is None) or code == INTERRUPTED:
        raise Interrupted(MESSAGE)
    if disk_error:
        raise disk_error
    if code and failure:
        raise_child_error(failure, log)
    if code:
        how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (which the system sends when memory is short)"
        raise StageFailed(f"{log.stem} ended {how}; run again, or see the log: {log}", tail)


class _SignalForwarder:
    """A signal handler that forwards signals to a child."""

    def __init__(self) -> None:
        self.count = 0
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        if self._child is None:
            return
        if self._child.poll() is not None:  # it ended, but a process that it left holds its output
            raise KeyboardInterrupt
        if self.count == 1:
            signal.alarm(GRACE_PERIOD)  # for a child that ignores SIGTERM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM if self.count == 1 else signal.SIGKILL)

    def forward_to(self, child: subprocess.Popen[str]) -> None:
        """Forward signals to `child`, also one that arrived before the child started."""
        self._child = child
        if self.count:
            os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[_SignalForwarder]:
    forwarder = _SignalForwarder()
    numbers = (*NUMBERS, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forwarder)
    try:
        yield forwarder
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def call(
    module: str,
    function: str,
    arguments: Mapping[str, Any],
    *,
    log: Path | None = None,
    env: Mapping[str, str] = {},
    python: str = sys.executable,
) -> Any:
    """Call a function of a module that runs `serve`, in a process of its own, run by `python`.

    The child's stderr is appended to `log`. The error that the function raises is raised here; a
    child that dies otherwise is StageFailed.
    """
    results = call_each(module, function, [arguments], log=log, env=env, python=python)
    with contextlib.closing(results):
        return next(results)


def call_each(
    module: str,
    function: str,
    jobs: Iterable[Mapping[str, Any]],
    *,
    log: Path | None = None,
    env: Mapping[str, str] = {},
    python: str = sys.executable,
) -> Generator[Any, None, None]:
    """Yield `call`'s result for each job, all from one process. Jobs are read one by one."""
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("a+b") if log else tempfile.TemporaryFile())  # noqa: SIM115
        child = subprocess.Popen(
            [python, "-s", "-m", module],
            env=child_environment(env),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            for job in jobs:
                with contextlib.suppress(BrokenPipeError):  # the end of its output tells why
                    print(json.dumps([function, job]), file=child.stdin, flush=True)
                found = (events.parse(line) for line in child.stdout)
                event = next(filter(None, found), None)
                if isinstance(event, events.Failure):
                    raise_child_error(event, log)
                if not isinstance(event, events.Result):
                    code = child.wait()
                    stderr.seek(0)
                    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
                    where = f"see the log: {log}" if log else "its last lines are above"
                    tail = "\n".join(lines[-TAIL_LINES:])
                    raise StageFailed(f"{module} ended with code {code}; {where}", tail)
                yield event.value
        finally:
            child.kill()
            child.communicate()


def raise_child_error(failure: events.Failure, log: Path | None) -> NoReturn:
    """Raise the error that a child reported."""
    kinds = {kind.__name__: kind for kind in ElectraWrapError.__subclasses__()}
    kind = kinds[failure.kind]
    where = f"; the whole log is {log}" if log and kind is StageFailed else ""
    raise kind(failure.message + where)


def find_disk_error(text: str) -> EnvironmentProblem | None:
    """Return an error if a text has one of the system's messages for a full or failing disk."""
    found = _DISK_ERROR.search(text)
    return EnvironmentProblem(f"{found[0]}; fix that and run again") if found else None


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Report an exception of a child process to its parent, and exit with code 1.

    An exception that is not ours is also printed with its traceback, for the log.
    """
    try:
        yield
        return
    except ElectraWrapError as error:
        failure = error
    except OSError as error:
        failure = from_os_error(error)
    except Exception as error:
        traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}…"
        failure = find_disk_error(message) or StageFailed(message)
    events.emit(events.Failure(type(failure).__name__, str(failure)))
    sys.exit(1)


def serve(*functions: Callable[..., Any]) -> None:
    """Answer the calls of `call` and `call_each`, which arrive on stdin."""
    by_name = {function.__name__: function for function in functions}
    with report_errors():
        for line in sys.stdin:
            name, arguments = json.loads(line)
            events.emit(events.Result(by_name[name](**arguments)))
