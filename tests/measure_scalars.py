"""What telling the scalars of a step costs: one training in which every other step tells them, with either engine.

    python tests/measure_scalars.py [--profile NAME] [--set KEY=VALUE …] [--steps N]

Prints the medians of the steps that tell and of those that do not, and what the difference is, in % of a step, where
one step in `train.log_every` tells. TensorBoard's file is written by another process, and is in none of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import TESTS

from electra_wrap import process, stages, training
from electra_wrap.profile import ENGINES, Profile
from electra_wrap.rundir import RunDir, write_json
from electra_wrap.upstream import checkout

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--profile", default="spanish-tiny")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

for engine in ENGINES:
    keys = ("train.log_every=2", f"train.steps={arguments.steps}", "train.warmup_steps=0", f"engine={engine}")
    log_every = Profile.load(arguments.profile, arguments.set).train.log_every
    with tempfile.TemporaryDirectory() as directory:
        run = stages.Run(Profile.load(arguments.profile, [*arguments.set, *keys]), RunDir(Path(directory)))
        stages.execute(run, run.engine.DATA)
        run.engine.prepare(run)
        write_json(run.directory / "profile.json", run.profile.model_dump())
        write_json(run.directory / "hparams.json", run.hparams())
        source = checkout.ensure() if engine == "upstream" else "-"
        child = subprocess.Popen(
            [sys.executable, str(TESTS / "children" / "step_times.py"), engine, str(run.directory.path), str(source)],
            env=process.environment({}),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout
        times: list[float] = []
        with training.Monitor(run, 0, []) as monitor:
            for line in child.stdout:
                if line.startswith('{"step"'):
                    monitor(json.loads(line))
                elif line.startswith("times "):
                    times = json.loads(line.removeprefix("times "))
        assert child.wait() == 0
    # times[i] is when step i + 1 was done; its even numbers tell. A tenth is start-up.
    took = [(number, now - before) for number, (before, now) in enumerate(itertools.pairwise(times), 2)]
    took = took[len(took) // 10 :]
    on = statistics.median(seconds for number, seconds in took if number % 2 == 0)
    off = statistics.median(seconds for number, seconds in took if number % 2)
    print(
        f"{engine:9} {1000 * off:.2f} ms a step, {1000 * on:.2f} ms with scalars: {1000 * (on - off):.2f} ms, "
        f"{100 * (on - off) / off:.1f}% of a step, {100 * (on - off) / off / log_every:.2f}% with one in {log_every}",
        flush=True,
    )
