"""The commands: their arguments, and one function each.

`run`, `show` and `doctor` are about a profile and take --profile and --set. The other commands are
about a run: they take its directory and use the profile that it ran with.
"""

import argparse
import codecs
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_wrap import profiles as profile_files
from electra_wrap import signals
from electra_wrap.architecture import NETWORKS
from electra_wrap.errors import CONTROL, ElectraWrapError, EnvironmentProblem, UsageError, visible
from electra_wrap.run import MANIFEST, Run

Arguments = argparse.Namespace
Command = Callable[[Arguments], None]

#: Each command: a function of the same name, its description, and its arguments.
COMMANDS: list[tuple[Command, str, tuple[Any, ...]]] = []


def _command(description: str, *arguments: Any) -> Callable[[Command], Command]:
    def register(function: Command) -> Command:
        COMMANDS.append((function, description, arguments))
        return function

    return register


def _argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, options


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


_PROFILE = _argument("--profile", default="spanish-tiny", help="name or TOML file (%(default)s)")
_SET = _argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
_RUN_DIR_OPTION = _argument("--run-dir", type=Path, metavar="DIR", help="default: runs/PROFILE")
_RUN_DIR = _argument("run_dir", metavar="RUN_DIR", type=Path)
_UPSTREAM = _argument("--upstream", metavar="SRC", help="URL, clone or bundle of upstream")
_STEP = _argument("--step", type=_positive, metavar="N", help="default: the latest checkpoint")


@_command(
    "train a model: text in, discriminator and generator out",
    _PROFILE,
    _SET,
    _RUN_DIR_OPTION,
    _UPSTREAM,
    _argument("--until", metavar="STAGE", help="stop after this stage, e.g. vocab or train"),
    _argument("--launch", metavar="COMMAND", help='native engine: e.g. "torchrun --nnodes 2 …"'),
    _argument("--dry-run", action="store_true", help="only print what would be done, and why"),
)
def run(arguments: Arguments) -> None:
    from electra_wrap.pipeline import execute
    from electra_wrap.progress import warn

    loaded = _load_run(arguments)
    signals.raise_interrupts()
    done = execute(loaded, arguments.until, dry_run=arguments.dry_run)
    if arguments.until or arguments.dry_run:
        return
    if not done and (loaded.directory / "report.html").exists():
        return
    try:
        report(Arguments(run_dir=loaded.directory))
    except ElectraWrapError as error:  # the model is trained and exported all the same
        warn(f"there is no report: {error}")


@_command("list the profiles that ship")
def profiles(arguments: Arguments) -> None:
    for name, description in profile_files.shipped():
        print(f"{name:18} {description}")


@_command(
    "print a profile, or a configuration derived from it, as JSON",
    _argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR", help="show this run's profile"),
    _PROFILE,
    _SET,
    _argument("--what", choices=["profile", "hparams", *NETWORKS], default="profile"),
)
def show(arguments: Arguments) -> None:
    from electra_wrap.data import vocab
    from electra_wrap.upstream.hparams import hparams

    if arguments.run_dir:
        opened = Run.open(arguments.run_dir)
        loaded, size = opened.profile, opened.vocab_size
    else:
        loaded = profile_files.load(arguments.profile, arguments.set)
        source = Path(loaded.tokenizer.source)
        size = len(vocab.read(source)) if source.is_file() else loaded.tokenizer.vocab_size or 0
    if arguments.what == "profile":
        _print_json(loaded.known_values())
    elif not size:
        raise EnvironmentProblem(
            "vocab_size is counted from the vocabulary, which is not there yet; first `run --until "
            "vocab`, then give the RUN_DIR"
        )
    elif arguments.what == "hparams":
        _print_json(hparams(loaded, size))
    else:
        _print_json(loaded.hf_config(arguments.what, size))


@_command(
    "fetch google-research/electra, and TensorFlow with CUDA to run its scripts on a GPU",
    _UPSTREAM,
    _argument("--device", choices=["auto", "cpu", "gpu"], default="auto", help="gpu: with CUDA"),
)
def vendor(arguments: Arguments) -> None:
    from electra_wrap.upstream import checkout, environment

    signals.raise_interrupts()
    print(checkout.ensure(arguments.upstream))
    if arguments.device == "gpu" or (arguments.device == "auto" and environment.has_gpu()):
        print(environment.ensure())


@_command(
    "convert a run's checkpoint, or a TensorFlow checkpoint, for transformers, or back",
    _argument("source", nargs="+", type=Path, metavar="SOURCE", help="RUN_DIR or checkpoint"),
    _argument("--out", required=True, type=Path, metavar="DIR", help="where to write the models"),
    _STEP,
    _argument("--vocab", type=Path, metavar="FILE", help="vocab.txt, for the tokenizer"),
    _argument("--lowercase", action="store_true", help="the model was trained on lowercased text"),
    _argument("--strip-accents", action="store_true", help="… and without accents"),
    _argument("--heads", type=_positive, metavar="N", help="attention heads (default: hidden/64)"),
    _argument("--to-tf", action="store_true", help="from transformers to TensorFlow, at --step"),
)
def convert(arguments: Arguments) -> None:
    from electra_wrap import convert as conversion

    signals.raise_interrupts()
    source, out, step = arguments.source[0], arguments.out, arguments.step
    if len(arguments.source) != 1 + arguments.to_tf:
        raise UsageError("give one SOURCE, or with --to-tf two: DISCRIMINATOR GENERATOR")
    if (source / MANIFEST).is_file():
        for name in ("vocab", "lowercase", "strip_accents", "heads", "to_tf"):
            if getattr(arguments, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is not for run directories; leave it out")
        conversion.from_run(Run.open(source), step, out)
    elif arguments.to_tf:
        conversion.to_tensorflow(source, arguments.source[1], out, step=step or 0)
    else:
        conversion.from_tensorflow(
            source,
            out,
            step=step,
            vocabulary=arguments.vocab,
            heads=arguments.heads,
            lowercase=arguments.lowercase,
            strip_accents=arguments.strip_accents,
        )
    print(visible(str(out)))


@_command(
    "detect replaced tokens with a discriminator",
    _argument("--model", required=True, type=Path, metavar="DIR", help="RUN_DIR or discriminator"),
    _argument("text", nargs="+", metavar="TEXT", help="a text; - for the lines of stdin"),
    _argument("--replace", action="store_true", help="first let the generator replace tokens"),
    _argument("--seed", type=int, default=0, metavar="N", help="seed of --replace (default: 0)"),
    _argument("--json", action="store_true", help="print a line of JSON for each text"),
)
def detect(arguments: Arguments) -> None:
    from electra_wrap import detect as texts
    from electra_wrap import inference

    signals.raise_interrupts()
    job: dict[str, Any] = {"model": str(inference.find_discriminator(arguments.model.absolute()))}
    if arguments.replace:
        job["seed"] = arguments.seed
    function = "replace" if arguments.replace else "detect"
    for result in inference.infer(function, job, texts.read_texts(arguments.text)):
        if arguments.json:
            _print_json(result, indent=None)
        else:
            texts.show(result)


@_command(
    "report problems of this machine and how to fix them",
    _PROFILE,
    _SET,
    _RUN_DIR_OPTION,
    _UPSTREAM,
)
def doctor(arguments: Arguments) -> None:
    from electra_wrap.doctor import examine

    if missing := examine(_load_run(arguments)):
        names = ", ".join(missing)
        raise EnvironmentProblem(f"{arguments.profile} needs: {names}; fix that first")


@_command("evaluate a checkpoint on held-out text, as JSON", _RUN_DIR, _UPSTREAM, _STEP)
def evaluate(arguments: Arguments) -> None:
    from electra_wrap import checkpoints, stages
    from electra_wrap.engines import engine_of

    signals.raise_interrupts()
    opened = Run.open(arguments.run_dir)
    opened.upstream = arguments.upstream
    with opened.lock():
        step = checkpoints.require(opened.model_dir, arguments.step)
        engine_of(opened).prepare(opened)
        _print_json({"step": step, **stages.evaluate(opened, step)})


@_command("write report.html of a run, also while it trains", _RUN_DIR)
def report(arguments: Arguments) -> None:
    from electra_wrap import report as page  # imports matplotlib

    print(visible(str(page.write(Run.open(arguments.run_dir)))))


def _load_run(arguments: Arguments) -> Run:
    loaded = profile_files.load(arguments.profile, arguments.set)
    directory = arguments.run_dir or Path("runs") / profile_files.find(arguments.profile).stem
    launch = getattr(arguments, "launch", None)
    return Run(loaded, directory, upstream=arguments.upstream, launch=launch)


def _print_json(value: Any, indent: int | None = 2) -> None:
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    text = json.dumps(value, indent=indent, ensure_ascii=not utf8)
    print(
        "\n".join(
            re.sub(CONTROL, lambda c: f"\\u{ord(c[0]):04x}", line) for line in text.split("\n")
        )
    )
