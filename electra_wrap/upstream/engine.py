"""The upstream engine: what stages.py asks of an engine, done by google-research/electra's two scripts.

They run as subprocesses: their arguments, their environment, and what their output says are here.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_wrap import corpus, metrics, process, vocab
from electra_wrap.errors import UsageError
from electra_wrap.native import engine as native
from electra_wrap.profile import NETWORKS
from electra_wrap.progress import say
from electra_wrap.rundir import finish, link, remove, write_json, write_sums, write_text
from electra_wrap.upstream import checkout

if TYPE_CHECKING:
    from electra_wrap.stages import Run

#: The stage that makes training data, its outputs (training, held out), and the packages behind each stage.
DATA, OUTPUTS = "tfrecords", ("pretrain_tfrecords", "heldout_tfrecords")
PACKAGES = {DATA: (), "train": ("tensorflow",), "convert": ("tensorflow", "safetensors")}

#: Text for each record file. Upstream's 1000 files are for a corpus of gigabytes; training mixes the files.
BYTES_PER_RECORD_FILE = 2**20

#: The module that lists GPUs, and what to say where there is none.
GPUS, NO_GPU = "electra_wrap.upstream.gpus", "TensorFlow sees none; install electra-wrap[gpu] and the NVIDIA driver"

#: What trained a model, in its model card.
CREDIT = "[google-research/electra](https://github.com/google-research/electra), driven by electra_wrap"


def versions() -> dict[str, str]:
    """What of the engine, other than packages, its results depend on."""
    pin = checkout.Pin.read()
    return {"upstream": pin.commit, "patched upstream": pin.patched_tree}


def precision(wanted: str, gpus: Sequence[str]) -> str:
    """The precision of products: the profile's, where `auto` is what the scripts do."""
    return "float32" if wanted == "auto" else wanted


def prepare(run: Run) -> None:
    """Fetch, verify and patch upstream, before hours of other work. EnvironmentLacks if that cannot be."""
    checkout.ensure(run.upstream)


def record_files(text_bytes: int) -> int:
    """Number of record files that fit so much text: about one for each MiB, at most 1000."""
    return min(1000, max(1, text_bytes // BYTES_PER_RECORD_FILE))


def build(run: Run, text: Path, out: Path, jobs: dict[str, Any], log: Path, on_line: Callable[[str], None]) -> None:
    """Build parts of the records of `text`, a shard each, under `out`; `jobs` are the keywords of `parts.build`."""
    shards = list(text.iterdir())
    files = record_files(sum(path.stat().st_size for path in shards))
    keys = run.profile.tokenizer
    arguments = [
        f"--corpus-dir={text}",
        f"--vocab-file={run.vocabulary}",
        f"--output-dir={out}",
        f"--max-seq-length={run.profile.model.max_seq_length}",
        f"--num-processes={len(shards)}",
        f"--num-out-files={len(shards) * max(1, round(files / len(shards)))}",
        f"--blanks-separate-docs={run.profile.corpus.blank_lines_separate_documents}",
        f"--seed={run.profile.train.seed}",
        f"--jobs={json.dumps(jobs)}",
        "--do-lower-case" if keys.lowercase else "--no-lower-case",
        "--do-strip-accents" if keys.strip_accents else "--no-strip-accents",
    ]
    script(run, "build_pretraining_dataset.py", arguments, {}, log, on_line)


def bytes_per_token(vocab_size: int) -> float:
    """Bytes that a token takes in the parts and in what is made of them, which is links or small."""
    return 5.2


def join(run: Run, text: Path, parts: Sequence[Path], out: Path) -> None:
    """Fill `out` with the records of the parts of `text`: the same files, or where those are small, fewer."""
    wanted = record_files(sum(path.stat().st_size for path in text.iterdir()))
    if wanted >= len(parts):
        for file in (file for part in parts for file in part.glob(corpus.RECORDS)):
            link(file, out / file.name)
        return
    for number in range(wanted):
        with (out / f"pretrain_data.tfrecord-{number}-of-{wanted}").open("wb") as target:
            for file in (file for part in parts[number::wanted] for file in sorted(part.glob(corpus.RECORDS))):
                with file.open("rb") as source:
                    shutil.copyfileobj(source, target, 2**20)


def take(run: Run, records: Path, out: Path) -> int:
    """Take records that were made elsewhere as they are, if they fit; return the number of examples."""
    number = native.take(run, records, None)
    shutil.copytree(records, out)
    return number


def train(run: Run, gpus: Sequence[str], on_scalars: Callable[[dict[str, Any]], None]) -> None:
    """Train until the profile's last step; `on_scalars` gets what logged steps and evaluations gave.

    The script either trains or evaluates, so it is started anew after each evaluation.
    """
    if run.launch:
        raise UsageError('--launch is for engine = "native"; the scripts know one process')
    start, last = max(steps(run.model_dir), default=0), run.profile.train.steps
    every = run.profile.train.evaluate_every or last
    if every < last and every * run.profile.train.batch_size < run.recorded(DATA)["facts"]["examples"]:
        say(
            "train: warning: upstream's script begins to read its records anew after each evaluation, before it has "
            "read them all; raise train.evaluate_every"
        )
    for stop in (*range(start + every - start % every, last, every), last):
        _train(run, gpus, stop, on_scalars)
        if stop < last:
            evaluate(run, gpus, stop, on_scalars)


def _train(run: Run, gpus: Sequence[str], stop: int, on_scalars: Callable[[dict[str, Any]], None]) -> None:
    remove(run.model_dir / "checkpoint")  # TensorFlow's own list of what is there, which may be another by now
    if found := steps(run.model_dir):
        names = [f'all_model_checkpoint_paths: "model.ckpt-{step}"\n' for step in found]
        text = f'model_checkpoint_path: "model.ckpt-{found[-1]}"\n{"".join(names)}'
        write_text(run.model_dir / "checkpoint", text)
    write_json(run.directory / "hparams.json", run.hparams())
    _pretraining(run, gpus, run.directory / "hparams.json", {"stop": stop}, run.log("train"), on_scalars)


def evaluate(run: Run, gpus: Sequence[str], step: int, on_scalars: Callable[[dict[str, Any]], None]) -> None:
    """Evaluate a checkpoint on the held-out records with the script's `do_eval`; `on_scalars` gets the metrics."""
    examples = run.recorded(DATA)["facts"]["held_out_examples"]
    size = min(run.profile.train.batch_size, examples)
    hparams = run.hparams() | {
        **{"do_train": False, "do_eval": True, "eval_batch_size": size, "num_eval_steps": examples // size},
        "pretrain_tfrecords": str(run.directory / OUTPUTS[1] / corpus.RECORDS),
    }
    path = run.directory / "logs" / "evaluate.hparams.json"
    write_json(path, hparams)
    checkpoint = str(run.model_dir / f"model.ckpt-{step}")
    _pretraining(run, gpus, path, {"checkpoint": checkpoint}, run.log("evaluate"), on_scalars)


def _pretraining(
    run: Run,
    gpus: Sequence[str],
    hparams: Path,
    more: dict[str, Any],
    log: Path,
    on_scalars: Callable[[dict[str, Any]], None],
) -> None:
    """Run run_pretraining.py; `more` is for estimator.py alone."""
    keys = run.profile.train
    xla = keys.compile is True
    environment = {
        # What the scripts have no argument for: estimator.py reads it.
        "ELECTRA_WRAP_RUNTIME": json.dumps({"seed": keys.seed, "precision": keys.precision, "xla": xla, **more}),
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": "-1"}),
        # XLA compiles for the CPU only when told so here.
        **({"TF_XLA_FLAGS": "--tf_xla_cpu_global_jit"} if xla and not gpus else {}),
    }
    arguments = [f"--data-dir={run.directory.path}", f"--model-name={run.profile.model_name}", f"--hparams={hparams}"]
    script(run, "run_pretraining.py", arguments, environment, log, metrics.follow(on_scalars))


def script(
    run: Run, name: str, arguments: list[str], extra: dict[str, str], log: Path, on_line: Callable[[str], None]
) -> None:
    """Run one of the scripts, of a checkout that is verified first, with its output in `log`."""
    source = checkout.ensure(run.upstream)
    argv = [sys.executable, "-s", str(source / name), *arguments]
    process.run(argv, cwd=source, env=process.environment(extra), log=log, on_line=on_line)


def steps(model_dir: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    return sorted(int(m[1]) for p in model_dir.glob("model.ckpt-*") if (m := re.fullmatch(r".*-(\d+)\.index", p.name)))


def sums(model_dir: Path, step: int) -> Path:
    """The file that has the digests of a checkpoint's files (estimator.py writes it)."""
    return model_dir / f"model.ckpt-{step}.sha256"


def set_aside(run: Run, step: int) -> None:
    """Give a checkpoint's files names that are no checkpoint's."""
    for file in (*files(run.model_dir, step), sums(run.model_dir, step)):
        run.directory.set_aside(file)


def files(model_dir: Path, step: int) -> list[Path]:
    """The files of a checkpoint."""
    return [model_dir / f"model.ckpt-{step}.{part}" for part in ("index", "data-00000-of-00001")]


def export(run: Run, model_dir: Path, step: int, out: Path, *, slots: bool = False) -> dict[str, Any]:
    """Write `out`/discriminator and `out`/generator as transformers loads them; `slots`: with Adam's, for training."""
    size = len(vocab.read(run.vocabulary))
    job = {
        "task": "convert",
        "checkpoint": str(model_dir / f"model.ckpt-{step}"),
        "out": str(out),
        "slots": slots,
        "expected": {network: run.profile.hf_config(network, size) for network in NETWORKS},
    }
    return {"variables": process.call("electra_wrap.weights", job, log=run.log("convert"))["variables"]}


def adopt(run: Run, step: int, exported: Path) -> None:
    """Make a checkpoint of what another engine exported with slots, from which `train` goes on."""
    made = exported / "checkpoint"
    networks: dict[str, str] = {network: str(exported / network) for network in NETWORKS}
    job = {"task": "convert_back", "step": step, "out": str(made), **networks}
    process.call("electra_wrap.weights", job, log=run.log("train"))
    for file in files(made, step):
        finish(file, run.model_dir / file.name)
    write_sums(sums(run.model_dir, step), files(run.model_dir, step))
