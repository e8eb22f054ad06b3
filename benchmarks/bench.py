"""Measure the training speed of a profile on this machine, on generated text.

    python benchmarks/bench.py [--profile NAME] [--set KEY=VALUE …] [--engine ENGINE] [--steps N]

Prints a column for each engine. Speeds are medians. `share of peak` compares them with a large
matrix product in the same precision on the same device.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import events, files, initial_weights, profiles, subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.data import tokenization, vocab
from electra_wrap.engines import ENGINES, choose_devices, engine_of
from electra_wrap.errors import ElectraWrapError, UsageError
from electra_wrap.pipeline import execute
from electra_wrap.profile import Profile
from electra_wrap.run import Run

#: Intervals of the steps that are timed. The first third, with compilation, does not count.
INTERVALS = 12
MIN_VOCAB_SIZE = 10


def bench_profile(profile: Profile, engine: str, steps: int, directory: Path) -> Profile:
    """Return `profile` with the text and the vocabulary in `directory`, for `steps` steps."""
    train: dict[str, Any] = {"steps": steps, "save_every": steps, "log_every": steps // INTERVALS}
    train |= {"warmup_steps": 0, "evaluate_every": None}
    if engine == "upstream":  # what its scripts do not support
        train |= {"micro_batches": 1, "compile": "auto"}
        train["precision"] = profile.train.precision.replace("bfloat16", "auto")
    values, text = profile.model_dump() | {"engine": engine}, str(directory / "text.txt")
    values["corpus"] = {"source": text, "blank_lines_separate_documents": False}
    values["tokenizer"] = {"source": str(directory / "vocab.txt")}
    values["model"]["init_from"] = None
    values["train"] |= train
    return Profile.model_validate(values)


def flops_per_step(profile: Profile, vocab_size: int) -> float:
    """Return the floating-point operations of a training step of both networks.

    Two for each multiply-add, three times: forward, and twice backward (Kaplan et al. 2020, section
    2.1), for matrices, attention's two products, and the output layer at masked positions.
    """
    model, batch_size, total = profile.model, profile.train.batch_size, 0.0
    for shape in map(model.shape, NETWORKS):
        attention = 12 * shape.num_hidden_layers * shape.hidden_size * model.max_seq_length
        total += batch_size * model.max_seq_length * (6 * shape.matrix_parameters + attention)
    masked = batch_size * model.max_predictions_per_seq
    return total + 6 * masked * model.shape("generator").embedding_size * vocab_size


def measure_matmul(precision: str) -> float:
    """Return the floating-point operations per second of a large matrix product on one device."""
    import torch  # in a child process

    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.is_available()
    size, best = (8192 if gpu else 2048), float("inf")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device="cuda" if gpu else "cpu")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def write_text(directory: Path, vocab_size: int, tokens: int) -> None:
    """Write vocab.txt with generated words, and text.txt with words drawn uniformly."""
    words = [f"w{number}" for number in range(vocab_size - len(tokenization.SPECIAL_TOKENS))]
    files.write_text(directory / "vocab.txt", "\n".join([*tokenization.SPECIAL_TOKENS, *words, ""]))
    lines = np.random.default_rng(0).choice(words, (tokens // 16 + 64, 16))
    files.write_text(directory / "text.txt", "".join(" ".join(line) + "\n" for line in lines))


def measure(run: Run) -> dict[str, Any]:
    """Train the run, and return its settings and speeds."""
    execute(run, until="examples")
    run.make_model_dir()
    devices, reported = choose_devices(run), list[Any]()
    engine_of(run).train(run, devices, reported.append)
    setup = next(event for event in reported if isinstance(event, events.Setup)).values
    steps = [event for event in reported if isinstance(event, events.Step)]
    pairs = itertools.pairwise(steps[len(steps) // 3 :])
    speed = statistics.median((b.step - a.step) / (b.clock - a.clock) for a, b in pairs)
    job, env = {"precision": setup["precision"]}, {} if devices else {"CUDA_VISIBLE_DEVICES": "-1"}
    peak = subprocesses.call("bench", "measure_matmul", job, env=env) * max(1, len(devices))
    batch_size, length = run.profile.train.batch_size, run.profile.model.max_seq_length
    flops = speed * flops_per_step(run.profile, run.vocab_size)
    found = {"engine": run.profile.engine, "device": setup["device"], **job}
    found |= {"vocab_size": run.vocab_size, "batch_size": batch_size, "max_seq_length": length}
    return found | {
        "steps_per_second": speed,
        "tokens_per_second": speed * batch_size * length,
        "model_flops_per_second": flops,
        "share_of_peak": flops / peak,
    }


def bench(profile: Profile, engine: str, steps: int, vocab_size: int | None) -> dict[str, Any]:
    """Measure `steps` training steps of a profile."""
    with tempfile.TemporaryDirectory(prefix="electra_wrap-bench-") as name:
        directory, given = Path(name), Run(profile, Path(name, "given"))
        initial_weights.resolve(given, dry_run=True)  # sizes follow from model.init_from
        source, size = given.profile.tokenizer.source, vocab_size or profile.tokenizer.vocab_size
        if not (size or Path(source).is_file()):
            raise UsageError(f"{source} is not a local file; give its size: --vocab-size N")
        size = size or len(vocab.read(Path(source)))
        write_text(directory, size, 4 * profile.train.batch_size * profile.model.max_seq_length)
        derived = bench_profile(given.profile, engine, steps, directory)
        return measure(Run(derived, directory / engine))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="spanish-tiny", help="name or file (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--engine", choices=list(ENGINES), help="default: both")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="default: 120")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="default: the profile's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < INTERVALS or (arguments.vocab_size or MIN_VOCAB_SIZE) < MIN_VOCAB_SIZE:
        parser.error(f"give at least {INTERVALS} steps and {MIN_VOCAB_SIZE} tokens")
    os.environ["TORCHINDUCTOR_CUDAGRAPH_OR_ERROR"] = "1"  # else a skipped graph is a warning
    results, code = [], 0
    for engine in [arguments.engine] if arguments.engine else ENGINES:
        try:
            profile = profiles.load(arguments.profile, arguments.set)
            results.append(bench(profile, engine, arguments.steps, arguments.vocab_size))
        except ElectraWrapError as error:
            print(f"bench: {engine}: {error}", file=sys.stderr)
            code = error.exit_code
    if arguments.json:
        print(json.dumps(results, indent=2))
    for key in results[0] if results and not arguments.json else ():
        value = results[0][key]
        form = "" if isinstance(value, str) else ",.3g" if value < 1000 else ",.0f"
        print(f"{key.replace('_', ' '):24}", *(f"{result[key]:>16{form}}" for result in results))
    return 0 if results else code


if __name__ == "__main__":
    sys.exit(main())
