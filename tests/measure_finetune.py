"""What pre-training is worth: a model fine-tuned on few labels, against the same shape from random weights.

    python tests/measure_finetune.py --data DIR --make TEXT       once: make the sets from the text, into DIR
    python tests/measure_finetune.py --data DIR --model DIR [--seeds N] [--sizes N …] [--learning-rate RATE]

TEXT (plain or compressed) is LibreOffice's Spanish help, as Debian's libreoffice-help-es has it: a paragraph a line,
an empty line after each page, and at a page's end "This page is: /text/scalc/…". From that come two sets:

- classification: which application's help a paragraph is from. Pages that are shared by several are left out.
- tagging: the part of speech of each word, as apertium's tagger has it (apt-get install apertium apertium-eng-spa).
  These are a program's labels, not people's. Sentences with a word that its dictionary lacks are left out.

Pages are divided, three tenths for the tests, and paragraphs that several pages have are left out. DIR/test-pages.txt
lists the tests' pages, and DIR/pretraining.txt is all other pages' text without the lines that name the page. The runs
are two at a time; one takes a core 25 s with 2 layers of 128, and 90 s with 4 layers of 256.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from electra_wrap import sources

#: Lines of the training files and of the test files. The first N of a training file are a smaller one.
TRAINING, TEST = 1500, 1000

#: Most paragraphs that one page gives a set.
OF_A_PAGE = 5

#: A paragraph of text, neither code nor one that is not translated.
PARAGRAPH = re.compile(r"(?=.* (?:el|la|los|las|del|una?|que|para|con) )[A-ZÁÉÍÓÚÑ¿¡].*[.:?!]")

#: Apertium's tags that are often enough to learn, and its signs, which all become `punct`.
TAGS = {
    *("n", "pr", "det", "vblex", "adj", "cnjcoo", "prn", "adv", "rel", "vbmod", "cnjadv", "vbser", "num", "predet"),
    *("cnjsub", "vbhaver"),
}
SIGNS = {"sent", "cm", "lpar", "rpar", "guio", "lquest", "rquest", "apos"}

#: A word of apertium's output, ^written/lemma<tag><tag>$, with a backslash before what is a sign of its own.
UNIT = re.compile(r"\^((?:\\.|[^\\/$])*)/((?:\\.|[^\\$])*)\$")
APERTIUM = Path("/usr/share/apertium/apertium-eng-spa")


def pages(text: str) -> dict[str, list[str]]:
    """Return each page's paragraphs, by its path, without the lines about the page itself."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for page in text.strip().split("\n\n"):
        lines = page.strip().split("\n")
        end = lines.index("Help content debug info:")
        (path,) = (line.partition("/text/")[2].strip() for line in lines[end:] if line.startswith("This page is:"))
        found[path] += lines[1:end]  # the first names the whole help
    return found


def tag(paragraphs: list[str]) -> list[list[tuple[str, str]] | None]:
    """Return each paragraph's words with the first part of their tags; None if a word is not known or seldom used."""
    text = re.sub(r"([][{}^$/\\@<>])", r"\\\1", "\n".join(paragraphs))
    for command in (
        ["lt-proc", "-w", APERTIUM / "spa-eng.automorf.bin"],
        ["apertium-tagger", "-g", "-p", APERTIUM / "spa-eng.prob"],
    ):
        text = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: list[list[tuple[str, str]] | None] = []
    for line in text.rstrip("\n").split("\n"):
        words = [
            (re.sub(r"\\(.)", r"\1", written), "punct" if (first := _first(analysis)) in SIGNS else first)
            for written, analysis in UNIT.findall(line)
        ]
        known = not UNIT.sub("", line).strip() and all(first in {*TAGS, "punct"} for _, first in words)
        found.append(words if known else None)
    assert len(found) == len(paragraphs)
    return found


def _first(analysis: str) -> str:
    match = re.search(r"<([^>]+)>", analysis)
    return match[1] if match else ""


def make(source: str, directory: Path) -> None:
    """Write both sets, the list of the tests' pages, and the text for pre-training."""
    stream = sources.Stream(source)
    found = pages(b"".join(iter(lambda: stream.readline(2**20), b"")).decode())
    draw = random.Random(0)
    names = sorted(found)
    draw.shuffle(names)
    tests = set(names[: 3 * len(names) // 10])
    times = collections.Counter(paragraph for paragraphs in found.values() for paragraph in set(paragraphs))
    chosen = [
        (name, paragraph)
        for name in names
        for paragraph in dict.fromkeys(found[name])
        if times[paragraph] == 1 and PARAGRAPH.fullmatch(paragraph) and 8 <= len(paragraph.split()) <= 40
    ]
    tagged = zip(chosen, tag([paragraph for _, paragraph in chosen]), strict=True)
    sets = {
        "classification": [
            (name, f"{module}\t{paragraph}\n")
            for name, paragraph in chosen
            if (module := name.partition("/")[0]) != "shared"
        ],
        "tagging": [
            (name, "".join(f"{word}\t{first}\n" for word, first in words) + "\n")
            for (name, _), words in tagged
            if words is not None
        ],
    }
    directory.mkdir(parents=True, exist_ok=True)
    for task, entries in sets.items():
        draw.shuffle(entries)
        seen: collections.Counter[str] = collections.Counter()
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for name, entry in entries:
            seen[name] += 1
            if seen[name] <= OF_A_PAGE:
                parts["test" if name in tests else "train"].append(entry)
        for part, most in (("train", TRAINING), ("test", TEST)):
            (directory / f"{task}.{part}").write_text("".join(parts[part][:most]), encoding="utf-8")
            print(f"{task}.{part}: {len(parts[part][:most]):,} of {len(parts[part]):,}")
    (directory / "test-pages.txt").write_text("".join(f"{name}\n" for name in sorted(tests)), encoding="utf-8")
    rest = ("".join(f"{paragraph}\n" for paragraph in found[name]) for name in sorted(set(names) - tests))
    (directory / "pretraining.txt").write_text("\n".join(rest), encoding="utf-8")


def smaller(file: Path, task: str, size: int) -> Path:
    """Write the first `size` entries of a training file beside it."""
    end = "\n" if task == "classification" else "\n\n"
    entries = file.read_text(encoding="utf-8").strip().split(end)
    assert len(entries) >= size, f"{file} has {len(entries)} entries"
    made = file.with_name(f"{file.name}-{size}")
    made.write_text(end.join(entries[:size]) + end, encoding="utf-8")
    return made


def measure(model: str, directory: Path, sizes: list[int], seeds: int, rate: str | None) -> None:
    """Fine-tune for each task, size, start and seed, two at a time; print means and deviations of the seeds."""

    def one(task: str, size: int, start: str, seed: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "electra_wrap", "finetune", "--model", model, "--task", task, "--json"]
        command += ["--train", str(training[task, size]), "--test", str(directory / f"{task}.test")]
        command += ["--seed", str(seed), *(["--learning-rate", rate] if rate else [])]
        command += ["--from-scratch"] if start == "random" else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        return dict(json.loads(done.stdout))

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    tasks = "classification", "tagging"
    training = {(task, size): smaller(directory / f"{task}.train", task, size) for task in tasks for size in sizes}
    rows = list(itertools.product(tasks, sizes, ("pre-trained", "random")))
    print("| task | trained on | weights | accuracy | macro F1 | most frequent label |\n|---|---|---|---|---|---|")
    with ThreadPoolExecutor(2) as pool:
        runs = [[pool.submit(one, *row, seed) for seed in range(seeds)] for row in rows]
        for (task, size, start), futures in zip(rows, runs, strict=True):
            results = [future.result() for future in futures]
            cells = [task, f"{size:,}", start]
            for key in ("accuracy", "macro_f1"):
                values = [result[key] for result in results]
                cells.append(f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}")
            print("|", " | ".join([*cells, f"{results[0]['most_frequent_accuracy']:.3f}"]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--make", metavar="TEXT")
    what.add_argument("--model", metavar="DIR")
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, TRAINING])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", help="of both (default: the command's)")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make, arguments.data)
    else:
        measure(arguments.model, arguments.data, arguments.sizes, arguments.seeds, arguments.learning_rate)
