"""Child processes: the scripts, and our own modules that need TensorFlow or PyTorch.

TensorFlow and PyTorch abort in one process (TensorFlow 2.21 and triton register the same LLVM options), and
either costs seconds to import. So the command line imports neither: each has a process of its own.
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
from typing import Any

from electra_wrap import paths
from electra_wrap.errors import ElectraWrapError, EnvironmentLacks, Interrupted, StageFailed, from_os

#: What a child gets of our environment: nothing that injects code or that is secret.
_PASSED = (
    *("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM", "LD_LIBRARY_PATH"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CC", "CXX"),
)
_PASSED_NAMES = re.compile("LC_|CUDA_|NVIDIA_|NCCL_|XLA_|TF_(?!VAR_|TOKEN_)")  # Terraform's begin so, too

#: Exit code of a child that was asked to stop, saved a checkpoint and did so.
INTERRUPTED = 75

#: Seconds that a child has to save its work after the first signal.
GRACE = 300

#: Lines of a child's output that are shown if it fails.
TAIL = 15

#: Characters that are shown of an error that is none of ours.
MESSAGE = 300

#: What the system says when the machine lacks something. A library in a child may say it in an error of any kind.
_LACKING = re.compile(
    "|".join(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTCONN)))
)


#: Opened once: a process that was just forked must not wait for the loader.
_libc = ctypes.CDLL(None)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends, however it ends."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)  # it ended before the kernel knew


def die_with_command() -> None:
    """`die_with_parent` for a process that another one of the command's has started: torchrun, say.

    If the one or the other has ended by now, this process does, too. A scheduler's launcher (srun) starts processes
    that do not descend from the command, or on another machine: those are no orphans.
    """
    parent = os.getppid()
    die_with_parent(parent)
    machine, _, command = os.environ.get("ELECTRA_WRAP_COMMAND", "").rpartition(" ")
    orphan = (parent == 1 and command != "1") or not Path("/proc", command).exists()
    if machine == platform.node() and orphan:
        os.kill(os.getpid(), signal.SIGKILL)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process: ours, cleaned, and `extra`."""
    passed = {k: v for k, v in os.environ.items() if k in _PASSED or _PASSED_NAMES.match(k)}
    return {
        "TF_CPP_MIN_LOG_LEVEL": "1",
        **passed,
        "PYTHONPATH": str(paths.PACKAGE.parent),  # the patched scripts import electra_wrap
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a checkout with anything extra in it is refused
        "PYTHONUTF8": "1",
        "ELECTRA_WRAP_COMMAND": f"{platform.node()} {os.getpid()}",
        **extra,
    }


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a command to its end, append it and its output to `log`, pass each line to `on_line`.

    The first SIGINT, SIGTERM or SIGHUP asks the command to save and stop, a second one kills it; then Interrupted,
    also if the signal reached the command alone. If it fails, the error that it told (`telling`) is raised, or
    EnvironmentLacks if its last lines say what the machine lacks, or StageFailed. If `on_line` raises, it is killed.
    """
    with log.open("ab", buffering=0) as file, _signals() as received:
        file.write(f"$ {shlex.join(argv)}\n".encode())
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we pass it on
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - a system call, no lock
        )
        assert child.stdout is not None
        told: dict[str, str] = {}
        last: collections.deque[str] = collections.deque(maxlen=TAIL)
        try:
            received.pass_on_to(child)
            for line in child.stdout:
                with contextlib.suppress(OSError):  # a full disk: the work is worth more than its log
                    file.write(line.encode())
                if line.startswith('{"error"'):  # another process may have ended the line
                    told = told or json.JSONDecoder().raw_decode(line)[0]
                elif line.strip():
                    last.append(line.rstrip())
                on_line(line.rstrip("\n"))
            code = child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
    end = "\n".join(last)
    lacks = lacking(told["error"] if told else end) if code else None
    if (received.count and lacks is None) or code == INTERRUPTED:
        raise Interrupted("interrupted; the same command resumes")
    if code:
        hear(told, log)
        how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        memory = " (which the system sends when memory is short)" if code == -signal.SIGKILL else ""
        raise lacks or StageFailed(f"{log.stem} ended {how}{memory}; run again, or see the whole log, {log}", end)


class _Received:
    """Signals received while a child runs."""

    def __init__(self) -> None:
        self.count = 0
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        if self._child is not None:
            if self._child.poll() is not None:  # it ended, and something that it left holds its output
                raise KeyboardInterrupt
            if self.count == 1:
                # A script that ignores the request is ended all the same.
                signal.alarm(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGTERM if self.count == 1 else signal.SIGKILL)

    def pass_on_to(self, child: subprocess.Popen[str]) -> None:
        """Pass on what comes, and what came before there was a child."""
        self._child = child
        if self.count:
            os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _signals() -> Iterator[_Received]:
    received = _Received()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, received)
    try:
        yield received
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def call(module: str, job: Mapping[str, Any], *, log: Path | None = None, env: Mapping[str, str] = {}) -> Any:
    """Call `serve`'s function of one of our modules in a process of its own and return its result.

    What it prints goes to `log` (or nowhere). The errors it raises are raised here; anything else it dies of is
    StageFailed.
    """
    child = subprocess.run(  # which kills it if we are interrupted
        [sys.executable, "-m", module],
        env=environment(env),
        cwd="/",
        input=json.dumps(job),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(child.stderr)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        end = "\n".join(child.stderr.strip().splitlines()[-TAIL:])
        raise StageFailed(f"{module} ended with code {child.returncode}; see {log or 'above'}", end) from None
    hear(answer, log)
    return answer["result"]


def calls(module: str, jobs: Iterable[Mapping[str, Any]], *, env: Mapping[str, str] = {}) -> Generator[Any, None, None]:
    """Yield `call`'s result for each job, in order, all from one process; a job is taken when its result is wanted."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            env=environment(env),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            errors="replace",
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - a system call, no lock
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            for job in jobs:
                with contextlib.suppress(BrokenPipeError):  # it died, and the end of its output will tell
                    print(json.dumps(job), file=child.stdin, flush=True)
                found = next((line for line in child.stdout if line.startswith(('{"result"', '{"error"'))), None)
                if found is None:
                    log.seek(0)
                    end = "\n".join(log.read().strip().splitlines()[-TAIL:])
                    raise StageFailed(f"{module} ended with code {child.wait()}; see above", end)
                answer = json.loads(found)
                hear(answer, None)
                yield answer["result"]
        finally:
            child.kill()
            child.communicate()


def hear(answer: Mapping[str, Any], log: Path | None) -> None:
    """Raise the error that a child told us, if that is what its line of JSON is."""
    if "error" in answer:
        kind = {kind.__name__: kind for kind in ElectraWrapError.__subclasses__()}[answer["kind"]]
        see = f"; the whole log is {log}" if log and kind is StageFailed else ""
        raise kind(answer["error"] + see)


def lacking(text: str) -> EnvironmentLacks | None:
    """What the machine lacks, if that is what a text says."""
    found = _LACKING.search(text)
    return EnvironmentLacks(f"{found[0]}; mend that and run again") if found else None


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """The child's side of `hear`: tell the parent what goes wrong, in a line of JSON, and end with code 1.

    An error that is none of ours comes with its traceback, for the log.
    """
    try:
        yield
        return
    except ElectraWrapError as error:
        failure = error
    except OSError as error:
        failure = from_os(error)
    except Exception as error:
        traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())
        failure = lacking(what) or StageFailed(what if len(what) < MESSAGE else f"{what[:MESSAGE]}…")
    print(json.dumps({"error": str(failure), "kind": type(failure).__name__}, ensure_ascii=False), flush=True)
    sys.exit(1)


def serve(*functions: Callable[..., Any]) -> None:
    """The child's side of `call`: read jobs from stdin, print what the function of each `task` returns as JSON."""
    with telling():
        for line in sys.stdin:
            job = json.loads(line)
            task = job.pop("task", functions[0].__name__)
            function = next(function for function in functions if function.__name__ == task)
            print(json.dumps({"result": function(**job)}, ensure_ascii=False), flush=True)
