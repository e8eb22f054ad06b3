"""The engine that runs google-research/electra's own scripts as child processes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from electra_wrap import files, packages, subprocesses
from electra_wrap.data.tfrecords import RECORD_GLOB
from electra_wrap.engine import Checkpoint, OnEvent
from electra_wrap.errors import UsageError
from electra_wrap.profile import NETWORKS
from electra_wrap.progress import warn
from electra_wrap.run import Run
from electra_wrap.upstream import checkout, environment
from electra_wrap.upstream.hparams import hparams

NAME = "upstream"
CREDIT = (
    "[google-research/electra](https://github.com/google-research/electra), driven by electra_wrap"
)
NO_GPU = "TensorFlow sees none; install the NVIDIA driver, and CUDA with `vendor --device gpu`"
EXAMPLES = ("pretrain_tfrecords", "heldout_tfrecords")

#: Text per record file. Upstream's 1000 files are for gigabytes of text; training mixes the files.
BYTES_PER_RECORD_FILE = 2**20
MAX_RECORD_FILES = 1000


def versions(stage: str) -> dict[str, str]:
    """Return the packages and pins on which `examples`, `train` or `convert` depends."""
    if stage == "convert":
        return packages.versions("tensorflow", "safetensors")
    pin = checkout.Pin.read()
    pins = {"upstream": pin.commit, "patched upstream": pin.patched_tree}
    return pins if stage == "examples" else {"tensorflow": environment.version()} | pins


def devices() -> list[str]:
    """Return the names of the GPUs that TensorFlow sees."""
    with environment.package_path() as path:
        names: list[str] = subprocesses.call(
            "electra_wrap.upstream.gpus",
            "names",
            {},
            env={"PYTHONPATH": path},
            python=environment.python(),
        )
    return names


def precision(requested: str, devices: Sequence[str]) -> str:
    """Return the precision of matrix products. The scripts' own is float32."""
    return "float32" if requested == "auto" else requested


def prepare(run: Run) -> None:
    """Fetch, verify and patch upstream, and install its environment if it can use a GPU.

    UsageError if the run has a launcher.
    """
    if run.launch:
        raise UsageError('--launch is for engine = "native"; leave it out, or set that engine')
    checkout.ensure(run.upstream)
    if run.profile.train.device != "cpu" and environment.has_gpu():
        environment.ensure()


def build_examples(
    run: Run, text: Path, parts: Path, jobs: dict[str, Any], log: Path, on_event: OnEvent
) -> None:
    """Build one part of the records under `parts` for each shard of `text`.

    `jobs` are keyword arguments of `parts.build`.
    """
    shards = len(list(text.iterdir()))
    files_per_shard = max(1, round(_record_files(text) / shards))
    profile = run.profile
    arguments = [
        f"--corpus-dir={text}",
        f"--vocab-file={run.vocabulary}",
        f"--output-dir={parts}",
        f"--max-seq-length={profile.model.max_seq_length}",
        f"--num-processes={shards}",
        f"--num-out-files={shards * files_per_shard}",
        f"--blanks-separate-docs={profile.corpus.blank_lines_separate_documents}",
        f"--seed={profile.train.seed}",
        f"--jobs={json.dumps(jobs)}",
        "--do-lower-case" if profile.tokenizer.lowercase else "--no-lower-case",
        "--do-strip-accents" if profile.tokenizer.strip_accents else "--no-strip-accents",
    ]
    _run_script(run, "build_pretraining_dataset.py", arguments, {}, log, on_event)


def _record_files(text: Path) -> int:
    """Return the number of record files for the shards in a directory."""
    size = sum(shard.stat().st_size for shard in text.iterdir())
    return min(MAX_RECORD_FILES, max(1, size // BYTES_PER_RECORD_FILE))


def join_examples(run: Run, text: Path, parts: Sequence[Path], out: Path) -> None:
    """Fill the directory `out` with the records of all parts.

    The files are links to those of the parts. Small parts are joined to fewer files.
    """
    number = _record_files(text)
    if number >= len(parts):
        for part in parts:
            for path in part.glob(RECORD_GLOB):
                files.link_or_copy(path, out / path.name)
        return
    for n in range(number):
        paths = [path for part in parts[n::number] for path in sorted(part.glob(RECORD_GLOB))]
        with (out / f"pretrain_data.tfrecord-{n}-of-{number}").open("wb") as target:
            for path in paths:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, target, 2**20)


def import_records(run: Run, records: Path, out: Path) -> int:
    """Copy records to the directory `out`; return the number of examples.

    UsageError if they do not fit the profile.
    """
    length, log = run.profile.model.max_seq_length, run.log_file("examples")
    arguments = {"directory": str(records), "length": length, "vocab_size": run.vocab_size}
    examples = subprocesses.call(
        "electra_wrap.data.tfrecords", "count_examples", arguments, log=log
    )
    shutil.copytree(records, out, dirs_exist_ok=True)
    return int(examples)


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
    run.make_model_dir()
    start = max((checkpoint.step for checkpoint in checkpoints(run.model_dir)), default=0)
    for step in range(start + every - start % every, last, every):
        _train_until(run, step, devices, on_event)
        evaluate(run, Checkpoint(NAME, step, run.model_dir), devices, on_event)
    _train_until(run, last, devices, on_event)


def _train_until(run: Run, step: int, devices: Sequence[str], on_event: OnEvent) -> None:
    # TensorFlow continues from the checkpoints in this list, which may be outdated.
    files.remove(run.model_dir / "checkpoint")
    if names := [_prefix(checkpoint).name for checkpoint in checkpoints(run.model_dir)]:
        lines = [f'model_checkpoint_path: "{names[-1]}"\n']
        lines += [f'all_model_checkpoint_paths: "{name}"\n' for name in names]
        files.write_text(run.model_dir / "checkpoint", "".join(lines))
    path, log = run.directory / "hparams.json", run.log_file("train")
    files.write_json(path, hparams(run.profile, run.vocab_size))
    _run_pretraining(run, path, {"stop": step}, devices, log, on_event)


def evaluate(run: Run, checkpoint: Checkpoint, devices: Sequence[str], on_event: OnEvent) -> None:
    """Evaluate a checkpoint on the held-out records with the script's `do_eval`."""
    examples = run.results(run.examples_record)["held_out_examples"]
    batch_size = min(run.profile.train.batch_size, examples)
    values = hparams(run.profile, run.vocab_size) | {
        "do_train": False,
        "do_eval": True,
        "eval_batch_size": batch_size,
        "num_eval_steps": examples // batch_size,
        "pretrain_tfrecords": str(run.directory / EXAMPLES[1] / RECORD_GLOB),
    }
    path, log = run.directory / "logs" / "evaluate.hparams.json", run.log_file("evaluate")
    files.write_json(path, values)
    runtime = {"checkpoint": str(_prefix(checkpoint))}
    _run_pretraining(run, path, runtime, devices, log, on_event)


def _run_pretraining(
    run: Run,
    hparams_file: Path,
    runtime: dict[str, Any],
    devices: Sequence[str],
    log: Path,
    on_event: OnEvent,
) -> None:
    """Run run_pretraining.py. `runtime` has what it has no argument for, for estimator.py."""
    settings = run.profile.train
    runtime = {"seed": settings.seed, "precision": settings.precision, **runtime}
    env = {"ELECTRA_WRAP_RUNTIME": json.dumps(runtime)}
    if not devices:
        env["CUDA_VISIBLE_DEVICES"] = "-1"
    arguments = [
        f"--data-dir={run.directory}",
        f"--model-name={run.profile.model_name}",
        f"--hparams={hparams_file}",
    ]
    _run_script(run, "run_pretraining.py", arguments, env, log, on_event)


def _run_script(
    run: Run, name: str, arguments: list[str], env: dict[str, str], log: Path, on_event: OnEvent
) -> None:
    """Run a script of a checkout that is verified before and after."""
    source = checkout.ensure(run.upstream)
    argv = [environment.python(), "-s", str(source / name), *arguments]
    with environment.package_path() as path:
        env = {**env, "PYTHONPATH": path}
        subprocesses.follow(argv, cwd=source, env=env, log=log, on_event=on_event)
    checkout.ensure(run.upstream)


def checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the checkpoints in a directory, in the order of their steps."""
    names = (re.fullmatch(r"model\.ckpt-(\d+)\.index", path.name) for path in directory.glob("*"))
    steps = sorted(int(match[1]) for match in names if match)
    return [Checkpoint(NAME, step, directory) for step in steps]


def _prefix(checkpoint: Checkpoint) -> Path:
    return checkpoint.directory / f"model.ckpt-{checkpoint.step}"


def checksums(checkpoint: Checkpoint) -> Path:
    """Return the file with the checksums of a checkpoint's files, which estimator.py writes."""
    return Path(f"{_prefix(checkpoint)}.sha256")


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint."""
    return [Path(f"{_prefix(checkpoint)}.{part}") for part in ("index", "data-00000-of-00001")]


def archive(checkpoint: Checkpoint) -> None:
    """Rename a checkpoint's files so that it is no longer discovered."""
    for path in (*weight_files(checkpoint), checksums(checkpoint)):
        files.archive(path)


def export(run: Run, checkpoint: Checkpoint, out: Path, *, optimizer: bool = False) -> None:
    """Write `out`/discriminator and `out`/generator for transformers.

    With `optimizer`, Adam's slots are written beside each model.
    """
    arguments = {
        "checkpoint": str(_prefix(checkpoint)),
        "out": str(out),
        "slots": optimizer,
        "heads": {n: run.profile.model.shape(n).num_attention_heads for n in NETWORKS},
        "expected": {n: run.profile.hf_config(n, run.vocab_size) for n in NETWORKS},
    }
    log = run.log_file("convert")
    subprocesses.call("electra_wrap.weights", "to_transformers", arguments, log=log)


def import_checkpoint(run: Run, exported: Path, step: int) -> None:
    """Make a checkpoint from the directory that another engine's `export` wrote."""
    converted = exported / "checkpoint"
    converted.mkdir()
    arguments: dict[str, Any] = {network: str(exported / network) for network in NETWORKS}
    arguments |= {"out": str(converted), "step": step}
    log = run.log_file("train")
    subprocesses.call("electra_wrap.weights", "to_tensorflow", arguments, log=log)
    imported = Checkpoint(NAME, step, run.model_dir)
    for path in weight_files(imported):
        files.move_into_place(converted / path.name, path)
    files.write_checksums(checksums(imported), weight_files(imported))
