"""How fast a profile trains here, with either engine: the stages that a run goes through, on text made up for it."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from electra_wrap import process, stages, vocab
from electra_wrap.errors import EnvironmentLacks, StageFailed, UsageError
from electra_wrap.profile import Profile
from electra_wrap.progress import say
from electra_wrap.rundir import RunDir, write_text

#: Parts of the steps that are timed one by one; the first third of them, with compilation and start-up, is not used.
WINDOWS = 12


def bench(profile: Profile, engines: Sequence[str], steps: int, vocab_size: int | None) -> list[dict[str, Any]]:
    """Train `steps` steps with each engine that is to be had; return what was measured.

    The median speed in steps, sequences and tokens a second, the model's floating-point operations a second
    (`Profile.flops_per_step`), and what share they are of a large matrix product's on the same device.
    """
    size = vocab_size or _vocab_size(profile)
    if steps < WINDOWS or size < 2 * len(vocab.SPECIAL_TOKENS):
        raise UsageError(f"--steps {steps}, a vocabulary of {size}: too few to time; give at least {WINDOWS} and 10")
    found = []
    with tempfile.TemporaryDirectory(prefix="electra_wrap-bench-") as name:
        directory = Path(name)
        _make_text(directory, size, 4 * profile.train.batch_size * profile.model.max_seq_length)
        for engine in engines:
            keys = profile.model_dump()
            keys["engine"] = engine
            if engine == "upstream":  # which has none of these
                keys["train"] |= {
                    "micro_batches": 1,
                    "precision": keys["train"]["precision"].replace("bfloat16", "auto"),
                }
            keys["corpus"] |= {"source": str(directory / "text.txt"), "max_lines": None, "held_out": 0.0}
            keys["corpus"] |= {"blank_lines_separate_documents": False}
            keys["tokenizer"] |= {"source": str(directory / "vocab.txt"), "sha256": None, "vocab_size": None}
            keys["train"] |= {"steps": steps, "warmup_steps": 0, "log_every": steps // WINDOWS, "save_every": steps}
            run = stages.Run(Profile.model_validate(keys), RunDir(directory / engine))
            try:
                found.append(_measure(run))
            except (EnvironmentLacks, StageFailed) as error:
                if engine == engines[-1] and not found:
                    raise
                say(f"bench: {engine}: {error}")
    return found


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print what `bench` measured."""
    table = Table("engine", "device", "precision", "steps/s", "sequences/s", "tokens/s", "TFLOP/s", "of peak", box=None)
    for one in results:
        speeds = (one[f"{unit}_per_second"] for unit in ("steps", "sequences", "tokens"))
        shown = [f"{speed:,.4g}" if speed < 1000 else f"{speed:,.0f}" for speed in speeds]
        flops = f"{one['model_flops_per_second'] / 1e12:,.3g}"
        table.add_row(
            *(one[key] for key in ("engine", "device", "precision")), *shown, flops, f"{one['share_of_peak']:.0%}"
        )
    console = Console()
    console.print(table, width=max(console.width, 120), crop=False)


def _vocab_size(profile: Profile) -> int:
    keys = profile.tokenizer
    if keys.vocab_size is None and not Path(keys.source).is_file():
        raise UsageError(f"the vocabulary {keys.source} is not here; say how many words it has: --vocab-size N")
    return keys.vocab_size or len(vocab.read(Path(keys.source)))


def _make_text(directory: Path, size: int, tokens: int) -> None:
    """Write a vocabulary of made-up words, and text of them in which each is as likely as the other."""
    words = [f"w{number}" for number in range(size - len(vocab.SPECIAL_TOKENS))]
    write_text(directory / "vocab.txt", "".join(f"{word}\n" for word in (*vocab.SPECIAL_TOKENS, *words)))
    lines = np.random.default_rng(0).choice(words, (tokens // 16 + 64, 16))
    write_text(directory / "text.txt", "".join(" ".join(line) + "\n" for line in lines))


def _measure(run: stages.Run) -> dict[str, Any]:
    keys = run.profile.train
    stages.execute(run, run.engine.DATA)
    gpus = stages.choose_device(run, "bench")
    times: list[tuple[int, float]] = []
    run.engine.train(run, gpus, lambda told: times.append((told["step"], time.perf_counter())))
    used = times[len(times) // 3 :]
    speed = statistics.median(
        (step - before) / (now - then) for (before, then), (step, now) in itertools.pairwise(used)
    )
    precision = run.engine.precision(keys.precision, gpus)
    words = len(vocab.read(run.vocabulary))
    flops = speed * run.profile.flops_per_step(words)
    peak = process.call("electra_wrap.native.devices", {"precision": precision}) * max(1, len(gpus))
    return {
        "engine": run.profile.engine,
        "device": " + ".join(gpus) or "cpu",
        "precision": precision,
        "vocab_size": words,
        "batch_size": keys.batch_size,
        "max_seq_length": run.profile.model.max_seq_length,
        "steps_per_second": speed,
        "sequences_per_second": speed * keys.batch_size,
        "tokens_per_second": speed * keys.batch_size * run.profile.model.max_seq_length,
        "model_flops_per_second": flops,
        "share_of_peak": flops / peak,
    }
