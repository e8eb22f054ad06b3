"""Measure the native engine on a machine with a GPU.

    python benchmarks/measure_gpu.py --out DIR [--parts abcde] [--cpu]

TensorFlow and an installation are not needed. On an H100 this takes about 20 minutes:

    a  20 steps without dropout: compiled against not compiled, bfloat16 against float32
    b  train, evaluate, SIGKILL and resume, compared with an undisturbed training
    c  bench.py with small (30,522 and 119,547 words) and with base at 128 tokens
    d  a profile of ten steps of small. Its trace is written, too.
    e  two processes on two GPUs against one, and bench.py with small on them

DIR gets the table measure.md and run/logs. A part that fails is a line of the table, and the others
still run. --cpu runs the parts with a small model, without compiling it, on a CPU. To a machine
without a network, bring wheels: pip install --no-deps --target DIR *.whl; export PYTHONPATH=DIR.
"""

import argparse
import collections
import contextlib
import datetime
import gzip
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402

from electra_wrap import checkpoints, events, files, profiles, subprocesses  # noqa: E402
from electra_wrap.native import engine  # noqa: E402
from electra_wrap.pipeline import execute  # noqa: E402
from electra_wrap.profile import Profile  # noqa: E402
from electra_wrap.run import Run  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
NO_DROPOUT = str(ROOT / "tests" / "children" / "native_no_dropout.py")

#: Largest relative difference of a loss.
LIMITS = {"float32": 0.005, "bfloat16": 0.1}

#: Settings for a GPU, and those of --cpu.
GPU = ("train.device=gpu", "train.compile=true")
CPU = (
    *("train.device=cpu", "train.batch_size=8", "model.max_seq_length=32"),
    *("model.hidden_size=64", "model.num_hidden_layers=1", "model.generator_hidden_size=1.0"),
)


class Options(NamedTuple):
    """Whether to use a GPU, where results go, and CUDA's names of two GPUs."""

    gpu: bool
    out: Path
    two_gpus: str


class Row(NamedTuple):
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


Rows = Iterator[Row]
Part = Callable[[Options], Rows]


def load_profile(options: Options, name: str, *overrides: str) -> Profile:
    return profiles.load(name, ["engine=native", *(GPU if options.gpu else CPU), *overrides])


def make_run(options: Options, model_name: str, **train: Any) -> Run:
    """Return the run with a model of this name, and write its profile for the trainer."""
    profile = load_profile(options, "spanish-small", f"model_name={model_name}")
    profile = bench.bench_profile(profile, "native", train["steps"], options.out)
    values = {"warmup_steps": 2, "log_every": 1, **train}
    values = {f"train.{key}": value for key, value in values.items()} | {"corpus.held_out": 0.2}
    run = Run(profile.with_values(values), options.out / "run")
    run.directory.mkdir(exist_ok=True)
    files.write_json(run.directory / "profile.json", run.profile.model_dump())
    return run


def build_examples(options: Options) -> Rows:
    """Generate text and a vocabulary of BERT's size, and build examples."""
    bench.write_text(options.out, 30_522 if options.gpu else 1000, 2**18)
    run = make_run(options, "none", steps=20)
    execute(run, until="examples")
    yield from (Row(key, value) for key, value in run.results(run.examples_record).items())


class Killed(Exception): ...


def train(run: Run, *argv: str, kill: bool = False) -> list[events.Event]:
    """Train a run and return its events. With `kill`, send SIGKILL after its first checkpoint."""
    reported: list[events.Event] = []

    def on_event(event: events.Event) -> None:
        reported.append(event)
        saved = min(checkpoints.steps(run.model_dir), default=2**40)
        if kill and isinstance(event, events.Step) and event.step > saved:
            raise Killed  # `follow` then kills the child

    argv = (sys.executable, "-s", *(argv or ("-m", "electra_wrap.native.train")))
    with contextlib.suppress(Killed):
        log = run.log_file("train")
        subprocesses.follow([*argv, str(run.directory)], log=log, on_event=on_event)
    return reported


def losses(reported: Sequence[Any], kind: Any = events.Step) -> dict[int, float]:
    """Return the loss of each step, or of each evaluation."""
    return {e.step: e.scalars["loss/total"] for e in reported if isinstance(e, kind)}


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the largest relative difference of two losses of the same step."""
    common = one.keys() & other.keys()
    assert common, "two trainings have no step in common; see the logs"
    return max(abs(one[step] / other[step] - 1) for step in common)


def compare_precisions(options: Options) -> Rows:
    """Train without dropout, because a compiled model draws other random numbers."""
    found: dict[str, dict[int, float]] = {}
    for compiled, precision in itertools.product([False, True][: 1 + options.gpu], LIMITS):
        name = f"compiled-{precision}" if compiled else precision
        run = make_run(options, name, steps=20, precision=precision, compile=compiled)
        found[name] = losses(train(run, NO_DROPOUT))
        yield Row(f"loss, {name}", list(found[name].values()))
        if compiled:
            largest = difference(found[name], found[precision])
            yield Row(f"largest difference, {name} from {precision}", largest, LIMITS[precision])
    largest = difference(found["bfloat16"], found["float32"])
    yield Row("largest difference, bfloat16 from float32", largest, LIMITS["bfloat16"])


def resume(options: Options) -> Rows:
    """On a CPU, losses are equal bit for bit. A GPU adds up gradients in any order."""
    steps, gpu = (400, True) if options.gpu else (40, False)
    settings = {"steps": steps, "save_every": steps // 8, "evaluate_every": steps // 2}
    run = make_run(options, "undisturbed", **settings)
    undisturbed, evaluations = train(run), list[Any]()
    engine.evaluate(run, steps // 2, [], evaluations.append)
    alone = losses(evaluations, events.Evaluation)
    yield Row("loss of held-out examples", alone[steps // 2])
    apart = difference(alone, losses(undisturbed, events.Evaluation))
    yield Row("difference from the evaluation in training", apart, gpu / 20)

    run = make_run(options, "killed", **settings)
    killed = losses(train(run, kill=True))
    for path in run.model_dir.glob("*.partial"):  # as `electra_wrap run` does
        files.remove(path)
    resumed = losses(train(run))
    first = min(resumed)
    yield Row("last step before SIGKILL", max(killed), steps - 1)
    yield Row("first step after resuming", first)
    assert first > 1, "the training started again; see the logs"
    apart = difference({first: killed[first]}, resumed)
    yield Row("difference from the same step before", apart, gpu / 1000)
    largest = difference(resumed, losses(undisturbed))
    yield Row("largest difference from the undisturbed training", largest, gpu / 20)


def run_bench(options: Options, name: str, vocab_size: int) -> Rows:
    """Measure the speed of a profile. A skipped CUDA graph is an error."""
    os.environ["TORCHINDUCTOR_CUDAGRAPH_OR_ERROR"] = "1"
    steps = 12 if not options.gpu else 1200 if name == "spanish-small" else 240
    result = bench.bench(load_profile(options, name), "native", steps, vocab_size)
    yield from (Row(key.replace("_", " "), value) for key, value in result.items())


def profile_steps(options: Options) -> Rows:
    """Train in this process, time some steps, and record the next ten."""
    # CUPTI, which records, must be loaded before CUDA graphs are captured, and stay.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    os.environ |= subprocesses.child_environment()
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
) -> Rows:
    """Summarize a trace of steps that take `duration` milliseconds when nothing is recorded.

    On a CPU, the outermost operators take the place of kernels.
    """
    launches = sum(event["name"].startswith("cudaGraphLaunch") for event in trace)
    yield Row("CUDA graph launches a step", launches / steps)
    assert launches or not gpu, "no CUDA graph was launched; see the warnings above"
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


def two_processes(options: Options) -> Rows:
    """Train without dropout, which differs between processes."""
    settings = {"steps": 20, "precision": "float32"}
    one = losses(train(make_run(options, "one", **settings), NO_DROPOUT))
    os.environ["CUDA_VISIBLE_DEVICES"] = options.two_gpus
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = losses(train(make_run(options, "two", **settings), *torchrun, NO_DROPOUT))
    yield Row("largest difference of two processes from one", difference(two, one), 0.005)
    if options.gpu:
        yield from run_bench(options, "spanish-small", 30_522)


def describe_machine(options: Options) -> Rows:
    """Yield what the measurements depend on."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    number = torch.cuda.device_count()
    gpus = subprocess.check_output(query, text=True).splitlines() if number else ["none"]
    processors = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = [f"Python {platform.python_version()}", f"CUDA {torch.version.cuda}"]
    versions += [f"{name} {installed[name]}" for name in PACKAGES if name in installed]
    yield Row("date", datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"))
    yield Row("number of GPUs", number)
    yield Row("GPU", gpus[0])
    yield Row("processor", f"{len(processors)} × {processors[0]}")
    yield Row("versions", ", ".join(versions))


#: Parts, with their limits in seconds.
PARTS: dict[str, tuple[Part, int]] = {
    "examples": (build_examples, 60),
    "a. precision and compilation": (compare_precisions, 330),
    "b. SIGKILL and resume": (resume, 300),
    "c. small, 30,522 words": (lambda o: run_bench(o, "spanish-small", 30_522), 240),
    "c. small, 119,547 words": (lambda o: run_bench(o, "spanish-small", 119_547), 240),
    "c. base at 128 tokens": (lambda o: run_bench(o, "spanish-base-128", 30_522), 300),
    "d. profile of small": (profile_steps, 240),
    "e. two processes": (two_processes, 120),
}


def measure(function: Part, options: Options, limit: float) -> list[Row]:
    """Run a part in a process of its own, for at most `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(sender, function, options))
    started = time.monotonic()
    process.start()
    sender.close()
    rows: list[Row] = []
    error: str | None = f"it took longer than {limit} s"
    try:
        while receiver.poll(max(0.0, started + limit - time.monotonic())):
            if not isinstance(message := receiver.recv(), Row):
                error = message
                break
            rows.append(message)
    except EOFError:
        process.join()
        error = f"its process ended with code {process.exitcode}"
    process.terminate()
    process.join(30)
    process.kill()
    limited = (row for row in rows if row.limit is not None and not row.value <= row.limit)
    error = error or "; ".join(f"{row.name}: {row} is above {row.limit:g}" for row in limited)
    rows.append(Row("seconds", round(time.monotonic() - started)))
    return [*rows, Row("failed", error)] if error else rows


def send_rows(sender: Any, function: Part, options: Options) -> None:
    """Send the rows of a part, and then its error or None."""
    subprocesses.die_with_parent()
    try:
        for row in function(options):
            sender.send(row)
        sender.send(None)
    except Exception as error:
        print(getattr(error, "log_tail", "") or traceback.format_exc(), file=sys.stderr)
        sender.send(" ".join(f"{type(error).__name__}: {error}".split()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", default="abcde", help="default: %(default)s")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    out, cpu = arguments.out.resolve(), arguments.cpu
    out.mkdir(parents=True)
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1").split(",")
    options = Options(not cpu, out, "-1" if cpu else ",".join(visible[:2]))
    measured = {"machine": measure(describe_machine, options, 120)}
    machine = {row.name: row.value for row in measured["machine"]}
    if not (gpus := machine.get("number of GPUs", 0)) and not cpu:
        parser.error(machine.get("failed", "PyTorch sees no GPU; check nvidia-smi, or add --cpu"))
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1" if cpu else visible[0]
    left_out = ("119,547", "base") if cpu else ("two processes",) if gpus < 2 else ()
    for part, (function, limit) in PARTS.items():
        chosen = part == "examples" or part[0] in arguments.parts
        if chosen and not any(words in part for words in left_out):
            measured[part] = measure(function, options, limit)
            pairs = [(name, row) for name, rows in measured.items() for row in rows]
            lines = [f"| {name} | {row.name} | {row} |\n" for name, row in pairs]
            table = "".join(["| part | measurement | value |\n| --- | --- | --- |\n", *lines])
            (out / "measure.md").write_text(table, encoding="utf-8")
            print(f"{part}: {'failed' if 'failed' in lines[-1] else 'done'}", flush=True)
    files.remove(out / "run" / "models")
    return int(any(rows[-1].name == "failed" for rows in measured.values()))


if __name__ == "__main__":
    sys.exit(main())
