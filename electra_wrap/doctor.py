"""`doctor`: reports what a run needs and this machine lacks, and how to fix it."""

import functools
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator

from electra_wrap import initial_weights
from electra_wrap.data import corpus, sources, vocab
from electra_wrap.engines import ENGINES, list_devices
from electra_wrap.errors import ElectraWrapError, EnvironmentProblem, convert, visible
from electra_wrap.native.engine import find_compiler_problem
from electra_wrap.run import Run
from electra_wrap.upstream import checkout, environment


def examine(run: Run) -> list[str]:
    """Print the result of each check. Return the names of those that the profile of `run` needs."""
    missing = []
    for name, check, needed in _checks(run):
        status, problem, fix = "ok", "", ""
        try:
            problem = check()
        except (ElectraWrapError, OSError) as error:
            status = "missing" if needed else "warning"
            problem, _, fix = str(convert(error)).partition("; ")
        print(f"{status:8} {name:24} {visible(problem)}")
        if fix:
            print(f"{'':33} → {visible(fix)}")
        if status == "missing":
            missing.append(name)
    return missing


def _checks(run: Run) -> Iterator[tuple[str, Callable[[], str], bool]]:
    """Yield the name of each check, its function, and whether the run needs it to succeed.

    The function returns what it found, or raises an error: what is wrong; what to do.
    """
    profile = run.profile
    is_upstream = profile.engine == "upstream"
    yield "packages", _packages, True
    for name in ENGINES:
        needed = profile.train.device == "gpu" and name == profile.engine
        yield f"GPUs, {name} engine", functools.partial(_gpus, name), needed
    yield "compiler", _compiler, False
    yield "upstream", functools.partial(_upstream, run), is_upstream
    if profile.model.init_from:
        yield "model.init_from", functools.partial(_initial_weights, run), True
    if profile.tokenizer.source not in ("", "train"):
        yield "vocabulary", lambda: str(vocab.locate(profile.tokenizer.source)), True
    yield "corpus", functools.partial(_corpus, run), True
    yield "disk", functools.partial(_disk, run), True


def _packages() -> str:
    names = ("electra-wrap", "tensorflow", "torch", "transformers")
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(f"{error.name} is not installed; install electra_wrap") from None


def _gpus(engine: str) -> str:
    if gpus := list_devices(engine):
        return f"{len(gpus)} × {gpus[0]}"
    packages = "its CUDA packages: `vendor --device gpu`"
    if engine == "native":
        packages = "PyTorch's CUDA wheels"
    raise EnvironmentProblem(f"none is visible; install the NVIDIA driver and {packages}")


def _compiler() -> str:
    if problem := find_compiler_problem():
        raise EnvironmentProblem(problem)
    return "train.compile works on a GPU: a C compiler and Python.h are there"


def _upstream(run: Run) -> str:
    if run.profile.engine == "upstream":
        return f"verified, in {checkout.ensure(run.upstream)}; runs with {environment.python()}"
    if checkout.directory().exists():
        return f"verified, in {checkout.ensure()}"
    raise EnvironmentProblem("not fetched; `vendor` fetches it")


def _initial_weights(run: Run) -> str:
    initial_weights.resolve(run, dry_run=True)
    return f"{run.profile.model.init_from}"


def _corpus(run: Run) -> str:
    record = run.manifest.stages.get("corpus")
    if record and record.done:
        return f"in {run.corpus}"
    names = corpus.find_sources(run.profile.corpus.sources, run.directory)
    sources.Stream(sources.expand(names[0])[0], retry=False).close()
    return f"{len(names):,} sources, the first is {names[0]}"


def _disk(run: Run) -> str:
    where = next(path for path in (run.directory, *run.directory.parents) if path.is_dir())
    return f"{shutil.disk_usage(where).free / 1e9:,.1f} GB free in {where}"
