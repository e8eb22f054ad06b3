"""Measure what reporting the scalars of a step costs, with either engine.

    python tests/measure_scalars.py [--profile NAME] [--set KEY=VALUE …] [--steps N]

Every other step of one training reports its scalars. Prints the median time of the steps with and
without, and the difference in % of a step, where one step in `train.log_every` reports. The process
that writes TensorBoard's file does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from conftest import TESTS

from electra_wrap import engines, events, profiles, subprocesses
from electra_wrap.files import write_json
from electra_wrap.monitor.training import TrainingMonitor
from electra_wrap.pipeline.execute import execute
from electra_wrap.profile import ENGINE_NAMES
from electra_wrap.run import Run
from electra_wrap.upstream import checkout
from electra_wrap.upstream.hparams import hparams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--profile", default="spanish-tiny")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()


def train(engine: str, directory: Path) -> list[float]:
    """Train a run; return when each step ended, in seconds."""
    settings = [f"engine={engine}", f"train.steps={arguments.steps}"]
    settings += ["train.log_every=2", "train.warmup_steps=0"]
    run = Run(profiles.load(arguments.profile, [*arguments.set, *settings]), directory)
    execute(run, until="examples")
    engines.engine_of(run).prepare(run)
    write_json(run.directory / "hparams.json", hparams(run.profile, run.vocab_size))
    source = checkout.ensure() if engine == "upstream" else Path("-")
    script = TESTS / "children" / "step_times.py"
    child = subprocess.Popen(
        [sys.executable, str(script), engine, str(run.directory), str(source)],
        env=subprocesses.child_environment({}),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    times: list[float] = []
    with TrainingMonitor(run, 0) as monitor:
        for line in child.stdout:
            if event := events.parse(line):
                monitor(event)
            elif line.startswith("times "):
                times = json.loads(line.removeprefix("times "))
    assert child.wait() == 0
    return times


log_every = profiles.load(arguments.profile, arguments.set).train.log_every
for engine in ENGINE_NAMES:
    with tempfile.TemporaryDirectory() as temporary:
        times = train(engine, Path(temporary))
    # The first tenth is start-up. Every other step reports, beginning with step 2.
    durations = np.diff(times)[len(times) // 20 * 2 :]
    reporting, silent = np.median(durations[::2]), np.median(durations[1::2])
    cost = reporting / silent - 1
    print(f"{engine:9} {1000 * silent:.2f} ms a step, {1000 * reporting:.2f} ms with scalars:")
    print(f"{cost:.1%} of a step, {cost / log_every:.2%} with one in {log_every}", flush=True)
