"""Measure the native engine on a machine with a GPU, from a source tree.

    python tests/measure_gpu.py --out DIR [--wheels DIR] [--parts abcde] [--cpu]

Nothing is installed or downloaded, and TensorFlow is not needed. On an H100, the parts take about
20 minutes, most of them in compiling:

    a  20 steps without dropout: compiled against not compiled, bfloat16 against float32
    b  train, evaluate, SIGKILL and resume, compared with an undisturbed training
    c  `bench` of small with 30,522 and 119,547 words, and of base at 128 tokens. A CUDA graph that
       is skipped is an error.
    d  a profile of ten steps of small. Its trace is written, too.
    e  two processes on two GPUs against one, and `bench` of small with them

DIR gets measure.json, the table measure.md and logs. A part that fails is a line of the table, and
the others still run. The exit code is then 1. --cpu runs the parts with a small model, without
compiling it, on a CPU, and `bench` once.

If packages are missing, the script lists them. Fetch their wheels on another machine, for the
Python of this one, copy them, and give their directory as --wheels. accelerate and safetensors need
--no-deps, or pip fetches PyTorch as well. Packages that this machine has are preferred.

    pip download --dest DIR --only-binary=:all: --python-version 3.12 --platform \
manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 PACKAGE …
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import gzip
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

from electra_wrap import events, files, paths, subprocesses  # noqa: E402
from electra_wrap.errors import ElectraWrapError, EnvironmentProblem, StageFailed  # noqa: E402

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "safetensors", "tokenizers", "numpy"),
    *("huggingface_hub", "pydantic", "rich", "fsspec", "backports.zstd", "google-crc32c"),
    *("tomli-w", "jinja2", "tensorboard"),
)
SAMPLE = paths.CONFIGS / "spanish-sample.txt"
NO_DROPOUT = str(TESTS / "children" / "native_no_dropout.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

#: Settings for a GPU, and those of --cpu.
GPU = ("train.device=gpu", "train.compile=true")
CPU = (
    *("train.device=cpu", "train.batch_size=8", "model.max_seq_length=32"),
    *("model.hidden_size=64", "model.num_hidden_layers=1", "model.generator_hidden_size=1.0"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Whether to use a GPU, the run directory, where results go, and CUDA's names of two GPUs."""

    gpu: bool
    directory: Path
    out: Path
    two_gpus: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement. The part fails if it is above `limit`."""

    name: str
    value: Any
    limit: float | None = None

    def __str__(self) -> str:
        if isinstance(self.value, str):
            return self.value.replace("|", r"\|")
        if isinstance(self.value, list):
            return f"{self.value[0]:.4f} … {self.value[-1]:.4f}"
        return f"{self.value:,.4g}" if abs(self.value) < 1000 else f"{self.value:,.0f}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a part measured, and the error that ended it."""

    part: str
    seconds: float
    rows: list[Row]
    error: str | None


Part = Callable[[Options], Iterator[Row]]


def load_profile(options: Options, name: str, *overrides: str) -> Any:
    from electra_wrap import profiles

    return profiles.load(name, ["engine=native", *(GPU if options.gpu else CPU), *overrides])


def make_run(options: Options, model_name: str, **train: Any) -> Any:
    """Return the run with a model of this name, and write its profile for the trainer."""
    from electra_wrap.run import Run

    vocabulary = options.directory.with_name("vocab.txt")
    train = {"warmup_steps": 2, "log_every": 1, "save_every": train["steps"]} | train
    overrides = [f"model_name={model_name}", "corpus.held_out=0.1", "corpus.shards=2"]
    overrides += [f"corpus.source={json.dumps(str(SAMPLE))}"]
    overrides += [f"tokenizer.source={json.dumps(str(vocabulary))}"]
    overrides += [f"train.{key}={json.dumps(value)}" for key, value in train.items()]
    run = Run(load_profile(options, "spanish-small", *overrides), options.directory)
    run.directory.mkdir(exist_ok=True)
    files.write_json(run.directory / "profile.json", run.profile.model_dump())
    return run


def build_examples(options: Options) -> Iterator[Row]:
    """Make a vocabulary of the sample's words, filled up to BERT's size, and examples."""
    from electra_wrap.data import vocab
    from electra_wrap.pipeline.execute import execute

    text = SAMPLE.read_text(encoding="utf-8")
    characters = sorted(set(text) - set(" \n"))
    words = collections.Counter(re.findall(r"\w\w+", text)).most_common()
    tokens = [*vocab.SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    tokens += [word for word, _ in words] + [f"[unused{number}]" for number in range(30_522)]
    size = 30_522 if options.gpu else 1000
    files.write_text(options.directory.with_name("vocab.txt"), "\n".join(tokens[:size]) + "\n")
    run = make_run(options, "none", steps=20)
    execute(run, until="examples")
    yield Row("examples", run.results(run.examples_record)["examples"])


class Killed(Exception):
    """The training is to be killed."""


def train(run: Any, *argv: str, kill: bool = False) -> list[events.Event]:
    """Train a run and return its events. With `kill`, send SIGKILL after its first checkpoint."""
    from electra_wrap.native import engine

    reported: list[events.Event] = []

    def on_event(event: events.Event) -> None:
        reported.append(event)
        steps = [saved.step for saved in engine.checkpoints(run.model_dir)]
        if kill and isinstance(event, events.Step) and steps and steps[0] < event.step:
            raise Killed  # `follow` then kills the child

    argv = (sys.executable, "-s", *(argv or ("-m", "electra_wrap.native.train")))
    log = run.log_file("train")
    with contextlib.suppress(Killed):
        subprocesses.follow([*argv, str(run.directory)], log=log, on_event=on_event)
    return reported


def losses(reported: Sequence[events.Event], kind: Any = events.Step) -> dict[int, float]:
    """Return the loss of each step, or with `kind` of each evaluation."""
    return {e.step: e.scalars["loss/total"] for e in reported if isinstance(e, kind)}


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the largest relative difference of two losses of the same step."""
    common = one.keys() & other.keys()
    if not common:
        raise StageFailed("two trainings have no step in common; see the logs")
    return max(abs(one[step] / other[step] - 1) for step in common)


def compare_precisions(options: Options) -> Iterator[Row]:
    """Train without dropout, because a compiled model draws other random numbers."""
    found: dict[str, dict[int, float]] = {}
    for compiled, precision in itertools.product((False, True), ("float32", "bfloat16")):
        if compiled and not options.gpu:
            continue
        name = f"compiled-{precision}" if compiled else precision
        run = make_run(options, name, steps=20, precision=precision, compile=compiled)
        found[name] = losses(train(run, NO_DROPOUT))
        yield Row(f"loss, {name}", list(found[name].values()))
        if compiled:
            largest = difference(found[name], found[precision])
            limit = 0.005 if precision == "float32" else 0.1
            yield Row(f"largest difference, {name} from {precision}", largest, limit)
    largest = difference(found["bfloat16"], found["float32"])
    yield Row("largest difference, bfloat16 from float32", largest, 0.1)


def resume(options: Options) -> Iterator[Row]:
    """On a CPU, losses are equal bit for bit. A GPU adds up gradients in any order."""
    from electra_wrap.engine import Checkpoint
    from electra_wrap.native import engine

    steps, gpu = (400, True) if options.gpu else (40, False)
    settings = {"steps": steps, "save_every": steps // 8, "evaluate_every": steps // 2}
    run = make_run(options, "undisturbed", **settings)
    undisturbed = train(run)
    in_training = losses(undisturbed, events.Evaluation)
    evaluations: list[events.Event] = []
    checkpoint = Checkpoint(engine.NAME, steps // 2, run.model_dir)
    engine.evaluate(run, checkpoint, [], evaluations.append)
    alone = losses(evaluations, events.Evaluation)
    yield Row("loss of held-out examples", alone[steps // 2])
    yield Row(
        "difference from the evaluation in training", difference(alone, in_training), gpu / 20
    )

    run = make_run(options, "killed", **settings)
    killed = losses(train(run, kill=True))
    yield Row("last step before SIGKILL", max(killed))
    if max(killed) == steps:
        raise StageFailed("the training ended before it was killed; run again")
    for path in run.model_dir.glob("*.partial"):  # as `electra_wrap run` does
        files.remove(path)
    resumed = losses(train(run))
    first = min(resumed)
    yield Row("first step after resuming", first)
    if first == 1:
        raise StageFailed("the training started again; see the logs")
    before = {step: loss for step, loss in killed.items() if step == first}
    yield Row("difference from the same step before", difference(before, resumed), gpu / 1000)
    largest = difference(resumed, losses(undisturbed))
    yield Row("largest difference from the undisturbed training", largest, gpu / 20)


def bench(options: Options, name: str, vocab_size: int, *overrides: str) -> Iterator[Row]:
    """Measure the speed of a profile. `bench` makes a skipped CUDA graph an error."""
    from electra_wrap.tools import bench as tool

    steps = (1200 if name == "spanish-small" else 240) if options.gpu else 12
    profile = load_profile(options, name, *overrides)
    (result,) = tool.bench(profile, ["native"], steps, vocab_size)
    for key, value in result.items():
        yield Row(key.replace("_", " "), value)


def profile_steps(options: Options) -> Iterator[Row]:
    """Train in this process, time some steps, and record the next ten."""
    # CUPTI, which records, must be loaded before CUDA graphs are captured, and stay.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    os.environ |= subprocesses.child_environment({})
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from electra_wrap.native import train as trainer

    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA if options.gpu else kinds.CPU]
    with torch.profiler.profile(activities=activities):
        torch.ones(1, device="cuda" if options.gpu else "cpu")
    profiler = torch.profiler.profile(activities=activities)
    start, end, steps = (40, 90, 10) if options.gpu else (3, 8, 10)
    run = make_run(options, "profiled", steps=end + steps + 2, log_every=1000)
    counter, clocks = itertools.count(1), {}

    def after_step(*_: Any) -> None:
        step = next(counter)
        if step in (start, end, end + steps):
            if options.gpu:
                torch.cuda.synchronize()
            clocks[step] = time.perf_counter()
        if step == end:
            profiler.start()
        if step == end + steps:
            profiler.stop()

    register_optimizer_step_post_hook(after_step)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(run.directory)
    trace = options.out / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        found = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    duration = (clocks[end] - clocks[start]) / (end - start) * 1000
    yield Row("milliseconds a step", duration)
    yield from summarize(found, steps, duration, gpu=options.gpu)


def summarize(
    trace: Sequence[Mapping[str, Any]], steps: int, duration: float, *, gpu: bool
) -> Iterator[Row]:
    """Summarize a trace of steps that take `duration` milliseconds when nothing is recorded.

    On a CPU, the outermost operators take the place of kernels.
    """
    launches = sum(event["name"].startswith("cudaGraphLaunch") for event in trace)
    yield Row("CUDA graph launches a step", launches / steps)
    if gpu and not launches:
        raise StageFailed("no CUDA graph was launched; see the warnings above")
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if gpu else ("cpu_op",)
    totals: collections.Counter[str] = collections.Counter()
    number, busy, end = 0, 0.0, 0.0
    work = (event for event in trace if event.get("cat") in kinds)
    for event in sorted(work, key=lambda event: event["ts"]):
        if gpu or event["ts"] >= end:
            number += event["cat"] == kinds[0]
            totals[event["name"]] += event["dur"]
        event_end = event["ts"] + event["dur"]
        busy += max(0.0, event_end - max(event["ts"], end))
        end = max(end, event_end)
    busy /= 1000 * steps
    yield Row("kernels a step" if gpu else "operators a step", number / steps)
    yield Row("busy milliseconds a step", busy)
    yield Row("idle share", max(0.0, 1 - busy / duration))
    for name, total in totals.most_common(10):
        yield Row(f"milliseconds a step in {name[:100]}", total / 1000 / steps)


def two_processes(options: Options) -> Iterator[Row]:
    """Train without dropout, which differs between processes."""
    settings = {"steps": 20, "precision": "float32"}
    one = losses(train(make_run(options, "one", **settings), NO_DROPOUT))
    os.environ["CUDA_VISIBLE_DEVICES"] = options.two_gpus
    two = losses(train(make_run(options, "two", **settings), *TORCHRUN, NO_DROPOUT))
    yield Row("largest difference of two processes from one", difference(two, one), 0.005)
    if options.gpu:
        yield from bench(options, "spanish-small", 30_522)


def describe_machine(options: Options) -> Iterator[Row]:
    """Yield what the measurements depend on."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False) if gpus else None
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    yield Row("date", datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"))
    yield Row("number of GPUs", len(gpus))
    yield Row("GPU", gpus[0] if gpus else "none")
    yield Row("driver", driver.stdout.split("\n")[0] if driver else "none")
    yield Row("processor", f"{os.cpu_count()} × {processor[1] if processor else 'unknown'}")
    versions = [f"Python {platform.python_version()}", f"CUDA {torch.version.cuda}"]
    versions += [f"{package} {importlib.metadata.version(package)}" for package in PACKAGES]
    yield Row("versions", ", ".join(versions))


#: Parts, with their limits in seconds.
PARTS: dict[str, tuple[Part, int]] = {
    "examples": (build_examples, 60),
    "a. precision and compilation": (compare_precisions, 330),
    "b. SIGKILL and resume": (resume, 300),
    "c. bench of small, 30,522 words": (lambda o: bench(o, "spanish-small", 30_522), 240),
    "c. bench of small, 119,547 words": (lambda o: bench(o, "spanish-small", 119_547), 240),
    "c. bench of base at 128 tokens": (lambda o: bench(o, "spanish-base-128", 30_522), 300),
    "d. profile of small": (profile_steps, 240),
    "e. two processes": (two_processes, 120),
}
CONTEXT = multiprocessing.get_context("fork")


def measure(part: str, function: Part, options: Options, limit: float) -> Outcome:
    """Run a part in a process of its own, for at most `limit` seconds."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=send_rows, args=(sender, function, options, os.getpid()))
    started = time.monotonic()
    process.start()
    sender.close()
    rows: list[Row] = []
    above: list[str] = []
    error: str | None = f"it took longer than {limit} s"
    try:
        while receiver.poll(max(0.0, started + limit - time.monotonic())):
            message = receiver.recv()
            if not isinstance(message, Row):
                error = message
                break
            rows.append(message)
            if message.limit is not None and not message.value <= message.limit:
                above.append(f"{message.name}: {message} is above {message.limit:g}")
    except EOFError:
        process.join()
        error = f"its process ended with code {process.exitcode}"
    finally:
        process.terminate()
        process.join(30)
        process.kill()
    return Outcome(part, time.monotonic() - started, rows, error or "; ".join(above) or None)


def send_rows(sender: Any, function: Part, options: Options, parent: int) -> None:
    """Send the rows of a part, and then its error or None."""
    subprocesses.die_with_parent(parent)
    try:
        for row in function(options):
            sender.send(row)
        sender.send(None)
    except Exception as error:
        print(getattr(error, "log_tail", "") or traceback.format_exc(), file=sys.stderr)
        prefix = "" if isinstance(error, ElectraWrapError) else f"{type(error).__name__}: "
        message = " ".join(f"{prefix}{error}".split())
        sender.send(message.replace(str(options.directory), str(options.out)))  # of the logs


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write measure.json and measure.md."""
    files.write_json(out / "measure.json", [dataclasses.asdict(outcome) for outcome in outcomes])
    lines = ["| part | measurement | value |", "| --- | --- | --- |"]
    for outcome in outcomes:
        rows = [*outcome.rows, Row("seconds", round(outcome.seconds))]
        if outcome.error:
            rows.append(Row("failed", outcome.error))
        cells = [(row.name.replace("|", r"\|"), str(row)) for row in rows]
        lines += [f"| {outcome.part} | {name} | {value} |" for name, value in cells]
    files.write_text(out / "measure.md", "\n".join(lines) + "\n")


def bring_packages(wheels: Path | None, directory: Path) -> None:
    """Unpack wheels, and let children import what this process can import.

    EnvironmentProblem if packages are missing.
    """
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        zipfile.ZipFile(wheel).extractall(directory)
    sys.path.append(str(directory))
    ours, environment = {"PYTHONPATH": os.pathsep.join(sys.path)}, subprocesses.child_environment
    subprocesses.child_environment = lambda extra: environment(ours | extra)
    missing = [name for name in PACKAGES if not any(importlib.metadata.distributions(name=name))]
    if missing:
        raise EnvironmentProblem(f"missing: {', '.join(missing)}; bring their wheels with --wheels")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR")
    parser.add_argument("--parts", default="abcde")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    out, cpu = arguments.out.resolve(), arguments.cpu
    out.mkdir(parents=True, exist_ok=True)
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    with tempfile.TemporaryDirectory(prefix="electra_wrap-measure-") as name:
        options = Options(not cpu, Path(name, "run"), out, "-1" if cpu else ",".join(visible[:2]))
        try:
            bring_packages(arguments.wheels, Path(name, "packages"))
            outcomes = [measure("machine", describe_machine, options, 120)]
            gpus = next((row.value for row in outcomes[0].rows if row.name == "number of GPUs"), 0)
            if not gpus and not cpu:
                problem = outcomes[0].error or "PyTorch sees no GPU; check nvidia-smi, or add --cpu"
                raise EnvironmentProblem(problem)
        except EnvironmentProblem as error:
            print(f"measure_gpu: {error}", file=sys.stderr)
            return error.exit_code
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1" if cpu else visible[0]
        parts = [part for part in PARTS if part == "examples" or part[0] in arguments.parts]
        left_out = ("119,547", "base") if cpu else ("two processes",) if gpus < 2 else ()
        for part in parts:
            if not any(words in part for words in left_out):
                outcomes.append(measure(part, PARTS[part][0], options, PARTS[part][1]))
                print(f"{part}: {outcomes[-1].error or 'done'}", flush=True)
                write(outcomes, out)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(options.directory / "logs", out / "logs", dirs_exist_ok=True)
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
