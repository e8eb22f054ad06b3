"""Feed bad inputs to the command line, and check that each is refused in one line.

    python benchmarks/bad_inputs.py [--inputs 1000] [--seed 0] [--kinds texts,…] [--out DIR]

Each input is a command line with the files that it reads, made from seed, kind and number alone. It
runs as `python -m electra_wrap` does, in a forked process. It must end in time, with an exit code,
at most one line of error, and no traceback and no control character on its output. Its files must
be as they were, and no process be left. Failures are grouped, each with its shortest command line.
--kinds KIND --first NUMBER --inputs 1 --out DIR repeats an input and keeps its files.
"""

import argparse
import bz2
import collections
import contextlib
import ctypes
import gzip
import importlib
import json
import lzma
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_wrap import paths, signals
from electra_wrap.commands import COMMANDS
from electra_wrap.data import sources

#: Imported once, before the processes are forked. None of them imports TensorFlow or PyTorch.
MODULES = [f"electra_wrap.{name}" for name in ("cli", "convert", "detect", "pipeline", "report")]
MODULES += ["electra_wrap.upstream.hparams", "fsspec.implementations.http", "tokenizers"]

#: Limits of an input: seconds, resident bytes, and bytes of address space.
SECONDS, MEMORY, ADDRESS_SPACE = 20, 2**30, 2**32

#: The end of stderr after an error: one line.
ERROR = re.compile("((?!electra_wrap: error: ).*\n)*electra_wrap: error: .{9,}\n")

#: Characters that a terminal obeys, and bytes that are not UTF-8.
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\udc80-\udcff]")

#: Settings of the run whose directory is tampered with.
SET = ["corpus.held_out=0.05", "tokenizer.vocab_size=300", "train.device=cpu", "train.steps=4"]
SET += ["model.hidden_size=64", "model.max_seq_length=32", "train.save_every=4"]
SET = [f"--set={setting}" for setting in (*SET, "train.warmup_steps=1", "train.batch_size=4")]

#: What inputs are made of. `Campaign.try_input` makes the files that PATHS names.
TEXT = "".join(f"Línea {n} de un texto: {'áéíóú ' * (n % 9)}\n" for n in range(400)).encode()
NUMBERS = "0 -1 1 3 1.5 1e400 1e-320 -0.0 nan inf true 1_0 0x10 ٣ ² 4294967296 9223372036854775808"
WORDS = 'x - -- = \' " """ [ { # \x1b[31mred \x9b31mred \a \u202e \u2028 \x85 \ufeff \U0010ffff '
WORDS += "\udcff\udc80 $(id) %s%n{0} ${HOME} [red] ~ ~nobody ñ¿ [MASK] best 0/1 run"
PATHS = "missing missing/x.toml loop loop/x directory fifo empty random random/x . .. / * ** out "
PATHS += "/dev/zero /dev/null /proc/self/mem ../canary/file.txt \x1b[31m.txt \udcff.txt text.txt"
ODD = [*f"{NUMBERS} {WORDS} {PATHS}".split(" "), "", " ", "a\nb", "a\rb", "\0", "9" * 5000]
ODD += ["ñ" * 200, "x" * 300, "x" * 100_000, "x/" * 2500, "[" * 99_999, '{"a":' * 9999]
ODD += ["http://127.0.0.1:1/x.gz", "http://[::1", "https://x:y/*", "s3://x/*", "zip://*::x.zip"]
ODD += ["hf://", "hf://x/y@z", "file:///dev/zero", "memory://x", "x://y", "simplecache::x://y"]


def mutate_bytes(source: random.Random, content: bytes) -> bytes:
    """Return content of which some words or other parts are replaced."""
    for _ in range(source.choice([1, 1, 2, 8])):
        start = source.randrange(len(content) + 1)
        end = start + source.choice([0, 1, 4, 100, len(content)])
        if (words := list(re.finditer(rb"\w+", content[:9999]))) and source.random() < 0.6:
            start, end = source.choice(words).span()
        new = [b"", content[start:end] * 3, source.randbytes(4), b"\n" * 100]
        new += [os.fsencode(odd) for odd in source.choices(ODD, k=5)]
        content = content[:start] + source.choice(new) + content[end:]
    return content


def mutate_json(source: random.Random, value: Any) -> Any:
    """Return a value of which a part is removed, renamed or of another type."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.1:
        odd = [None, True, 0, -1, 0.5, 2**70, 1e308, float("nan"), [], {}, [value], {"a": value}]
        return source.choice([*odd, str(value), *source.choices(ODD, k=10)])
    mutated: Any = value.copy()
    key: Any = source.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if source.random() < 0.1:
        del mutated[key]
    elif isinstance(value, dict) and source.random() < 0.1:
        mutated[source.choice(ODD)] = mutated.pop(key)
    else:
        mutated[key] = mutate_json(source, value[key])
    return mutated


# The kinds of inputs: each function makes files in `work`, and returns a command line.


def profile_values(source: random.Random, base: Path, work: Path) -> list[str]:
    """Odd values of the keys of a profile, by --set."""
    choice = source.choice
    profile = json.loads((base / "profile.json").read_text())
    values = {"extends": "x", "x.y": 1, **profile}
    for section in ("corpus", "tokenizer", "model", "train"):
        values |= {f"{section}.{key}": value for key, value in profile[section].items()}
    flags = ["--set=corpus.source=text.txt"]
    for _ in range(choice([1, 1, 2, 4])):
        key = choice([*values, *["corpus.source", "tokenizer.source", "model.init_from"] * 6])
        odd = [choice(ODD), *[json.dumps(mutate_json(source, values[key]))] * 3]
        flags += [f"--set={key}={choice(odd)}"]
    show = ["show", f"--what={choice(['profile', 'hparams', 'generator'])}"]
    until = choice(["--dry-run", "--until=corpus", "--until=vocab"])
    return [*choice([show, ["run", "--run-dir=run", until]]), *flags]


def profile_files(source: random.Random, base: Path, work: Path) -> list[str]:
    """Profiles of which bytes or values are changed, and files that are no profiles."""
    choice = source.choice
    content = choice(sorted(paths.CONFIGS.glob("*.toml"))).read_bytes()
    start, end = choice(list(re.finditer(rb"(?<= = ).*", content))).span()
    contents = [content[:start] + os.fsencode(json.dumps(mutate_json(source, "x"))) + content[end:]]
    contents += [
        mutate_bytes(source, content),
        b"extends = " + os.fsencode(json.dumps(choice(ODD))),
    ]
    (work / "x.toml").write_bytes(choice([*contents, b'extends = "x"']))
    commands = [["show", "--what=discriminator"], ["run", "--dry-run", "--run-dir=run"]]
    return [*choice(commands), "--profile", choice(["x.toml"] * 9 + PATHS.split(" "))]


def command_lines(source: random.Random, base: Path, work: Path) -> list[str]:
    """Options and arguments that are wrong, missing, duplicated or odd."""
    choice = source.choice
    shutil.copytree(base, work / "run")
    commands = {function.__name__: arguments for function, _, arguments in COMMANDS}
    del commands["doctor"]  # it works for seconds
    name, parser, argv = choice(list(commands)), argparse.ArgumentParser(add_help=False), []
    actions = [parser.add_argument(*names, **options) for names, options in commands[name]]
    for action in source.choices(actions, k=source.randrange(8) if actions else 0):
        value = choice([choice(ODD), choice([*(action.choices or ()), "run", "out", "corpus"])])
        option = choice([*action.option_strings, value])
        argv += choice([[option, value], [option, value], [f"{option}={value}"], [option]])
    ends = ["--run-dir=run", "--until=corpus", "--step=999"]
    ends += [f"--upstream={choice(['ext::sh -c id', 'http://127.0.0.1:1/x', *ODD])}"]
    options = parser._option_string_actions  # the last of an option counts: nothing takes minutes
    argv += [end for end in ends if end.split("=")[0] in options]
    return [name, *argv, *choice([[]] * 9 + [["--x"], ["-h"], ["--", "x"], ["\x1b[31m"]])]


def run_directories(source: random.Random, base: Path, work: Path) -> list[str]:
    """Run directories of which a file is changed, for the commands that start no process."""
    choice, run = source.choice, Path(shutil.copytree(base, work / "run"))
    files = sorted(run.rglob("*"))
    names = "step-٣ step-99999999999999999999.sha256 step-7.sha256 part-1.txt \x1b[31m.txt .lock "
    names += "model.ckpt-5.index report.html report.html.partial events.out.tfevents.1 logs"
    new = choice([run, *filter(Path.is_dir, files)]) / choice(names.split())
    important = [path for path in files if path.name in ("manifest.json", "profile.json")]
    path = choice([choice(files), choice(important), choice(important), new])
    if path.is_file() and source.random() < 0.6:
        content = mutate_bytes(source, path.read_bytes())
        if path.suffix == ".json" and source.random() < 0.8:
            content = json.dumps(mutate_json(source, json.loads(path.read_text()))).encode()
        path.write_bytes(content)
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        choice((Path.mkdir, Path.touch, Path.exists))(path)
    run_it = ["run", "--run-dir=run", *SET]
    commands = [["show", "run", "--what=hparams"], [*run_it, "--dry-run"]] * 3
    commands += [[*run_it, "--until=vocab"]] * 3 + [["evaluate", "run", "--step=9"]]
    commands += [["report", "run"], ["report", "run"], ["convert", "run", "--out=out", "--step=9"]]
    return choice(commands)


def texts(source: random.Random, base: Path, work: Path) -> list[str]:
    """Text and compressed text, damaged or not."""
    choice = source.choice
    odd = [TEXT] * 5 + [b"", b"\0" * 10**5, b"a " * 10**5, TEXT.decode().encode("utf-16")]
    odd += [source.randbytes(30_000), "ñ".encode() * 99_999, b"\n" * 9999, b"a" * 3 * 10**6]
    suffix, module = choice([(".gz", gzip), (".bz2", bz2), (".xz", lzma), (".txt", None)])
    content = mutate_bytes(source, choice(odd))
    content = module.compress(content) if module else content
    content = mutate_bytes(source, content) if source.random() < 0.6 else content
    stem = choice(["t"] * 50 + WORDS.split(" ")).replace("/", "")
    name = stem + choice([suffix] * 9 + [".zip", ".gz", ""])
    (work / name).write_bytes(content)
    named = choice([name] * 9 + ["*", "**/*"])
    settings = [f"source={json.dumps(named)}", f"shards={choice('12')}"]
    settings += [f"bad_lines={choice(['repair', 'skip', 'stop'])}", f"held_out=0.{choice('039')}"]
    settings += [choice(["deduplicate=lines", "deduplicate=documents", "max_lines=7"])]
    return ["run", "--until=corpus", "--run-dir=run", *(f"--set=corpus.{s}" for s in settings)]


def vocabularies(source: random.Random, base: Path, work: Path) -> list[str]:
    """Vocabularies of which words or bytes are changed."""
    tokens = (base / "vocab.txt").read_bytes().splitlines(keepends=True)[:100]
    (work / "vocab.txt").write_bytes(mutate_bytes(source, b"".join(tokens)))
    flags = ["--set=tokenizer.source=vocab.txt", "--set=corpus.source=text.txt"]
    commands = [["run", "--until=vocab", "--run-dir=run"], ["show", "--what=discriminator"]]
    return [*source.choice(commands), *flags]


KINDS = "profile_values,profile_files,command_lines,run_directories,texts,vocabularies"


def try_input(kind: str, seed: str, directory: Path, *, keep: bool) -> tuple[int, list[str], str]:
    """Run an input. Return its exit code, what is wrong with how it ended, and its description."""
    place, source = directory / f"{kind}-{seed}", random.Random(f"{kind} {seed}")
    work = place / "work"
    for path in (work / "directory", place / "canary", place / "tmp"):
        path.mkdir(parents=True)
    given = {"text.txt": TEXT, "../canary/file.txt": TEXT, "random": TEXT[::-1], "empty": b""}
    for name, content in given.items():
        (work / name).write_bytes(content)
    (work / "loop").symlink_to("loop")
    os.mkfifo(work / "fifo")
    argv = [part.replace("\0", "") for part in globals()[kind](source, directory / "base", work)]
    others = children()
    if not (process := os.fork()):
        execute(argv, place)
    _, status, usage = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    texts = [(place / name).read_text("utf-8", "surrogateescape") for name in ("stdout", "stderr")]
    problems = ["memory"] if usage.ru_maxrss * 1024 > MEMORY else []
    if code not in (0, 2, 3, 4):
        problems.append("time" if code == -signal.SIGALRM else f"exit code {code}")
    elif "Traceback" in texts[1] or "this is a bug of electra_wrap" in texts[1]:
        problems.append("bug")
    elif code and not ERROR.fullmatch(texts[1]):
        problems.append("the last line of stderr is not the only error")
    problems += [f"character: {found!r}" for found in set(BAD.findall("".join(texts)))]
    problems += [f"changed: {n}" for n in given if (work / n).read_bytes() != given[n]]
    problems += [f"process left: {line}" for line in end_processes(others)]
    if not keep:
        shutil.rmtree(place)
    last = texts[1].rstrip("\n").rpartition("\n")[2]
    return code, problems, f"{place.name}: {shlex.join(argv)[:500]!r}\n    {last[:500]!r}"


def children() -> set[int]:
    """Return the processes whose parent is this one. It adopts those that a command leaves."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def end_processes(others: set[int]) -> Iterator[str]:
    """Yield the command lines of processes that a command left, and kill them."""
    end = time.monotonic() + 2  # a killed process takes a moment to end
    while left := children() - others:
        for process in left:
            os.waitpid(process, os.WNOHANG)
            if time.monotonic() > end:
                yield repr(Path(f"/proc/{process}/cmdline").read_bytes())
                os.kill(process, signal.SIGKILL)


def execute(argv: list[str], place: Path) -> None:
    """Run a command line in this process, which was forked for it, and end."""
    code: Any = 70
    try:
        os.setsid()
        for number in signals.NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(SECONDS)  # ends this process
        os.chdir(place / "work")
        for descriptor, name in enumerate((os.devnull, "../stdout", "../stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
        sys.stdin, sys.stdout, sys.stderr = map(open, range(3), "rww")
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        environment = dict.fromkeys(("HOME", "XDG_CACHE_HOME"), f"{place}/work/cache")
        environment |= {"PATH": os.environ["PATH"], "TMPDIR": f"{place}/tmp"}
        # Nothing is requested from other machines: there is no proxy at this address.
        environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:1")
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        paths.IN_CHECKOUT = False  # else `vendor` writes to the checkout
        sources.PAUSES = (0.01, 0.01)  # type: ignore[assignment]
        sys.argv = ["electra_wrap", *argv]
        importlib.import_module("electra_wrap.__main__").main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:  # nothing of the parent's is cleaned up here
        with contextlib.suppress(Exception):
            print(end="", flush=True)
            print(end="", file=sys.stderr, flush=True)
        os._exit(code if isinstance(code, int) else 70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", default="evaluate", help="stage of the run to tamper with")
    parser.add_argument("--kinds", default=KINDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new one; all files stay there")
    arguments = parser.parse_args()
    for module in MODULES:
        importlib.import_module(module)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: adopt what a command leaves
    failures: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory, keep = (arguments.out or Path(temporary)).resolve(), arguments.out is not None
        run = [sys.executable, "-m", "electra_wrap", "run", f"--run-dir={directory / 'base'}", *SET]
        subprocess.run([*run, "--until", arguments.until], check=True, capture_output=True)
        for kind in arguments.kinds.split(","):
            codes: collections.Counter[int] = collections.Counter()
            for number in range(arguments.first, arguments.first + arguments.inputs):
                seed = f"{arguments.seed}-{number}"
                code, problems, text = try_input(kind, seed, directory, keep=keep)
                codes[code] += 1
                if problems:
                    group = f"{problems[0][:9]} {re.findall('[a-z]{2,14}', text[-150:])[-10:]}"
                    failures.setdefault(group, []).append(f"{'; '.join(problems)}: {text}")
            counts = (f"exit code {code}: {codes[code]:5}" for code in sorted(codes))
            print(f"{kind:16}", *counts, sep="  ", flush=True)
    for group in failures.values():
        print(f"\n{len(group)} × {min(group, key=len)}")
    print(f"{len(failures)} distinct failures")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
