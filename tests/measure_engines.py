"""Loss curves of both engines from scratch: do they lie on each other, within what seeds differ?

    python tests/measure_engines.py CORPUS [--profile NAME] [--steps N] [--seeds N] [--set KEY=VALUE …]

Trains the profile on CORPUS with each engine and each seed, in turn, and prints mean losses of windows of steps, the
largest difference between two seeds of one engine and between the engines' means, and the median seconds of a step.
Upstream's records are put in random order and into one file first, so that both engines see the same kind of batches:
its reader opens a file again before it has read the others, and mixes a hundred neighbours. --as-they-are leaves them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import stages
from electra_wrap.profile import Profile
from electra_wrap.rundir import RunDir

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("corpus", type=Path)
parser.add_argument("--profile", default="spanish-tiny")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--windows", type=int, default=8)
parser.add_argument("--as-they-are", action="store_true")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
arguments = parser.parse_args()


def shuffle_records(directory: Path, seed: int) -> None:
    """Put a directory's records in one file, in random order. (Each has 12 bytes before it and 4 behind it.)"""
    files = sorted(directory.iterdir())
    records = []
    for path in files:
        content = path.read_bytes()
        while content:
            end = 16 + int.from_bytes(content[:8], "little")
            records.append(content[:end])
            content = content[end:]
    order = np.random.default_rng(seed).permutation(len(records))
    for path in files[1:]:
        path.unlink()
    files[0].write_bytes(b"".join(records[number] for number in order))


curves: dict[str, list[np.ndarray]] = {"upstream": [], "native": []}
seconds: dict[str, list[float]] = {"upstream": [], "native": []}
with tempfile.TemporaryDirectory() as directory:
    for seed, engine in itertools.product(range(arguments.seeds), curves):
        keys = [
            *(f"corpus.source={json.dumps(str(arguments.corpus.resolve()))}", f"train.steps={arguments.steps}"),
            *(
                "train.log_every=1",
                f"train.warmup_steps={arguments.steps // 10}",
                f"train.save_every={arguments.steps}",
            ),
            *("train.device=cpu", f"train.seed={seed}", f"engine={engine}", *arguments.set),
        ]
        run = stages.Run(Profile.load(arguments.profile, keys), RunDir(Path(directory) / f"{engine}-{seed}"))
        stages.execute(run, run.engine.DATA)
        run.engine.prepare(run)
        if engine == "upstream" and not arguments.as_they_are:
            shuffle_records(run.directory / run.engine.OUTPUTS[0], seed)
        losses: list[float] = []
        times: list[float] = []

        def step(told: dict[str, Any], losses: list[float] = losses, times: list[float] = times) -> None:
            losses.append(told["loss/total"])
            times.append(time.perf_counter())

        run.engine.train(run, [], step)
        curves[engine].append(np.array([part.mean() for part in np.array_split(np.array(losses), arguments.windows)]))
        seconds[engine].append(statistics.median(np.diff(times[10:])))
        print(f"{engine:9} seed {seed}", *(f"{mean:7.3f}" for mean in curves[engine][-1]), flush=True)

both = {engine: np.stack(found) for engine, found in curves.items()}
spread = max(float(np.ptp(found, axis=0).max()) for found in both.values())
between = float(np.abs(both["native"].mean(0) - both["upstream"].mean(0)).max())
last = np.abs(both["native"].mean(0) - both["upstream"].mean(0))[-1]
print(f"largest difference between seeds of one engine {spread:.3f}, between the engines' means {between:.3f}")
print(f"in the last window, between the engines' means {last:.3f}")
for engine, found in seconds.items():
    print(f"{engine:9} {statistics.median(found):.4f} s a step")
