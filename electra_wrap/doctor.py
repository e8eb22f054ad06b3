"""What the machine has of what a run needs: one line for each thing, with how to mend it."""

from __future__ import annotations

import dataclasses
import functools
import http.client
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from electra_wrap import corpus, process, sources, storage
from electra_wrap.errors import ElectraWrapError, EnvironmentLacks, UsageError, from_os
from electra_wrap.profile import ENGINES
from electra_wrap.stages import Run, engine, plan
from electra_wrap.upstream import checkout

#: Seconds in which a server has to answer.
ANSWER_TIMEOUT = 8


@dataclasses.dataclass
class Finding:
    """Something looked at: what was found, how to mend it if that is not good, and whether the profile needs it."""

    what: str
    found: str
    mend: str = ""
    needed: bool = False

    @property
    def status(self) -> str:
        return "ok" if not self.mend else "missing" if self.needed else "mend"


def examine(run: Run, named: bool) -> Iterator[Finding]:
    """Look at everything, one after the other; `named`: what the profile of `run` needs is needed."""
    yield from _packages()
    yield from _hardware()
    train, is_upstream = run.profile.train, run.profile.engine == "upstream"
    for name in ENGINES:
        wanted = named and train.device == "gpu" and name == run.profile.engine
        yield _ask(f"GPUs, {name} engine", functools.partial(_gpus, name, run), needed=wanted)
    compiler = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    yield Finding("C compiler", compiler or "none", "" if compiler else "the native engine compiles with gcc or clang")
    git = _output("git", "--version").removeprefix("git version ")
    needs_git = named and is_upstream
    yield Finding("git", git or "none", "" if git else "install it, for example apt-get install git", needs_git)
    yield _ask("google-research/electra", lambda: checkout.look(run.upstream), needed=needs_git)
    yield _ask("hub", lambda: _hub(run), needed=named and run.profile.tokenizer.source.startswith("hf://"))
    yield _ask("corpus", lambda: _corpus(run), needed=named)
    yield _ask("disk", lambda: _disk(run), needed=named)


def _ask(what: str, look: Callable[[], str], needed: bool) -> Finding:
    """What `look` finds; the error that it raises says what is not good, and the mend after its last semicolon."""
    try:
        return Finding(what, look(), needed=needed)
    except (ElectraWrapError, OSError) as error:
        if isinstance(error, OSError):
            error = from_os(error)
        found, separator, mend = str(error).rpartition("; ")
        if not separator:
            found, mend = mend, "it should not be so: install the packages again, in a new environment"
        return Finding(what, found, mend, needed)


def _packages() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())  # pip sees to the version
    mend, wrong = "pip install -e . in the clone, or pip install --upgrade electra-wrap", []
    try:
        requirements = importlib.metadata.requires("electra-wrap") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "not known: electra-wrap itself is not installed", mend)
        return
    for one in map(Requirement, requirements):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                version = importlib.metadata.version(one.name)
            except importlib.metadata.PackageNotFoundError:
                version = ""
            if not version or not one.specifier.contains(version, prereleases=True):
                wrong.append(f"{one.name} {version or 'is missing'}")
            elif one.name in ("tensorflow", "torch", "transformers", "tensorboard"):
                yield Finding(one.name, version)
    yield Finding("packages", ", ".join(wrong) or "all that are needed", mend if wrong else "", True)


def _hardware() -> Iterator[Finding]:
    model = _line("/proc/cpuinfo", "model name") or platform.machine()
    yield Finding("processors", f"{len(os.sched_getaffinity(0))} × {model}")
    memory = int((_line("/proc/meminfo", "MemAvailable") or "0").split()[0]) / 2**20
    yield Finding("memory", f"{memory:.1f} GiB free", "" if memory > 2 else "training takes 2 GiB or more")
    driver = _output("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader")
    mend = "" if driver else "if there is a GPU, install NVIDIA's driver: nvidia-smi must work"
    yield Finding("NVIDIA driver", driver.replace("\n", " · ") or "none", mend)
    wanted = re.compile(r"nvidia[-_](cuda[-_]runtime|cudnn|nccl)")
    found = [one for one in importlib.metadata.distributions() if wanted.match(str(one.metadata["Name"]))]
    libraries = sorted(f"{one.name[7:]} {one.version}" for one in found)
    mend = "" if libraries or not driver else "pip install torch from PyPI, and for TensorFlow pip install -e '.[gpu]'"
    yield Finding("CUDA libraries", ", ".join(libraries) or "none from pip", mend)


def _gpus(name: str, run: Run) -> str:
    chosen, batch = engine(name), run.profile.train.batch_size
    if not (gpus := process.call(chosen.GPUS, {})):
        raise EnvironmentLacks(chosen.NO_GPU)
    if name == "native" and batch % len(gpus):
        raise EnvironmentLacks(f"{len(gpus)} do not divide train.batch_size = {batch}; choose a multiple of them")
    return f"{len(gpus)} × {gpus[0]}"


def _hub(run: Run) -> str:
    from huggingface_hub import constants, try_to_load_from_cache

    name, _, revision = run.profile.tokenizer.source.removeprefix("hf://").partition("@")
    there = run.vocabulary.is_file() or (
        run.profile.tokenizer.source.startswith("hf://")
        and isinstance(try_to_load_from_cache(name, "vocab.txt", revision=revision or None), str)
    )
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=ANSWER_TIMEOUT).close()
    except (OSError, http.client.HTTPException) as error:
        if there:
            return "cannot be reached, but the vocabulary is here"
        message = f"{constants.ENDPOINT} does not answer ({getattr(error, 'reason', error)})"
        raise EnvironmentLacks(f"{message}; with a local copy: --set tokenizer.source=PATH/vocab.txt") from None
    return constants.ENDPOINT


def _corpus(run: Run) -> str:
    if run.recorded("corpus").get("outcome") == "done":
        return "is divided"
    names = corpus.find(run.profile.corpus.sources, run.directory.path)
    for name in names:
        sources.Stream(sources.expand(name)[0], patient=False).close()
    return f"{len(names)} file{'s' * (len(names) > 1)}, {names[0]}{' …' * (len(names) > 1)}"


def _disk(run: Run) -> str:
    where = next(path for path in (run.directory.path, *run.directory.path.parents) if path.is_dir())
    found = f"{shutil.disk_usage(where).free / 1e9:,.1f} GB free in {where}"
    try:
        needed = storage.check(where, run, [stage for stage, _ in plan(run)])
    except UsageError:  # what would be written is not known, for a reason that another line tells
        return found
    return f"{found}, about {needed / 1e9:.2g} GB needed"


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _line(path: str, key: str) -> str:
    """The value of a key in a file of /proc; empty if it is not there."""
    found = re.search(rf"^{key}\s*: *(.*)$", Path(path).read_text(encoding="utf-8"), re.M)
    return found[1] if found else ""


def show(findings: list[Finding]) -> None:
    """Print what was found, on one screen."""
    table = Table.grid(padding=(0, 2))
    colours = {"ok": "green", "missing": "bold red", "mend": "yellow"}
    for one in findings:
        found = f"{one.found}\n→ {one.mend}" if one.mend else one.found
        table.add_row(f"[{colours[one.status]}]{one.status}[/]", one.what, escape(found))
    Console(highlight=False).print(table)
