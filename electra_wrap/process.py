"""Child processes: the scripts, and our own modules that need TensorFlow or PyTorch.

TensorFlow and PyTorch abort in one process (TensorFlow 2.21 and triton register the same LLVM options), and
either costs seconds to import. So the command line imports neither: each has a process of its own.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from electra_wrap import paths
from electra_wrap.errors import ElectraWrapError, Interrupted, StageFailed, from_os

#: What a child gets of our environment: nothing that injects code or that is secret.
_PASSED = (
    *("PATH", "HOME", "USER", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM", "LD_LIBRARY_PATH"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CC", "CXX"),
)
_PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TF_", "XLA_")

#: Exit code of a child that was asked to stop, saved a checkpoint and did so.
INTERRUPTED = 75

#: Seconds that a child has to save its work after the first signal.
GRACE = 300


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the one that started it (default: by `run`) ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != (parent or int(os.environ.get("ELECTRA_WRAP_PARENT", os.getppid()))):
        os.kill(os.getpid(), signal.SIGKILL)  # it ended before the kernel knew


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process: ours, cleaned, and `extra`."""
    passed = {k: v for k, v in os.environ.items() if k in _PASSED or k.startswith(_PASSED_PREFIXES)}
    return {
        "TF_CPP_MIN_LOG_LEVEL": "1",
        **passed,
        "PYTHONPATH": str(paths.PACKAGE.parent),  # the patched scripts import electra_wrap
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # a checkout with anything extra in it is refused
        "PYTHONUTF8": "1",
        "ELECTRA_WRAP_PARENT": str(os.getpid()),
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

    The first SIGINT or SIGTERM asks the command to save and stop, a second one kills it; then Interrupted, also if
    the signal reached the command alone. If it fails, the error that it told (`tell`) is raised, or StageFailed.
    """
    with log.open("a", encoding="utf-8") as file, _signals() as received:
        file.write(f"$ {shlex.join(argv)}\n")
        file.flush()
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
        )
        received.child = child
        assert child.stdout is not None
        told: dict[str, str] = {}
        for line in child.stdout:
            file.write(line)
            file.flush()
            if line.startswith('{"error"'):  # another process may have ended the line
                told = told or json.JSONDecoder().raw_decode(line)[0]
            on_line(line.rstrip("\n"))
        code = child.wait()
    if received.count or code == INTERRUPTED:
        raise Interrupted("interrupted; the same command resumes")
    if code:
        hear(told)
        raise StageFailed(f"{log.stem} ended with code {code}; the whole log is {log}", tail(log))


class _Received:
    """Signals received while a child runs."""

    def __init__(self) -> None:
        self.count = 0
        self.child: subprocess.Popen[str] | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.count += 1
        if self.child is not None and self.child.poll() is None:
            if self.count == 1:
                # A script that ignores the request is ended all the same.
                signal.alarm(GRACE)
            os.killpg(self.child.pid, signal.SIGTERM if self.count == 1 else signal.SIGKILL)


@contextmanager
def _signals() -> Iterator[_Received]:
    received = _Received()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, received) for number in numbers}
    try:
        yield received
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, blank ones left out."""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "\n".join(collections.deque((line.rstrip() for line in file if line.strip()), maxlen=lines))


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
    )
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(child.stderr)
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        end = "\n".join(child.stderr.strip().splitlines()[-15:])
        raise StageFailed(f"{module} ended with code {child.returncode}; see {log or 'above'}", end) from None
    hear(answer)
    return answer["result"]


def hear(answer: Mapping[str, Any]) -> None:
    """Raise the error that a child told us, if that is what its line of JSON is."""
    if "error" in answer:
        kinds = {kind.__name__: kind for kind in ElectraWrapError.__subclasses__()}
        raise kinds[answer["kind"]](answer["error"])


def tell(error: ElectraWrapError) -> None:
    """The child's side of `hear`."""
    print(json.dumps({"error": str(error), "kind": type(error).__name__}, ensure_ascii=False), flush=True)


def serve(function: Callable[..., Any]) -> None:
    """The child's side of `call`: read the job from stdin, print the result of `function(**job)` as JSON."""
    die_with_parent()
    try:
        print(json.dumps({"result": function(**json.load(sys.stdin))}, ensure_ascii=False), flush=True)
    except OSError as error:
        tell(from_os(error))
    except ElectraWrapError as error:
        tell(error)
