"""Child processes: upstream's scripts, and our functions that import TensorFlow or PyTorch.

TensorFlow and PyTorch's CUDA wheels abort in one process: TensorFlow 2.21 and triton register the
same LLVM options. Either also takes seconds to import. So the command line imports neither.
"""

import collections
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from electra_wrap import errors, events, paths
from electra_wrap.errors import ElectraWrapError, Interrupted, StageFailed, find_disk_error
from electra_wrap.signals import MESSAGE, NUMBERS

#: For children that load local models: nothing is fetched from a hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

#: Exit code of a child that saved a checkpoint and stopped because of a signal.
INTERRUPTED = 75

#: Lines of a child's output that an error shows.
TAIL_LINES = 15

#: Loaded once: a process that was just forked must not wait for the loader.
_libc = ctypes.CDLL(None)

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def child_environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the environment of a child: ours, with this package on the path, and `extra`."""
    path = os.pathsep.join(filter(None, (str(paths.PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    return {
        "TF_CPP_MIN_LOG_LEVEL": "1",
        # Threads that wait for others spin this often, and then sleep. By default they spin for
        # milliseconds, which takes the processor from any other process.
        "GOMP_SPINCOUNT": "1000",
        **os.environ,
        "PYTHONPATH": path,
        **extra,
    }


def call(
    module: str,
    function: str,
    arguments: Mapping[str, Any],
    *,
    log: Path | None = None,
    env: Mapping[str, str] = {},
) -> Any:
    """Return what a function of a module returns, called in a process of its own.

    The process's output is appended to `log`. The error that the function raises is raised here.
    """
    [result] = call_each(module, function, [arguments], log=log, env=env)
    return result


def call_each(
    module: str,
    function: str,
    jobs: Iterable[Mapping[str, Any]],
    *,
    log: Path | None = None,
    env: Mapping[str, str] = {},
) -> Generator[Any, None, None]:
    """Yield `call`'s result for each job, all from one process. Jobs are read one by one."""
    with pool(1, log=log, env=env) as executor:
        for job in jobs:
            yield executor.submit(_run, module, function, job).result()


@contextlib.contextmanager
def pool(
    workers: int, *, log: Path | None = None, env: Mapping[str, str] = {}
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of new processes. After an error they are killed, whatever they do.

    StageFailed if one of them is killed before.
    """
    # Of semaphores that a killed process leaves, multiprocessing's own process would warn.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    context = multiprocessing.get_context("spawn")
    start = (child_environment(env), log)
    resource_tracker.ensure_running()  # it would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # as in the new processes
    executor = ProcessPoolExecutor(workers, context, initializer=_start, initargs=start)
    for _ in range(workers):
        executor.submit(os.getpid)  # starts a process
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # a signal that has come arrives now
        yield executor
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if isinstance(error, BrokenProcessPool):
            where = f"see the log: {log}" if log else "run again"
            problem = "a process was killed, perhaps for lack of memory"
            raise StageFailed(f"{problem}; {where}") from None
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start(env: dict[str, str], log: Path | None) -> None:
    """Prepare a process of a pool: its environment and its output."""
    die_with_parent()
    if not (parent := multiprocessing.parent_process()) or not parent.is_alive():
        os._exit(1)  # it ended before the kernel knew
    os.environ.update(env)
    output = os.open(log or os.devnull, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)


def _run(module: str, function: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return getattr(importlib.import_module(module), function)(**arguments)
    except ElectraWrapError:
        raise
    except Exception as error:  # not every exception of a library can be pickled
        traceback.print_exc()
        raise errors.convert(error) from None


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
    failure: events.Failure | None = None
    last_lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    with log.open("ab", buffering=0) as file:
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
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
        try:
            with _forward_signals(child) as received:
                for line in child.stdout or ():
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
    if disk_error:
        raise disk_error
    if received or code == INTERRUPTED:
        raise Interrupted(MESSAGE)
    if code and failure:
        raise getattr(errors, failure.kind)(failure.message)
    if code:
        how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        raise StageFailed(f"{log.stem} ended {how}; run again, or see the log: {log}", tail)


@contextlib.contextmanager
def _forward_signals(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Forward the first signal to a child as SIGTERM, and kill it at the second.

    Yields the list of received signals.
    """
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forward)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Report an exception of a child process to its parent, and exit with code 1.

    An exception that is not ours is also printed with its traceback, for the log.
    """
    try:
        yield
    except Exception as error:
        failure = errors.convert(error)
        if failure is not error:
            traceback.print_exc()
        events.emit(events.Failure(type(failure).__name__, str(failure)))
        sys.stderr.flush()
        # sys.exit() would wait for worker processes, which ignore the signal to end.
        os._exit(1)
