"""The engine that runs google-research/electra's own scripts as child processes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from electra_wrap import checkpoints, events, files, paths, subprocesses
from electra_wrap.architecture import NETWORKS
from electra_wrap.data import tfrecords
from electra_wrap.errors import UsageError
from electra_wrap.events import OnEvent
from electra_wrap.progress import ProgressBar, warn
from electra_wrap.run import Run
from electra_wrap.upstream import checkout, environment
from electra_wrap.upstream.hparams import hparams

#: Text per record file. Upstream's 1000 files are for gigabytes of text; training mixes the files.
BYTES_PER_RECORD_FILE = 2**20
MAX_RECORD_FILES = 1000


def devices() -> list[str]:
    """Return the names of the GPUs that TensorFlow sees."""
    return environment.list_gpus() if environment.has_gpu() else []


def prepare(run: Run) -> None:
    """Fetch, verify and patch upstream, and install its environment if it can use a GPU.

    UsageError if the run has a launcher.
    """
    if run.launch:
        raise UsageError('--launch is for engine = "native"; leave it out, or set that engine')
    checkout.ensure(run.upstream)
    if run.profile.train.device != "cpu" and environment.has_gpu():
        environment.ensure()


def build_examples(run: Run, text: Path, out: Path) -> int:
    """Fill the directory `out` with records of the shards in `text`; return how many."""
    sizes = [size for path in text.iterdir() if (size := path.stat().st_size)]
    if not sizes:
        return 0
    shards = len(list(text.iterdir()))
    number = min(MAX_RECORD_FILES, max(1, sum(sizes) // BYTES_PER_RECORD_FILE))
    profile, done = run.profile, 0
    arguments = [
        f"--corpus-dir={text.relative_to(run.directory)}",
        f"--vocab-file={run.vocabulary.name}",
        f"--output-dir={out.relative_to(run.directory)}",
        f"--max-seq-length={profile.model.max_seq_length}",
        f"--num-processes={shards}",
        f"--num-out-files={shards * max(1, round(number / shards))}",
        f"--blanks-separate-docs={profile.corpus.blank_lines_separate_documents}",
        f"--seed={profile.train.seed}",
        "--do-lower-case" if profile.tokenizer.lowercase else "--no-lower-case",
        "--do-strip-accents" if profile.tokenizer.strip_accents else "--no-strip-accents",
    ]
    with ProgressBar(f"examples of {text.name}", sum(sizes), "B") as bar:

        def show(event: events.Event) -> None:
            nonlocal done
            if isinstance(event, events.Progress):
                done += event.bytes
                bar.show(done)

        log = run.log_file("examples")
        _run_script(run, "build_pretraining_dataset.py", arguments, {}, log, show)
    return sum(map(tfrecords.count, out.iterdir()))


def train(run: Run, devices: Sequence[str], on_event: OnEvent) -> None:
    """Train to the profile's last step, and evaluate every `train.evaluate_every` steps before it.

    The script either trains or evaluates, so it is started again after each evaluation.
    """
    settings, examples = run.profile.train, run.results(run.examples_record)
    last = every = settings.steps
    if settings.evaluate_every and examples["held_out_examples"] > 0:
        every = settings.evaluate_every
        if every < last and every * settings.batch_size < examples["examples"]:
            reason = "training reads its first records again after each evaluation"
            warn(f"train: {reason}, and never the last; raise train.evaluate_every")
    start = max(checkpoints.steps(run.model_dir), default=0)
    if not start and run.initial.is_dir():
        _import_initial(run)
        if examples["held_out_examples"]:
            evaluate(run, 0, devices, on_event)  # the weights that the training starts from
    for step in (*range(start + every - start % every, last, every), last):
        _train_until(run, step, devices, on_event)
        if step < last:
            evaluate(run, step, devices, on_event)


def _import_initial(run: Run) -> None:
    """Make the weights in model.init_from the checkpoint of step 0."""
    arguments: dict[str, str] = {network: str(run.initial / network) for network in NETWORKS}
    arguments["out"] = str(run.model_dir)
    log = run.log_file("train")
    subprocesses.call("electra_wrap.weights", "to_tensorflow", arguments, log=log)
    checkpoints.finish(run.model_dir, 0, checkpoint_files(run.model_dir, 0))


def _train_until(run: Run, step: int, devices: Sequence[str], on_event: OnEvent) -> None:
    # TensorFlow continues from the checkpoints in this list, which may be outdated.
    files.remove(run.model_dir / "checkpoint")
    if names := [f'"model.ckpt-{step}"' for step in checkpoints.steps(run.model_dir)]:
        lines = [f"model_checkpoint_path: {names[-1]}\n"]
        lines += [f"all_model_checkpoint_paths: {name}\n" for name in names]
        files.write_text(run.model_dir / "checkpoint", "".join(lines))
    values, log = hparams(run.profile, run.vocab_size), run.log_file("train")
    _run_pretraining(run, values, {"stop": step}, devices, log, on_event)


def evaluate(run: Run, step: int, devices: Sequence[str], on_event: OnEvent) -> None:
    """Evaluate a checkpoint on the held-out records with the script's `do_eval`."""
    examples = run.results(run.examples_record)["held_out_examples"]
    batch_size = min(run.profile.train.batch_size, examples)
    values = hparams(run.profile, run.vocab_size) | {
        "do_train": False,
        "do_eval": True,
        "eval_batch_size": batch_size,
        "num_eval_steps": examples // batch_size,
        "pretrain_tfrecords": f"{run.examples[1].name}/{tfrecords.RECORD_GLOB}",
    }
    prefix = checkpoint_files(run.model_dir, step)[0].with_suffix("")
    runtime = {"checkpoint": str(prefix.relative_to(run.directory))}
    _run_pretraining(run, values, runtime, devices, run.log_file("evaluate"), on_event)


def _run_pretraining(
    run: Run,
    values: dict[str, Any],
    runtime: dict[str, Any],
    devices: Sequence[str],
    log: Path,
    on_event: OnEvent,
) -> None:
    """Run run_pretraining.py. `runtime` has what it has no argument for, for estimator.py."""
    settings, name = run.profile.train, "hparams.json"
    files.write_json(run.directory / name, values)
    runtime = {"seed": settings.seed, "precision": settings.precision, **runtime}
    runtime["devices"] = list(devices)
    env = {"ELECTRA_WRAP_RUNTIME": json.dumps(runtime)}
    if not devices:
        env["CUDA_VISIBLE_DEVICES"] = "-1"
    arguments = ["--data-dir=.", f"--model-name={run.profile.model_name}", f"--hparams={name}"]
    _run_script(run, "run_pretraining.py", arguments, env, log, on_event)


def _run_script(
    run: Run, name: str, arguments: list[str], env: dict[str, str], log: Path, on_event: OnEvent
) -> None:
    """Run a script of the checkout, which is verified before.

    It runs in the run directory with relative names: TensorFlow takes a path with [, ], *, ? or a
    comma for a pattern. On its module path is this package alone: beside an installed package are
    the packages of its environment, and the script may have another one.
    """
    source = checkout.ensure(run.upstream)
    link = run.directory / "path" / paths.PACKAGE.name
    link.parent.mkdir(exist_ok=True)
    files.remove(link)
    link.symlink_to(paths.PACKAGE)
    env = {**env, "PYTHONPATH": str(link.parent)}
    argv = [environment.python(), str(source / name), *arguments]
    subprocesses.follow(argv, cwd=run.directory, env=env, log=log, on_event=on_event)


def checkpoint_files(model_dir: Path, step: int) -> list[Path]:
    """Return the files of a checkpoint."""
    parts = ("index", "data-00000-of-00001")
    return [model_dir / f"model.ckpt-{step}.{part}" for part in parts]


def export(run: Run, step: int, out: Path) -> None:
    """Write `out`/discriminator and `out`/generator for transformers."""
    prefix = checkpoint_files(run.model_dir, step)[0].with_suffix("")
    arguments = {
        "checkpoint": str(prefix),
        "out": str(out),
        "heads": {n: run.profile.model.shape(n).num_attention_heads for n in NETWORKS},
        "expected": {n: run.profile.hf_config(n, run.vocab_size) for n in NETWORKS},
    }
    log = run.log_file("convert")
    subprocesses.call("electra_wrap.weights", "to_transformers", arguments, log=log)
