"""Compare models on labelled tasks, by the number of examples that they are fine-tuned on.

    python examples/compare.py RESULTS MODEL… --tasks TASK…

Each model is fine-tuned (see `fine_tuning.py`) on 100, 300, 1,000, 3,000 and 10,000 examples of
each task, with three seeds. `random:MODEL` is a model of the same shape with random weights. Each
score is appended to RESULTS, a file of JSON lines; scores that are there already are not computed
again. The output is a table of F1 on the test parts: means and standard deviations.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

import fine_tuning

SIZES = [100, 300, 1000, 3000, 10000]


def read(results: Path) -> list[dict]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def table(rows: list[dict]) -> str:
    """Return the means and standard deviations of F1, in percent, as Markdown."""
    scores = defaultdict(list)
    for row in rows:
        scores[row["task"], row["model"], row["rate"], row["examples"]].append(row["test"]["f1"])
    sizes = sorted({key[3] for key in scores})
    lines = [
        "| task | model | rate | " + " | ".join(f"{size:,}" for size in sizes) + " |",
        "|---|---|---|" + "---|" * len(sizes),
    ]
    for task, model, rate in dict.fromkeys(key[:3] for key in scores):
        cells = []
        for size in sizes:
            values = [100 * value for value in scores[task, model, rate, size]]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}" if values else "")
        lines.append(f"| {task} | {model} | {rate or ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--examples", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[None])
    arguments = parser.parse_args()
    done = read(arguments.results)
    cells = itertools.product(
        arguments.seeds,
        arguments.tasks,
        arguments.examples,
        arguments.models,
        arguments.learning_rates,
    )
    for seed, task, examples, model, rate in cells:
        cell = {"task": task.name, "model": model, "rate": rate, "examples": examples, "seed": seed}
        if any(cell.items() <= row.items() for row in done):
            continue
        scores = fine_tuning.fine_tune(
            model.removeprefix("random:"),
            task,
            examples=examples,
            from_scratch=model.startswith("random:"),
            learning_rate=rate,
            seed=seed,
        )
        with arguments.results.open("a", encoding="utf-8") as file:
            print(json.dumps({**cell, **scores}), file=file)
    print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
