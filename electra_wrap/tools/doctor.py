"""`doctor`: reports what a run needs and this machine lacks, and how to fix it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from electra_wrap import packages
from electra_wrap.data import corpus, sources, vocab
from electra_wrap.engine import Engine
from electra_wrap.engines import ENGINES
from electra_wrap.errors import ElectraWrapError, EnvironmentProblem, from_os_error, printable
from electra_wrap.native.engine import find_compiler_problem
from electra_wrap.run import Run
from electra_wrap.upstream import checkout, environment

_COLORS = {"ok": "green", "missing": "bold red", "warning": "yellow"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check. `status` is "ok", "missing" (the profile needs it) or "warning"."""

    name: str
    status: str
    result: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def examine(run: Run, *, named: bool) -> Iterator[Finding]:
    """Check what runs need.

    A problem is "missing" if the user `named` the profile of `run` and that needs it.
    """
    profile = run.profile
    yield _check("packages", _packages, needed=True)
    yield _check("NVIDIA driver", _driver, needed=False)
    for name, engine in ENGINES.items():
        needed = named and name == profile.engine and profile.train.device == "gpu"
        yield _check(f"GPUs, {name} engine", functools.partial(_gpus, engine), needed=needed)
    yield _check("compiler", _compiler, needed=False)
    needed = named and profile.engine == "upstream"
    yield _check("upstream", lambda: checkout.look(run.upstream), needed=needed)
    yield _check("upstream's TensorFlow", _tensorflow, needed=needed)
    if profile.tokenizer.source.startswith("hf://") and not run.vocabulary.is_file():
        yield _check("hub", lambda: _hub(run), needed=named)
    yield _check("corpus", lambda: _corpus(run), needed=named)
    yield _check("disk", lambda: _disk(run), needed=named)


def _check(name: str, check: Callable[[], str], *, needed: bool) -> Finding:
    """Return the result of `check`, or the error that it raises: `what is wrong; what to do`."""
    try:
        return Finding(name, "ok", printable(check()))
    except (ElectraWrapError, OSError) as error:
        message = printable(str(from_os_error(error) if isinstance(error, OSError) else error))
        problem, _, fix = message.partition("; ")
        return Finding(name, "missing" if needed else "warning", problem, fix)


def _packages() -> str:
    versions = packages.versions("electra-wrap", "tensorflow", "torch", "transformers")
    requirements = map(Requirement, importlib.metadata.requires("electra-wrap") or [])
    if missing := [str(r) for r in requirements if not _is_satisfied(r)]:
        raise EnvironmentProblem(f"not installed: {', '.join(missing)}; install electra_wrap again")
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _is_satisfied(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return True
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(requirement.name)
        return requirement.specifier.contains(version, prereleases=True)
    return False


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=8, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        raise EnvironmentProblem("nvidia-smi fails; install a driver if there is a GPU") from None
    return output.strip().replace("\n", " · ")


def _gpus(engine: Engine) -> str:
    gpus = engine.devices()
    if not gpus:
        raise EnvironmentProblem(engine.NO_GPU)
    return f"{len(gpus)} × {gpus[0]}"


def _compiler() -> str:
    if problem := find_compiler_problem():
        raise EnvironmentProblem(problem)
    return "train.compile works on a GPU: a C compiler and Python.h are there"


def _tensorflow() -> str:
    return f"{environment.version()}, with {environment.python()}"


def _hub(run: Run) -> str:
    tokenizer = run.profile.tokenizer
    with tempfile.TemporaryDirectory() as directory:
        vocab.fetch(tokenizer.source, Path(directory, "vocab.txt"), tokenizer.sha256)
    return f"{tokenizer.source} can be fetched"


def _corpus(run: Run) -> str:
    if run.record("corpus").get("outcome") == "done":
        return f"in {run.corpus}"
    names = corpus.find_sources(run.profile.corpus.sources, run.directory)
    sources.Stream(sources.expand(names[0])[0], retry=False).close()
    return names[0] if len(names) == 1 else f"{len(names):,} sources, the first is {names[0]}"


def _disk(run: Run) -> str:
    where = next(path for path in (run.directory, *run.directory.parents) if path.is_dir())
    return f"{shutil.disk_usage(where).free / 1e9:,.1f} GB free in {where}"


def show(findings: list[Finding]) -> None:
    """Print findings as a table."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        result = f"{finding.result}\n→ {finding.fix}" if finding.fix else finding.result
        status = f"[{_COLORS[finding.status]}]{finding.status}[/]"
        table.add_row(status, finding.name, Text(result, overflow="fold"))
    Console(highlight=False).print(table)
