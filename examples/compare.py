"""Compare models on labelled tasks, by the number of examples that they are fine-tuned on.

    python examples/compare.py RESULTS NAME=MODEL… --tasks TASK…

Each model is fine-tuned (see `fine_tuning.py`) on 100, 300, 1,000, 3,000 and 10,000 examples of
each task, with three seeds. `NAME=random:MODEL` is a model of the same shape with random weights.
Each score is appended to RESULTS, a file of JSON lines; scores that are there already are not
computed again. The output is a table of F1 and accuracy on the test parts: means and standard
deviations. It takes all scores of a NAME together, so give other settings another NAME.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import fine_tuning

#: (task, metric, model, examples): the scores of the seeds, in percent.
Scores = dict[tuple[str, str, str, int], list[float]]


def read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def table(scores: Scores) -> str:
    """Return the means and standard deviations as Markdown."""
    sizes = sorted({examples for *_, examples in scores})
    lines = ["| task | metric | model | " + " | ".join(f"{size:,}" for size in sizes) + " |"]
    lines.append("|---|---|---|" + "---|" * len(sizes))
    for row in sorted(dict.fromkeys(key[:3] for key in scores), key=lambda row: row[:2]):
        cells = []
        for size in sizes:
            values = scores.get((*row, size), [])
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}" if values else "")
        lines.append("| " + " | ".join([*row, *cells]) + " |")
    return "\n".join(lines)


def plot(scores: Scores, path: Path) -> None:
    import matplotlib.pyplot as plt

    f1 = {
        (task, model, size): values
        for (task, metric, model, size), values in scores.items()
        if metric == "F1"
    }
    tasks = list(dict.fromkeys(task for task, *_ in f1))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for model in dict.fromkeys(key[1] for key in f1 if key[0] == task):
            rows = sorted(
                (key[2], values) for key, values in f1.items() if key[:2] == (task, model)
            )
            means = [statistics.mean(values) for _, values in rows]
            errors = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in rows]
            axis.errorbar([n for n, _ in rows], means, errors, marker="o", capsize=3, label=model)
        axis.set(title=task, xscale="log", xlabel="labelled sentences", ylabel="F1 (%)")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--examples", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--layer-decay", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--plot", type=Path, help="write a picture of the table")
    arguments = parser.parse_args()
    settings = {
        name: getattr(arguments, name) for name in ("learning_rate", "layer_decay", "steps")
    }
    done = read(arguments.results)
    for seed, task, examples, named in itertools.product(
        arguments.seeds, arguments.tasks, arguments.examples, arguments.models
    ):
        name, _, model = named.partition("=")
        cell = {"task": task.name, "model": name, "examples": examples, "seed": seed, **settings}
        if any(cell.items() <= row.items() for row in done):
            continue
        try:
            scores = fine_tuning.fine_tune(
                model.removeprefix("random:"),
                task,
                examples=examples,
                from_scratch=model.startswith("random:"),
                seed=seed,
                **settings,
            )
        except OSError as error:  # no such model or task
            sys.exit(f"error: {str(error).splitlines()[0]}")
        with arguments.results.open("a", encoding="utf-8") as file:
            print(json.dumps({**cell, **scores}), file=file)
    by_cell: Scores = defaultdict(list)
    for row in read(arguments.results):
        for metric, name in ("accuracy", "accuracy"), ("f1", "F1"):
            key = (row["task"], name, row["model"], row["examples"])
            by_cell[key].append(100 * row["test"][metric])
    print(table(by_cell))
    if arguments.plot:
        plot(by_cell, arguments.plot)


if __name__ == "__main__":
    main()
