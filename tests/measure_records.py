"""How fast records are built, against the pinned script without the patch that makes it fast; are they the same?

    python tests/measure_records.py [--megabytes 50] [--processes 1 2] [--text FILE] [--vocab FILE]

Both run in turn with this interpreter on the same text: FILE (plain or .gz; default: the sample that ships), repeated
with variation until there is enough. Each repetition has other numbers, lines in another order, and for each word that
FILE has once another one in its place, so that the vocabulary grows as in text that is not repeated. Needs
google-research/electra.
"""

from __future__ import annotations

import argparse
import collections
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

from electra_wrap import parts, paths, process, profile, sources, vocab
from electra_wrap.upstream import checkout

WORD = re.compile(r"[^\W\d_]+")
ENDINGS = ["ra", "re", "mi", "to", "la", "ción", "do", "mente", "es", "ba", "lle", "ño", "gu", "per", "tri"]


def make_text(sample: str, size: int, shards: list[Path]) -> None:
    """Write `size` bytes of varied text, divided evenly among `shards`."""
    seldom = {word for word, number in collections.Counter(WORD.findall(sample)).items() if number == 1}
    draw = random.Random(0)

    def other(match: re.Match[str]) -> str:
        word = match[0]
        return word[:-2] + draw.choice(ENDINGS) + draw.choice(ENDINGS) if word in seldom else word

    lines = sample.split("\n")
    for shard in shards:
        left = size // len(shards)
        with shard.open("w", encoding="utf-8") as file:
            while left > 0:
                draw.shuffle(lines)
                for line in lines:
                    varied = (
                        WORD.sub(other, re.sub(r"\d+", lambda m: str(draw.randrange(10 ** len(m[0]))), line)) + "\n"
                    )
                    file.write(varied)
                    if (left := left - len(varied.encode())) <= 0:
                        break


def slow_script(directory: Path) -> Path:
    """A checkout of the pin with all patches but the one that is measured."""
    git = ["git", "-C", str(directory / "electra")]
    url = checkout.Pin.read().url
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", url, directory / "electra"], check=True)
    subprocess.run([*git, "checkout", "--quiet", checkout.Pin.read().commit], check=True)
    for patch in sorted(paths.PATCHES.glob("*.patch")):
        if "words-once" not in patch.name:
            subprocess.run([*git, "apply", "--unidiff-zero", patch], check=True)
    return directory / "electra" / "build_pretraining_dataset.py"


def timed(arguments: list[str]) -> tuple[float, float]:
    """Run a script; return the seconds it took and the peak memory of its largest process in MB."""
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-s", *arguments],
        env=process.environment({"CUDA_VISIBLE_DEVICES": "-1"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0
    return time.monotonic() - began, usage.ru_maxrss / 1024


def digest(files: list[Path]) -> str:
    return hashlib.sha256(
        b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sorted(files, key=lambda f: f.name))
    ).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--text", default=str(paths.CONFIGS / "spanish-sample.txt"))
    parser.add_argument("--vocab", help="vocab.txt (default: 32,000 tokens trained on the text)")
    parser.add_argument("--only-fast", action="store_true", help="leave the slow script out")
    arguments = parser.parse_args()
    stream = sources.Stream(arguments.text)
    sample = b"".join(iter(lambda: stream.readline(2**20), b"")).decode()
    print(f"{arguments.megabytes} MB made of {len(sample.encode()) / 1e6:.1f} MB", flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        scripts = {"fast": checkout.ensure() / "build_pretraining_dataset.py"}
        if not arguments.only_fast:
            scripts = {"slow": slow_script(directory), **scripts}
        for number in arguments.processes:
            text = directory / f"text-{number}"
            text.mkdir()
            make_text(sample, arguments.megabytes * 10**6, [text / f"part-{i:05d}.txt" for i in range(number)])
            vocabulary = Path(arguments.vocab or directory / "vocab.txt")
            if not vocabulary.exists():
                rules = profile.Tokenizer(source="train", vocab_size=32_000).rules
                vocab.train(text, vocabulary, vocab_size=32_000, sample_bytes=20_000_000, **rules)
            seconds, made = {}, {}
            for kind, script in scripts.items():
                out = directory / f"{kind}-{number}"
                out.mkdir()
                keys = [f"--corpus-dir={text}", f"--vocab-file={vocabulary}", f"--output-dir={out}", "--seed=0"]
                keys += [f"--num-processes={number}", f"--num-out-files={arguments.megabytes // number * number}"]
                keys += ["--max-seq-length=128", "--no-lower-case", "--no-strip-accents"]
                jobs = {"numbers": list(range(number)), "workers": number, "inputs": {}}
                more = [f"--jobs={json.dumps(jobs)}"] if kind == "fast" else []
                seconds[kind], memory = timed([str(script), *keys, *more])
                made[kind] = digest(list(out.rglob("*.tfrecord-*")))
                if kind == "fast":
                    examples = sum(parts.facts(parts.path(out, i))["examples"] for i in range(number))
                speed = arguments.megabytes / seconds[kind]
                print(
                    f"{number} processes, {kind}: {seconds[kind]:.1f} s, {speed:.2f} MB/s, {memory:.0f} MB", flush=True
                )
            print(f"{number} processes: {examples:,} records, {examples / seconds['fast']:,.0f}/s", end="")
            if "slow" in made:
                same = "the same" if made["fast"] == made["slow"] else "NOT THE SAME"
                slow = examples / seconds["slow"]
                print(f" against {slow:,.0f}/s: {seconds['slow'] / seconds['fast']:.1f} times; {same}", end="")
            print(flush=True)
            for path in (*text.iterdir(), *directory.glob(f"*-{number}/**/*.tfrecord-*")):
                path.unlink()


if __name__ == "__main__":
    main()
