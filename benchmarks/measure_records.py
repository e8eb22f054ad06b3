"""Measure how fast records are built, with and without the patch that tokenizes each word once.

    python benchmarks/measure_records.py [--megabytes 50] [--shards 1 2] [--text FILE]

Both scripts run one after the other on the same text, with a process for each shard, and their
records are compared. The text has random lines of FILE (default: the sample that ships), with other
numbers, and with other words for those that occur once in FILE, so that the vocabulary grows as in
a real text.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from electra_wrap import paths, subprocesses
from electra_wrap.data import sources, tfrecords, vocab
from electra_wrap.upstream import checkout

#: A checkout with additional files is refused.
ENV = {"CUDA_VISIBLE_DEVICES": "-1"}

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


def slow_checkout(directory: Path) -> Path:
    """Return a new checkout of the pin, with all patches but the measured one."""
    pin, clone = checkout.read_pin(), directory / "electra"
    git = ["git", "-C", str(clone)]
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", pin["url"], clone], check=True)
    subprocess.run([*git, "checkout", "--quiet", pin["commit"]], check=True)
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        if "words-once" not in patch.name:
            subprocess.run([*git, "apply", "--unidiff-zero", patch], check=True)
    return clone


def measure(directory: Path, sample: str, size: int, shards: int) -> None:
    """Build records of `size` megabytes of text with each script."""
    text, vocabulary = directory / "text", directory / "vocab.txt"
    text.mkdir()
    make_text(sample, size * 10**6, [text / f"part-{i:05d}.txt" for i in range(shards)])
    cased = {"lowercase": False, "strip_accents": False}
    vocab.train(text, vocabulary, vocab_size=32_000, sample_bytes=20_000_000, **cased)
    digests, examples = set(), 0
    for name, scripts in {"slow": slow_checkout(directory), "fast": checkout.ensure()}.items():
        (out := directory / name).mkdir()
        argv = [sys.executable, "-s", str(scripts / "build_pretraining_dataset.py")]
        argv += [f"--corpus-dir={text}", f"--vocab-file={vocabulary}", f"--output-dir={out}"]
        argv += [f"--num-processes={shards}", f"--num-out-files={max(1, size // shards) * shards}"]
        argv += ["--max-seq-length=128", "--seed=0", "--no-lower-case", "--no-strip-accents"]
        argv.append("--blanks-separate-docs=True")
        env, start, quiet = (
            subprocesses.child_environment(ENV),
            time.monotonic(),
            subprocess.DEVNULL,
        )
        child = subprocess.Popen(argv, env=env, stdout=quiet, stderr=quiet)
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, f"failed: {argv}"
        seconds, records = time.monotonic() - start, sorted(out.glob(tfrecords.RECORD_GLOB))
        digests.add(hashlib.sha256(b"".join(path.read_bytes() for path in records)).digest())
        examples = sum(map(tfrecords.count, records))
        speed = f"{seconds:.1f} s, {size / seconds:.2f} MB/s, {examples / seconds:,.0f} records/s"
        print(f"{shards} shards, {name}: {speed}, {usage.ru_maxrss / 1024:.0f} MB", flush=True)
    print(f"{shards} shards: {examples:,} records, {'' if len(digests) == 1 else 'NOT '}the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", default=str(paths.CONFIGS / "spanish-sample.txt"))
    arguments = parser.parse_args()
    with contextlib.closing(sources.Stream(arguments.text)) as stream:
        sample = b"".join(stream).decode()
    for number in arguments.shards:
        with tempfile.TemporaryDirectory() as name:
            measure(Path(name), sample, arguments.megabytes, number)


if __name__ == "__main__":
    main()
