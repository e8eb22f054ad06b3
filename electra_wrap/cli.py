"""The command line. Imports nothing heavy: TensorFlow and PyTorch live in child processes (process.py)."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from electra_wrap import __version__, profile
from electra_wrap.errors import ElectraWrapError, EnvironmentLacks, Interrupted, StageFailed, UsageError, from_os
from electra_wrap.rundir import MANIFESTS

DEFAULT_PROFILE = "spanish-tiny"


class _Parser(argparse.ArgumentParser):
    """argparse, with one line for an error."""

    def error(self, message: str) -> NoReturn:
        print(f"electra_wrap: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(UsageError.exit_code)


#: Each command: its function, whose name it has, what it does, and its arguments.
COMMANDS: list[tuple[Callable[..., None], str, Sequence[Any]]] = []


def _command(does: str, *arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(function: Callable[..., None]) -> Callable[..., None]:
        COMMANDS.append((function, does, arguments))
        return function

    return add


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


def _rate(text: str) -> float:
    if not 0 < (number := float(text)) < 1:
        raise ValueError
    return number


def _argument(*names: str, **keys: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, keys


_PROFILE = (
    _argument("--profile", default=DEFAULT_PROFILE, metavar="NAME|FILE", help=f"default: {DEFAULT_PROFILE}"),
    _argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.steps=100; overrides a key"),
)
_RUN_DIR = _argument("--run-dir", metavar="DIR", help="run directory (default: runs/PROFILE)")
_RUN_DIRS = _argument("run_dirs", nargs="*", metavar="RUN_DIR", help="default: runs/PROFILE")
_UPSTREAM = _argument("--upstream", metavar="SRC", help="URL, clone, bare mirror or bundle of upstream")
_JSON = _argument("--json", action="store_true", help="print JSON")


@_command(
    "train a model: text in, discriminator and generator out",
    *(*_PROFILE, _RUN_DIR, _UPSTREAM),
    _argument("--until", metavar="STAGE", help="stop after this stage, e.g. vocab, train, convert"),
    _argument("--shard", metavar="I/N", help="only build the Ith part of N of the training data (0/N … N-1/N)"),
    _argument("--launch", metavar="COMMAND", help='native engine: its launcher, e.g. "torchrun --nnodes 2 …"'),
    _argument("--dry-run", action="store_true", help="only say what would be done, and why"),
)
def run(arguments: argparse.Namespace) -> None:
    from electra_wrap import stages

    if arguments.shard is None:
        return stages.execute(_run(arguments), arguments.until, arguments.dry_run)
    if arguments.dry_run or arguments.until or arguments.launch:
        raise UsageError("--shard goes with none of --dry-run, --until and --launch; leave them out")
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {arguments.shard} is not I/N with I from 0 to N-1; write for example --shard 0/16")
    stages.build_nth(_run(arguments), int(match[1]), int(match[2]))


@_command("list the profiles that ship")
def profiles(arguments: argparse.Namespace) -> None:
    for name, description in profile.shipped():
        print(f"{name:18} {description}")


@_command(
    "print a profile, or what is derived from it, as JSON",
    *(*_PROFILE, _RUN_DIR),
    _argument("--what", choices=["profile", "hparams", "discriminator", "generator"], default="profile"),
)
def show(arguments: argparse.Namespace) -> None:
    from electra_wrap import vocab

    loaded = profile.Profile.load(arguments.profile, arguments.set)
    if arguments.what == "profile":
        return _print_json(loaded.model_dump())
    size = loaded.tokenizer.vocab_size
    for path in (Path(loaded.tokenizer.source), _run_dir(arguments) / "vocab.txt"):
        if path.is_file():
            size = len(vocab.read(path))
    if size is None:
        raise EnvironmentLacks(
            "vocab_size is counted from the vocabulary, which is not here yet; first `run --until vocab`"
        )
    if arguments.what == "hparams":
        return _print_json(loaded.hparams(size))
    _print_json(loaded.hf_config(arguments.what, size))


@_command("report on a run's corpus: size, what was mended, how the vocabulary fits", *(*_PROFILE, _RUN_DIR, _JSON))
def corpus(arguments: argparse.Namespace) -> None:
    from electra_wrap import stages

    found = stages.corpus_report(_run(arguments))
    if arguments.json:
        return _print_json(found)
    for key, value in found.items():
        form = ".3%" if key.endswith("_share") else ",.3f" if isinstance(value, float) else ","
        print(f"{key.replace('_', ' '):20} {value:>15{form}}")


@_command("fetch, verify and patch google-research/electra", _UPSTREAM)
def vendor(arguments: argparse.Namespace) -> None:
    from electra_wrap.upstream import checkout

    print(checkout.ensure(arguments.upstream))


#: What `convert` has to be told of a checkpoint that is not in a run directory.
_NOT_OF_A_RUN = ("vocab", "model", "lowercase", "strip_accents", "max_length", "heads", "generator_heads", "to_tf")


@_command(
    "convert a TensorFlow checkpoint, or one of a run's, for transformers, or back",
    _argument(
        "source",
        nargs="+",
        metavar="CHECKPOINT",
        help="directory or prefix, or a run directory; --to-tf: DISCRIMINATOR GENERATOR",
    ),
    _argument("--out", required=True, metavar="DIR", help="DIR/discriminator and DIR/generator are written"),
    _argument("--step", type=_step, metavar="N|best", help="the checkpoint of this step (default: the latest)"),
    _argument("--vocab", metavar="FILE", help="vocab.txt; without it no tokenizer is written"),
    _argument("--model", choices=["both", *profile.NETWORKS], default="both"),
    _argument("--lowercase", action="store_true", help="the model was trained on lowercased text"),
    _argument("--strip-accents", action="store_true", help="… and without accents"),
    _argument("--max-length", type=_positive, metavar="N", help="longest text for the tokenizer (default: positions)"),
    _argument("--heads", type=_positive, metavar="N", help="discriminator's attention heads (default: hidden/64)"),
    _argument("--generator-heads", type=_positive, metavar="N", help="likewise the generator's"),
    _argument("--to-tf", action="store_true", help="from transformers to a checkpoint at --step (default: 0)"),
    _argument("--force", action="store_true", help="replace what is in --out"),
)
def convert(arguments: argparse.Namespace) -> None:
    from electra_wrap import process

    out = Path(arguments.out).absolute()
    sources = [str(Path(source).absolute()) for source in arguments.source]
    if len(sources) != 1 + arguments.to_tf:
        raise UsageError("give one CHECKPOINT, or with --to-tf two directories: DISCRIMINATOR GENERATOR")
    if (Path(sources[0]) / MANIFESTS[0]).is_file():
        from electra_wrap import stages

        if given := [name for name in _NOT_OF_A_RUN if getattr(arguments, name) not in (None, False, "both")]:
            raise UsageError(f"--{given[0].replace('_', '-')}: a run knows that itself; leave it out")
        stages.convert(Path(sources[0]), arguments.step, out, arguments.force)
        return print(out)
    if arguments.step == "best":
        raise UsageError(f"{sources[0]} is no run directory, which knows its best checkpoint; give a number")
    job: dict[str, Any] = {"out": str(out), "force": arguments.force}
    if arguments.to_tf:
        job |= {"task": "convert_back", "step": arguments.step or 0}
        job |= dict(zip(profile.NETWORKS, sources, strict=True))
    else:
        if arguments.strip_accents and not arguments.lowercase:
            raise UsageError("--strip-accents has an effect with --lowercase only; give both")
        heads = {"discriminator": arguments.heads, "generator": arguments.generator_heads}
        job |= {
            "task": "convert",
            "checkpoint": sources[0],
            "step": arguments.step,
            "vocabulary": arguments.vocab and str(Path(arguments.vocab).absolute()),
            "networks": list(profile.NETWORKS) if arguments.model == "both" else [arguments.model],
            "heads": {network: number for network, number in heads.items() if number},
            "lowercase": arguments.lowercase,
            "strip_accents": arguments.strip_accents,
            "max_length": arguments.max_length,
        }
    process.call("electra_wrap.weights", job)
    print(out)


@_command(
    "ask a discriminator which tokens were replaced",
    _argument("--model", required=True, metavar="DIR", help="run directory, or a converted discriminator"),
    _argument("text", nargs="*", metavar="TEXT", help="default: each line of stdin, as with -"),
    _argument("--file", metavar="FILE", help="each line is a text"),
    _argument("--replace", action="store_true", help="have the generator replace tokens first, as in training"),
    _argument("--seed", type=int, metavar="N", help="… others with another seed (default: 0)"),
    _argument("--json", action="store_true", help="print JSON: an array, or an object a line for --file and stdin"),
)
def detect(arguments: argparse.Namespace) -> None:
    from electra_wrap import check, screen
    from electra_wrap.progress import say

    if arguments.text and arguments.file:
        raise UsageError("--file goes with no TEXT; leave out one of them")
    if arguments.seed is not None and not arguments.replace:
        raise UsageError("--seed has an effect with --replace only; give both")
    model = check.find_discriminator(Path(arguments.model).absolute())
    job: dict[str, Any] = {"task": "detect", "model": str(model)}
    if arguments.replace:
        check.find_generator(model)
        job = {"task": "replace", "model_dir": str(model), "seed": arguments.seed or 0}
    file = arguments.file or ("-" if arguments.text in ([], ["-"]) else None)
    if typed := file == "-" and sys.stdin.isatty():
        say("each line is a text; Ctrl-D ends")
    results = check.ask(job, _texts(file, arguments.text), 1 if typed else check.BATCH)
    if not arguments.json:
        return screen.show(results, arguments.replace)
    if file is None:
        return _print_json(list(results))
    for result in results:
        _print_json(result, indent=None)


def _texts(file: str | None, arguments: list[str]) -> Iterator[str]:
    """Yield texts, without blank ones: the lines of a file ("-" is stdin), or if there is none the arguments.

    UsageError if one is not UTF-8, or all are blank.
    """
    found, where, what = False, file or "the command", "line" if file else "text"
    with contextlib.ExitStack() as stack:
        lines: Iterable[bytes] = map(os.fsencode, arguments)
        if file:
            where = "stdin" if file == "-" else file
            lines = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UsageError(f"{what} {number:,} of {where} is not UTF-8; convert it, e.g. with iconv") from None
            if text.strip():
                found = True
                yield text
    if not found:
        raise UsageError(f"{where} has no text; give a sentence")


@_command(
    "upload a run's models to a hub",
    *(*_PROFILE, _RUN_DIR),
    _argument("--push-to-hub", required=True, metavar="NAME", help="to NAME-discriminator and NAME-generator"),
    _argument("--public", action="store_true", help="make the repositories public (default: private)"),
)
def export(arguments: argparse.Namespace) -> None:
    from electra_wrap import hub

    for url in hub.push(_run(arguments), arguments.push_to_hub, public=arguments.public):
        print(url, flush=True)


@_command(
    "fine-tune a discriminator on labelled text, and test it",
    _argument("--model", required=True, metavar="DIR", help="run directory, or a converted discriminator"),
    _argument("--task", required=True, choices=["classification", "tagging"]),
    _argument("--train", required=True, metavar="FILE", help="lines label<TAB>text; tagging: token<TAB>tag, and blank"),
    _argument("--test", required=True, metavar="FILE", help="likewise, what it is scored on"),
    _argument("--from-scratch", action="store_true", help="the same shape with random weights, to compare"),
    _argument("--epochs", type=_positive, metavar="N", help="default: 3, or what makes 600 steps of 16 lines"),
    _argument("--learning-rate", type=_rate, metavar="RATE", help="default: 3e-4 × 256 / hidden size"),
    _argument("--seed", type=int, default=0, metavar="N", help="default: 0"),
    _argument("--out", metavar="DIR", help="where to save the fine-tuned model (default: nowhere)"),
    _JSON,
)
def finetune(arguments: argparse.Namespace) -> None:
    from electra_wrap import check
    from electra_wrap import finetune as tuning

    job = {key: getattr(arguments, key) for key in ("task", "epochs", "learning_rate", "seed", "from_scratch")}
    job |= {
        "model": str(check.find_discriminator(Path(arguments.model).absolute())),
        "training": str(Path(arguments.train).absolute()),
        "test": str(Path(arguments.test).absolute()),
        "out": arguments.out and str(Path(arguments.out).absolute()),
    }
    result = tuning.finetune(job)
    if arguments.json:
        return _print_json(result)
    print(f"accuracy  {result['accuracy']:.3f}")
    print(f"macro F1  {result['macro_f1']:.3f}")
    print(f"always saying {result['most_frequent']!r} has accuracy {result['most_frequent_accuracy']:.3f}")


@_command(
    "measure how fast a profile trains here, with either engine",
    *_PROFILE,
    _argument("--engine", action="append", choices=profile.ENGINES, help="only this one (default: both)"),
    _argument("--steps", type=int, default=120, metavar="N", help="steps to train (default: 120)"),
    _argument("--vocab-size", type=int, metavar="N", help="words (default: those of the profile's vocabulary)"),
    _JSON,
)
def bench(arguments: argparse.Namespace) -> None:
    from electra_wrap.native import bench as native_bench

    loaded = profile.Profile.load(arguments.profile, arguments.set)
    results = native_bench.bench(loaded, arguments.engine or profile.ENGINES, arguments.steps, arguments.vocab_size)
    if arguments.json:
        return _print_json(results)
    native_bench.show(results)


@_command(
    "look at what this machine has of what a run needs",
    _argument("--profile", metavar="NAME|FILE", help="say what this profile lacks, with exit code 3"),
    _PROFILE[1],
    *(_RUN_DIR, _UPSTREAM, _JSON),
)
def doctor(arguments: argparse.Namespace) -> None:
    import dataclasses

    from electra_wrap import doctor as examination

    named, arguments.profile = bool(arguments.profile), arguments.profile or DEFAULT_PROFILE
    findings = list(examination.examine(_run(arguments), named))
    if arguments.json:
        _print_json([{**dataclasses.asdict(one), "status": one.status} for one in findings])
    else:
        examination.show(findings)
    if missing := [one.what for one in findings if one.status == "missing"]:
        raise EnvironmentLacks(f"{arguments.profile} needs what is missing here: {', '.join(missing)}; mend that first")


@_command(
    "evaluate a checkpoint on the text that training did not see",
    *(*_PROFILE, _RUN_DIR, _UPSTREAM),
    _argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the latest)"),
    _JSON,
)
def evaluate(arguments: argparse.Namespace) -> None:
    from electra_wrap import stages

    found = stages.evaluate(_run(arguments), arguments.step)
    if arguments.json:
        return _print_json(found)
    for key, value in found.items():
        print(f"{key:28} {value:>10{'.4f' if isinstance(value, float) else ','}}")


@_command(
    "open TensorBoard on a run, or on several to compare them",
    *(_RUN_DIRS, _PROFILE[0]),
    _argument("--port", type=int, metavar="N", help="default: the first that is free from 6006"),
    _argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone, 127.0.0.1)"),
)
def tensorboard(arguments: argparse.Namespace) -> None:
    directories = _run_dirs(arguments)
    for directory in directories:
        if not (directory / "models").is_dir():
            raise UsageError(f"{directory} has not trained yet; first `run`")
        if len(directories) > 1 and set(",:") & set(str(directory)):
            raise UsageError(f"{directory}: TensorBoard cannot compare directories with a comma or colon; rename it")
    where = ["--logdir", str(directories[0] / "models")]
    if len(directories) > 1:
        unique = len({directory.name for directory in directories}) == len(directories)
        names = [directory.name if unique else str(directory) for directory in directories]
        pairs = zip(names, directories, strict=True)
        where = ["--logdir_spec", ",".join(f"{name}:{directory / 'models'}" for name, directory in pairs)]
    port = [] if arguments.port is None else ["--port", str(arguments.port)]
    # TensorBoard takes our place: it handles its own signals and messages.
    argv = [sys.executable, "-m", "tensorboard.main", *where, "--host", arguments.host, *port]
    os.execv(sys.executable, argv)


@_command(
    "write report.html of a run, or of several to compare them",
    *(_RUN_DIRS, _PROFILE[0]),
    _argument("--out", metavar="FILE", help="default: report.html in the run directory"),
)
def report(arguments: argparse.Namespace) -> None:
    from electra_wrap import report as page

    print(page.write(_run_dirs(arguments), arguments.out and Path(arguments.out)))


def _run(arguments: argparse.Namespace) -> Any:
    from electra_wrap.rundir import RunDir
    from electra_wrap.stages import Run

    loaded = profile.Profile.load(arguments.profile, arguments.set)
    more = (getattr(arguments, name, None) for name in ("upstream", "launch"))
    return Run(loaded, RunDir(_run_dir(arguments)), *more)


def _run_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.run_dir or Path("runs") / profile.find(arguments.profile).stem)


def _run_dirs(arguments: argparse.Namespace) -> list[Path]:
    return [
        Path(name).resolve() for name in arguments.run_dirs or [Path("runs") / profile.find(arguments.profile).stem]
    ]


def _print_json(value: Any, indent: int | None = 2) -> None:
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    print(json.dumps(value, indent=indent, ensure_ascii=not utf8))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line (with the program's name first)."""
    flags.FLAGS(argv[:1])  # absl's own flags stay at their defaults
    parser = _Parser(prog="python -m electra_wrap", description=sys.modules["electra_wrap"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, does, arguments in COMMANDS:
        command = commands.add_parser(function.__name__, help=does, description=does)
        command.set_defaults(function=function)
        for names, keys in arguments:
            command.add_argument(*names, **keys)
    if empty := [argument for argument in argv if argument.startswith("--") and argument.endswith("=--")]:
        parser.error(f"{empty[0]} gives no value")  # which argparse takes for an empty list
    return parser.parse_args(argv[1:])


def main(arguments: argparse.Namespace) -> None:
    """Run a command; errors become one line and an exit code."""
    try:
        try:
            arguments.function(arguments)
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # there is nothing left to do but to say so
            raise Interrupted("interrupted; the same command resumes") from None
        except BrokenPipeError:  # `… | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            raise from_os(error) from error
        except ElectraWrapError:
            raise
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise ElectraWrapError(f"a bug of electra_wrap ({what}); report it with what --debug prints") from error
    except ElectraWrapError as error:
        if arguments.debug:
            raise
        if isinstance(error, StageFailed) and error.tail:
            print(error.tail, file=sys.stderr)
        print(f"electra_wrap: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def entry_point() -> None:
    logging.set_verbosity(logging.ERROR)  # what libraries log is not for our user
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know all of Unicode
    app.run(main, flags_parser=parse)
