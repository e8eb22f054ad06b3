"""`bench`: measures the training speed of a profile with either engine, on generated text."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from electra_wrap import subprocesses
from electra_wrap.data import vocab
from electra_wrap.engines import choose_devices, engine_of
from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError
from electra_wrap.events import Event, Step
from electra_wrap.files import write_text
from electra_wrap.pipeline.execute import execute
from electra_wrap.profile import NETWORKS, EngineName, Profile
from electra_wrap.progress import log
from electra_wrap.run import Run

#: Intervals of the steps that are timed. The first third, with compilation, does not count.
INTERVALS = 12

#: Smallest vocabulary: as many words as special tokens.
MIN_VOCAB_SIZE = 2 * len(vocab.SPECIAL_TOKENS)

#: Settings and speeds of an engine.
Result = dict[str, Any]


def bench(
    profile: Profile, engines: Sequence[EngineName], steps: int, vocab_size: int | None
) -> list[Result]:
    """Train `steps` steps with each engine that is available, and return the results.

    Speeds are medians. `model_flops_per_second` are the floating-point operations of
    `flops_per_step`; `share_of_peak` compares them with a large matrix product on the same device.
    """
    size = vocab_size or _find_vocab_size(profile)
    if steps < INTERVALS or size < MIN_VOCAB_SIZE:
        problem = f"{steps} steps with {size} tokens are too few to measure"
        raise UsageError(f"{problem}; give at least {INTERVALS} and {MIN_VOCAB_SIZE}")
    results: list[Result] = []
    os.environ["TORCHINDUCTOR_CUDAGRAPH_OR_ERROR"] = "1"  # else a skipped graph is a warning
    with tempfile.TemporaryDirectory(prefix="electra_wrap-bench-") as name:
        directory = Path(name)
        _write_text(directory, size, 4 * profile.train.batch_size * profile.model.max_seq_length)
        for engine in engines:
            try:
                derived = bench_profile(profile, engine, steps, directory)
                results.append(_measure(Run(derived, directory / engine)))
            except (EnvironmentProblem, StageFailed) as error:
                if engine == engines[-1] and not results:
                    raise
                log(f"bench: {engine}: {error}")
    return results


def bench_profile(profile: Profile, engine: EngineName, steps: int, directory: Path) -> Profile:
    """Return `profile` with the text and the vocabulary in `directory`, for `steps` steps."""
    values = profile.model_dump()
    values["engine"] = engine
    text, vocabulary = str(directory / "text.txt"), str(directory / "vocab.txt")
    values["corpus"] = {"source": text, "blank_lines_separate_documents": False}
    values["tokenizer"] = {"source": vocabulary}
    values["model"] |= {"init_from": None, "init_optimizer": False}
    train = values["train"]
    train |= {"steps": steps, "warmup_steps": 0, "evaluate_every": None}
    train |= {"log_every": steps // INTERVALS, "save_every": steps}
    if engine == "upstream":  # its scripts support neither
        train["micro_batches"] = 1
        train["precision"] = train["precision"].replace("bfloat16", "auto")
    return Profile.model_validate(values)


def flops_per_step(profile: Profile, vocab_size: int) -> float:
    """Return the floating-point operations of a training step of both networks.

    Two for each multiply-add, for the forward pass and twice for the backward pass: 6 x weights x
    tokens for the matrices (Kaplan et al. 2020, section 2.1), 12 x layers x hidden size x length
    x tokens for the two products of attention, and the generator's output layer at the masked
    positions.
    """
    model, batch_size = profile.model, profile.train.batch_size
    tokens = batch_size * model.max_seq_length
    total = 0.0
    for network in NETWORKS:
        shape = model.shape(network)
        attention = 12 * shape.num_hidden_layers * shape.hidden_size * model.max_seq_length
        total += tokens * (6 * shape.matrix_parameters + attention)
    masked = batch_size * model.max_predictions_per_seq
    return total + 6 * masked * model.shape("generator").embedding_size * vocab_size


def _find_vocab_size(profile: Profile) -> int:
    if profile.tokenizer.vocab_size is not None:
        return profile.tokenizer.vocab_size
    source = profile.tokenizer.source
    if not Path(source).is_file():
        raise UsageError(f"{source} is not a local file; give its size: --vocab-size N")
    return len(vocab.read(Path(source)))


def _write_text(directory: Path, vocab_size: int, tokens: int) -> None:
    """Write vocab.txt with generated words, and text.txt with words drawn uniformly."""
    words = [f"w{number}" for number in range(vocab_size - len(vocab.SPECIAL_TOKENS))]
    write_text(directory / "vocab.txt", "\n".join([*vocab.SPECIAL_TOKENS, *words]) + "\n")
    lines = np.random.default_rng(0).choice(words, (tokens // 16 + 64, 16))
    write_text(directory / "text.txt", "".join(" ".join(line) + "\n" for line in lines))


def _measure(run: Run) -> Result:
    execute(run, until="examples")
    train, engine = run.profile.train, engine_of(run)
    devices = choose_devices(run, "bench")
    events: list[Event] = []
    engine.train(run, devices, events.append)
    steps = [event for event in events if isinstance(event, Step)]
    pairs = itertools.pairwise(steps[len(steps) // 3 :])
    speed = statistics.median((b.step - a.step) / (b.clock - a.clock) for a, b in pairs)
    precision = engine.precision(train.precision, devices)
    flops = speed * flops_per_step(run.profile, run.vocab_size)
    env = {} if devices else {"CUDA_VISIBLE_DEVICES": "-1"}
    job = {"precision": precision}
    peak = subprocesses.call("electra_wrap.native.devices", "measure_matmul", job, env=env)
    return {
        "engine": run.profile.engine,
        "device": " + ".join(devices) or "cpu",
        "precision": precision,
        "vocab_size": run.vocab_size,
        "batch_size": train.batch_size,
        "max_seq_length": run.profile.model.max_seq_length,
        "steps_per_second": speed,
        "sequences_per_second": speed * train.batch_size,
        "tokens_per_second": speed * train.batch_size * run.profile.model.max_seq_length,
        "model_flops_per_second": flops,
        "share_of_peak": flops / (peak * max(1, len(devices))),
    }


def show(results: Sequence[Result]) -> None:
    """Print results as a table with a column for each engine."""
    table = Table(box=None, show_header=False)
    for key in results[0]:
        table.add_row(key.replace("_", " "), *(_format(result[key]) for result in results))
    Console(highlight=False).print(table)


def _format(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
