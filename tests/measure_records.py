"""Measure how fast records are built, with and without the patch that tokenizes each word once.

    python tests/measure_records.py [--megabytes 50] [--processes 1 2] [--text FILE] [--vocab FILE]

Both scripts run one after the other on the same text, and their records are compared. The text has
random lines of FILE (plain or compressed; default: the sample that ships), with other numbers, and
with other words for those that occur once in FILE, so that the vocabulary grows as in a real text.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from electra_wrap import paths, subprocesses
from electra_wrap.data import parts, sources, vocab
from electra_wrap.upstream import checkout

WORD = r"[^\W\d_]+"
ENDINGS = ["ra", "re", "mi", "to", "la", "ción", "do", "mente", "es", "ba", "lle", "ño"]


def make_text(sample: str, size: int, shards: list[Path]) -> None:
    """Write about `size` bytes of varied text, divided evenly among `shards`."""
    counts = collections.Counter(re.findall(WORD, sample))
    draw = random.Random(0)

    def vary(match: re.Match[str]) -> str:
        word = match[0]
        if word.isdigit():
            return str(draw.randrange(10 ** len(word)))
        return word if counts[word] > 1 else word[:-2] + "".join(draw.choices(ENDINGS, k=2))

    lines = sample.split("\n")
    for shard in shards:
        with shard.open("w", encoding="utf-8") as file:
            while file.tell() < size // len(shards):
                for line in draw.choices(lines, k=1000):
                    file.write(re.sub(rf"\d+|{WORD}", vary, line) + "\n")


def slow_script(directory: Path) -> Path:
    """Return the script in a new checkout of the pin, with all patches but the measured one."""
    pin, clone = checkout.Pin.read(), directory / "electra"
    git = ["git", "-C", str(clone)]
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", pin.url, clone], check=True)
    subprocess.run([*git, "checkout", "--quiet", pin.commit], check=True)
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        if "words-once" not in patch.name:
            subprocess.run([*git, "apply", "--unidiff-zero", patch], check=True)
    return clone / "build_pretraining_dataset.py"


def run(arguments: list[str]) -> tuple[float, float]:
    """Run a script; return its duration in seconds and the peak memory of a process in MB."""
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-s", *arguments],
        env=subprocesses.child_environment({"CUDA_VISIBLE_DEVICES": "-1"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    return time.monotonic() - start, usage.ru_maxrss / 1024


def digest(directory: Path) -> str:
    """Return the SHA-256 of all record files under a directory."""
    files = sorted(directory.rglob("*.tfrecord-*"), key=lambda file: file.name)
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def measure(directory: Path, scripts: dict[str, Path], sample: str, size: int, number: int) -> None:
    """Build records of `size` megabytes of text with each script, by `number` processes."""
    text, vocabulary = directory / "text", directory / "vocab.txt"
    text.mkdir()
    make_text(sample, size * 10**6, [text / f"part-{i:05d}.txt" for i in range(number)])
    if not vocabulary.exists():
        cased = {"lowercase": False, "strip_accents": False}
        vocab.train(text, vocabulary, vocab_size=32_000, sample_bytes=20_000_000, **cased)
    jobs = json.dumps({"numbers": list(range(number)), "workers": number, "inputs": {}})
    digests = set()
    for name, script in scripts.items():
        out = directory / name
        out.mkdir()
        arguments = [f"--corpus-dir={text}", f"--vocab-file={vocabulary}", f"--output-dir={out}"]
        arguments += [f"--num-processes={number}", f"--num-out-files={size // number * number}"]
        arguments += ["--max-seq-length=128", "--seed=0", "--no-lower-case", "--no-strip-accents"]
        arguments += [f"--jobs={jobs}"] if name == "fast" else []
        seconds, memory = run([str(script), *arguments])
        digests.add(digest(out))
        speed = f"{seconds:.1f} s, {size / seconds:.2f} MB/s, {memory:.0f} MB"
        print(f"{number} processes, {name}: {speed}", flush=True)
    metadata = [parts.read_metadata(parts.part_path(out, i)) for i in range(number)]
    examples = sum(part["examples"] for part in metadata if part)
    same = "the same" if len(digests) == 1 else "NOT THE SAME"
    print(f"{number} processes: {examples:,} records, {examples / seconds:,.0f}/s; {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", default=str(paths.CONFIGS / "spanish-sample.txt"))
    parser.add_argument("--vocab", help="vocab.txt (default: 32,000 tokens trained on the text)")
    parser.add_argument("--only-fast", action="store_true", help="do not run the unpatched script")
    arguments = parser.parse_args()
    with contextlib.closing(sources.Stream(*sources.expand(arguments.text))) as stream:
        sample = b"".join(iter(lambda: stream.readline(2**20), b"")).decode()
    print(f"{arguments.megabytes} MB from {len(sample.encode()) / 1e6:.1f} MB", flush=True)
    for number in arguments.processes:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            scripts = {"fast": checkout.ensure() / "build_pretraining_dataset.py"}
            if not arguments.only_fast:
                scripts = {"slow": slow_script(directory), **scripts}
            if arguments.vocab:
                (directory / "vocab.txt").symlink_to(Path(arguments.vocab).resolve())
            measure(directory, scripts, sample, arguments.megabytes, number)


if __name__ == "__main__":
    main()
