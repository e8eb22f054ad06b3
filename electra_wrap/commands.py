"""The commands: their arguments, and one function each.

`run`, `show`, `bench` and `doctor` are about a profile and take --profile and --set. The other
commands are about a run: they take its directory and use the profile that it ran with.
"""

from __future__ import annotations

import argparse
import codecs
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from electra_wrap import profile, signals
from electra_wrap import profiles as profile_files
from electra_wrap.errors import ElectraWrapError, EnvironmentProblem, UsageError
from electra_wrap.run import MANIFEST, Run

DEFAULT_PROFILE = "spanish-tiny"

Arguments = argparse.Namespace


def _argument(*names: str, **options: Any) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(*names, **options)

    return add


#: Each command: a function of the same name, its description, and its arguments.
COMMANDS: list[tuple[Callable[[Arguments], None], str, tuple[Any, ...]]] = []


def _command(
    description: str, *arguments: Callable[[argparse.ArgumentParser], None]
) -> Callable[[Callable[[Arguments], None]], Callable[[Arguments], None]]:
    def register(function: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
        COMMANDS.append((function, description, arguments))
        return function

    return register


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _step(text: str) -> int | str:
    return text if text == "best" else int(text)


_PROFILE = _argument("--profile", default=DEFAULT_PROFILE, help="name or TOML file (%(default)s)")
_SET = _argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
_RUN_DIR_OPTION = _argument("--run-dir", metavar="DIR", help="default: runs/PROFILE")
_RUN_DIR = _argument("run_dir", metavar="RUN_DIR", type=Path)
_RUN_DIRS = _argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path)
_UPSTREAM = _argument("--upstream", metavar="SRC", help="URL, clone or bundle of upstream")
_JSON = _argument("--json", action="store_true", help="print JSON")


@_command(
    "train a model: text in, discriminator and generator out",
    _PROFILE,
    _SET,
    _RUN_DIR_OPTION,
    _UPSTREAM,
    _argument("--until", metavar="STAGE", help="stop after this stage, e.g. vocab or train"),
    _argument("--shard", metavar="I/N", help="only build part I of N of the examples, from 0/N"),
    _argument("--launch", metavar="COMMAND", help='native engine: e.g. "torchrun --nnodes 2 …"'),
    _argument("--dry-run", action="store_true", help="only print what would be done, and why"),
    _argument("--verify", action="store_true", help="read all outputs and compare checksums"),
)
def run(arguments: Arguments) -> None:
    from electra_wrap.pipeline import examples
    from electra_wrap.pipeline.execute import execute
    from electra_wrap.progress import log, warn

    loaded = _load_run(arguments)
    signals.raise_interrupts()
    if arguments.shard is not None:
        if arguments.dry_run or arguments.until or arguments.launch or arguments.verify:
            raise UsageError(
                "--shard excludes --dry-run, --until, --launch and --verify; leave them out"
            )
        match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(
                f"--shard {arguments.shard} is not I/N with I from 0 to N-1; write for example "
                "--shard 0/16"
            )
        examples.build_shard(loaded, int(match[1]), int(match[2]))
        return
    done = execute(
        loaded, until=arguments.until, dry_run=arguments.dry_run, verify=arguments.verify
    )
    if arguments.until or arguments.dry_run:
        return
    if done or not (loaded.directory / "report.html").exists():
        from electra_wrap.monitor import report as page  # imports matplotlib

        try:
            log(f"report: {page.write([loaded.directory])}")
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
    _argument("--what", choices=["profile", "hparams", *profile.NETWORKS], default="profile"),
)
def show(arguments: Arguments) -> None:
    from electra_wrap.data import vocab
    from electra_wrap.upstream.hparams import hparams

    if arguments.run_dir:
        opened = Run.open(arguments.run_dir)
        loaded, size = opened.profile, opened.vocab_size or None
    else:
        loaded = profile_files.load(arguments.profile, arguments.set)
        source = Path(loaded.tokenizer.source)
        size = len(vocab.read(source)) if source.is_file() else loaded.tokenizer.vocab_size
    if arguments.what == "profile":
        _print_json(loaded.model_dump())
    elif size is None:
        raise EnvironmentProblem(
            "vocab_size is counted from the vocabulary, which is not there yet; first `run --until "
            "vocab`, then give the RUN_DIR"
        )
    elif arguments.what == "hparams":
        _print_json(hparams(loaded, size))
    else:
        _print_json(loaded.hf_config(arguments.what, size))


@_command(
    "print the size of a run's corpus, its defects, and how the vocabulary fits", _RUN_DIR, _JSON
)
def corpus(arguments: Arguments) -> None:
    from electra_wrap.pipeline.corpus import corpus_report

    counts = corpus_report(Run.open(arguments.run_dir))
    if arguments.json:
        _print_json(counts)
        return
    for key, value in counts.items():
        form = ".3%" if key.endswith("_share") else ",.3f" if isinstance(value, float) else ","
        print(f"{key.replace('_', ' '):20} {value:>15{form}}")


@_command(
    "fetch google-research/electra, and TensorFlow with CUDA to run its scripts on a GPU",
    _UPSTREAM,
    _argument(
        "--device",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="cpu: without CUDA; gpu: with it; auto: with it if the NVIDIA driver lists a GPU",
    ),
)
def vendor(arguments: Arguments) -> None:
    from electra_wrap.upstream import checkout, environment

    signals.raise_interrupts()
    print(checkout.ensure(arguments.upstream))
    if arguments.device == "gpu" or (arguments.device == "auto" and environment.has_gpu()):
        print(environment.ensure())


#: Options of `convert` that a run directory answers itself.
_NOT_FOR_RUNS = "vocab model lowercase strip_accents max_length heads generator_heads to_tf"


@_command(
    "convert a run's checkpoint, or a TensorFlow checkpoint, for transformers, or back",
    _argument("source", nargs="+", type=Path, metavar="SOURCE", help="RUN_DIR or checkpoint"),
    _argument("--out", required=True, type=Path, metavar="DIR", help="where to write the models"),
    _argument("--step", type=_step, metavar="N|best", help="default: the latest checkpoint"),
    _argument("--vocab", type=Path, metavar="FILE", help="vocab.txt, for the tokenizer"),
    _argument("--model", choices=["both", *profile.NETWORKS], default="both"),
    _argument("--lowercase", action="store_true", help="the model was trained on lowercased text"),
    _argument("--strip-accents", action="store_true", help="… and without accents"),
    _argument("--max-length", type=_positive, metavar="N", help="tokenizer: longest text"),
    _argument("--heads", type=_positive, metavar="N", help="attention heads (default: hidden/64)"),
    _argument("--generator-heads", type=_positive, metavar="N", help="those of the generator"),
    _argument("--to-tf", action="store_true", help="from transformers to TensorFlow, at --step"),
    _argument("--force", action="store_true", help="replace existing models in --out"),
)
def convert(arguments: Arguments) -> None:
    from electra_wrap.pipeline import convert as stage
    from electra_wrap.tools import convert as tool

    signals.raise_interrupts()
    source, out, step = arguments.source[0], arguments.out.absolute(), arguments.step
    if len(arguments.source) != 1 + arguments.to_tf:
        raise UsageError("give one SOURCE, or with --to-tf two: DISCRIMINATOR GENERATOR")
    if (source / MANIFEST).is_file():
        for name in _NOT_FOR_RUNS.split():
            if getattr(arguments, name) not in (None, False, "both"):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is not for run directories; leave it out")
        stage.convert(Run.open(source), step, out, replace=arguments.force)
    elif step == "best":
        raise UsageError(f"{source} is not a run directory; give a number as --step")
    elif arguments.to_tf:
        generator = arguments.source[1]
        tool.to_tensorflow(source, generator, out, step=step or 0, force=arguments.force)
    else:
        tool.from_tensorflow(
            source,
            out,
            step=step,
            model=arguments.model,
            vocabulary=arguments.vocab,
            heads=arguments.heads,
            generator_heads=arguments.generator_heads,
            lowercase=arguments.lowercase,
            strip_accents=arguments.strip_accents,
            max_length=arguments.max_length,
            force=arguments.force,
        )
    print(out)


@_command(
    "detect replaced tokens with a discriminator",
    _argument("--model", required=True, type=Path, metavar="DIR", help="RUN_DIR or discriminator"),
    _argument("text", nargs="*", metavar="TEXT", help="default: each line of stdin, as with -"),
    _argument("--file", metavar="FILE", help="each line is a text"),
    _argument("--replace", action="store_true", help="first let the generator replace tokens"),
    _argument("--seed", type=int, metavar="N", help="seed of --replace (default: 0)"),
    _argument("--json", action="store_true", help="print JSON: an array, or one object per line"),
)
def detect(arguments: Arguments) -> None:
    from electra_wrap import inference
    from electra_wrap.progress import log
    from electra_wrap.tools import detect as tool

    signals.raise_interrupts()
    if arguments.text and arguments.file:
        raise UsageError("--file excludes TEXT; leave out one of them")
    if arguments.seed is not None and not arguments.replace:
        raise UsageError("--seed has an effect with --replace only; give both")
    file = arguments.file or ("-" if arguments.text in ([], ["-"]) else None)
    interactive = file == "-" and sys.stdin.isatty()
    if interactive:
        log("each line is a text; Ctrl-D ends")
    model = inference.find_discriminator(arguments.model.absolute())
    if arguments.replace:
        function, job = "replace", {"model_dir": str(model), "seed": arguments.seed or 0}
        inference.find_generator(model)
    else:
        function, job = "detect", {"model": str(model)}
    texts = tool.read_texts(arguments.text, file)
    results = inference.infer(function, job, texts, 1 if interactive else inference.BATCH_SIZE)
    if not arguments.json:
        tool.show(results)
    elif file is None:
        _print_json(list(results))
    else:
        for result in results:
            _print_json(result, indent=None)


@_command(
    "measure the training speed of a profile on generated text",
    _PROFILE,
    _SET,
    _argument("--engine", action="append", choices=profile.ENGINE_NAMES, help="default: both"),
    _argument("--steps", type=int, default=60, metavar="N", help="default: 60"),
    _argument("--vocab-size", type=int, metavar="N", help="default: that of the profile"),
    _JSON,
)
def bench(arguments: Arguments) -> None:
    from electra_wrap.tools import bench as tool

    signals.raise_interrupts()
    loaded = profile_files.load(arguments.profile, arguments.set)
    engines = arguments.engine or profile.ENGINE_NAMES
    results = tool.bench(loaded, engines, arguments.steps, arguments.vocab_size)
    if arguments.json:
        _print_json(results)
    else:
        tool.show(results)


@_command(
    "report problems of this machine and how to fix them",
    _argument("--profile", metavar="NAME|FILE", help="exit with 3 if this profile lacks something"),
    _SET,
    _RUN_DIR_OPTION,
    _UPSTREAM,
    _JSON,
)
def doctor(arguments: Arguments) -> None:
    from electra_wrap.tools import doctor as tool

    named = arguments.profile is not None
    arguments.profile = arguments.profile or DEFAULT_PROFILE
    findings = list(tool.examine(_load_run(arguments), named=named))
    if arguments.json:
        _print_json([finding.as_dict() for finding in findings])
    else:
        tool.show(findings)
    if missing := [finding.name for finding in findings if finding.status == "missing"]:
        names = ", ".join(missing)
        raise EnvironmentProblem(f"{arguments.profile} needs: {names}; fix that first")


@_command(
    "evaluate a checkpoint on held-out text",
    _RUN_DIR,
    _UPSTREAM,
    _argument("--step", type=int, metavar="N", help="default: the latest checkpoint"),
    _JSON,
)
def evaluate(arguments: Arguments) -> None:
    from electra_wrap.pipeline import evaluate as stage

    signals.raise_interrupts()
    opened = Run.open(arguments.run_dir)
    opened.upstream = arguments.upstream
    metrics = stage.evaluate(opened, arguments.step)
    if arguments.json:
        _print_json(metrics)
        return
    for key, value in metrics.items():
        print(f"{key:28} {value:>10{'.4f' if isinstance(value, float) else ','}}")


@_command(
    "open TensorBoard on one or more runs",
    _RUN_DIRS,
    _argument("--port", type=int, metavar="N", help="default: the first free one from 6006"),
    _argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only"),
)
def tensorboard(arguments: Arguments) -> None:
    from electra_wrap.tools import tensorboard as tool

    signals.raise_interrupts()
    tool.serve([path.absolute() for path in arguments.run_dirs], arguments.host, arguments.port)


@_command(
    "write report.html of a run, or of several to compare them",
    _RUN_DIRS,
    _argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html"),
)
def report(arguments: Arguments) -> None:
    from electra_wrap.monitor import report as page

    print(page.write(arguments.run_dirs, arguments.out))


def _load_run(arguments: Arguments) -> Run:
    loaded = profile_files.load(arguments.profile, arguments.set)
    directory = Path(arguments.run_dir or Path("runs") / profile_files.find(arguments.profile).stem)
    launch = getattr(arguments, "launch", None)
    return Run(loaded, directory, upstream=arguments.upstream, launch=launch)


def _print_json(value: Any, indent: int | None = 2) -> None:
    utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    text = json.dumps(value, indent=indent, ensure_ascii=not utf8)
    print(re.sub(r"[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text))
