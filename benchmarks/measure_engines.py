"""Compare the loss curves of both engines from scratch with the difference between seeds.

    python benchmarks/measure_engines.py CORPUS [--profile NAME] [--steps N] [--set KEY=VALUE …]

Trains the profile on CORPUS with each engine and each seed in turn. Prints mean losses of windows
of steps, the largest difference between seeds of one engine and between the engines' means, and
the median seconds of a step. Upstream's records are first shuffled into one file, so that both
engines see the same kind of batches: its reader opens a file again before it has read the others,
and shuffles a hundred neighbors.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import events, profiles
from electra_wrap.engines import ENGINES, engine_of
from electra_wrap.pipeline import execute
from electra_wrap.run import Run

WINDOWS = 8


def shuffle_records(directory: Path, seed: int) -> None:
    """Put a directory's records into one file, in random order.

    A record has 12 bytes before its content and 4 after it.
    """
    files, records = sorted(directory.iterdir()), []
    for path in files:
        content = path.read_bytes()
        while content:
            end = 16 + int.from_bytes(content[:8], "little")
            records.append(content[:end])
            content = content[end:]
        path.unlink()
    order = np.random.default_rng(seed).permutation(len(records))
    files[0].write_bytes(b"".join(records[number] for number in order))


def train(
    arguments: argparse.Namespace, engine: str, seed: int, directory: Path
) -> tuple[np.ndarray, float]:
    """Return the mean losses of the windows and the median seconds of a step."""
    steps, source = arguments.steps, json.dumps(str(arguments.corpus.resolve()))
    settings = f"""engine={engine} train.seed={seed} train.device=cpu train.log_every=1
        train.steps={steps} train.warmup_steps={steps // 10} train.save_every={steps}"""
    overrides = [f"corpus.source={source}", *settings.split(), *arguments.set]
    run = Run(profiles.load(arguments.profile, overrides), directory)
    execute(run, until="examples")
    run.make_model_dir()
    if engine == "upstream":
        shuffle_records(run.examples[0], seed)
    reported: list[Any] = []
    engine_of(run).train(run, [], reported.append)
    reported = [event for event in reported if isinstance(event, events.Step)]
    windows = np.array_split([event.scalars["loss/total"] for event in reported], WINDOWS)
    times = np.diff([event.clock for event in reported[10:]])
    return np.array([window.mean() for window in windows]), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--profile", default="spanish-tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    curves: dict[str, list[np.ndarray]] = {engine: [] for engine in ENGINES}
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as directory:
        for seed, engine in itertools.product(range(arguments.seeds), ENGINES):
            curve, median = train(arguments, engine, seed, Path(directory) / f"{engine}-{seed}")
            curves[engine].append(curve)
            seconds[engine].append(median)
            print(f"{engine:9} seed {seed}", *(f"{mean:7.3f}" for mean in curve), flush=True)
    between_seeds = max(np.ptp(curve, axis=0).max() for curve in curves.values())
    native, upstream = (np.mean(curves[engine], axis=0) for engine in ("native", "upstream"))
    between_engines = np.abs(native - upstream)
    print(f"largest difference between seeds of one engine {between_seeds:.3f}")
    print(f"between the engines' means {between_engines.max():.3f}")
    print(f"in the last window, between the engines' means {between_engines[-1]:.3f}")
    for engine, medians in seconds.items():
        print(f"{engine:9} {statistics.median(medians):.4f} s a step")


if __name__ == "__main__":
    main()
