"""The two scripts as subprocesses: their arguments, their environment, and what their output says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from electra_wrap import process
from electra_wrap.errors import Interrupted, StageFailed
from electra_wrap.profile import Profile

#: A line of upstream's ETAHook, e.g. `20/200 = 10.0%, SPS: 3.1, ELAP: 9, ETA: 58 - loss: 41.2034`.
_STEP = re.compile(r"^(\d+)/(\d+) = [\d.]+%, SPS: .* - loss: (\S+)$")
_JOB_DONE = re.compile(r"^Job (\d+): Done!$")


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Settings of a training process that upstream's scripts have no argument for: they go by the environment."""

    seed: int
    precision: str = "auto"
    xla: bool = False

    @classmethod
    def read(cls) -> Runtime:
        """Return what the parent process wrote. KeyError if the script was not started by electra_wrap."""
        return cls(**json.loads(os.environ["ELECTRA_WRAP_RUNTIME"]))

    def variables(self) -> dict[str, str]:
        """Return the environment that `read` reads."""
        return {"ELECTRA_WRAP_RUNTIME": json.dumps(dataclasses.asdict(self))}


def build_records(
    checkout: Path,
    profile: Profile,
    corpus: Path,
    vocabulary: Path,
    output: Path,
    *,
    files: int,
    log: Path,
    on_done: Callable[[int], None],
) -> None:
    """Run build_pretraining_dataset.py with a process for each file of `corpus`; `on_done` gets how many are done.

    `output` gets `files` record files, at least one for each process.
    """
    arguments = [
        f"--corpus-dir={corpus}",
        f"--vocab-file={vocabulary}",
        f"--output-dir={output}",
        f"--max-seq-length={profile.model.max_seq_length}",
        f"--num-processes={len(list(corpus.iterdir()))}",
        f"--num-out-files={files}",
        f"--blanks-separate-docs={profile.corpus.blank_lines_separate_documents}",
        f"--seed={profile.train.seed}",
        "--do-lower-case" if profile.tokenizer.lowercase else "--no-lower-case",
        "--do-strip-accents" if profile.tokenizer.strip_accents else "--no-strip-accents",
    ]
    done: set[str] = set()

    def read(line: str) -> None:
        if match := _JOB_DONE.match(line):
            done.add(match[1])
            on_done(len(done))

    _run(checkout, "build_pretraining_dataset.py", arguments, log, {"CUDA_VISIBLE_DEVICES": "-1"}, read)


def train(
    checkout: Path,
    profile: Profile,
    data_dir: Path,
    hparams: Path,
    *,
    gpu: bool,
    log: Path,
    on_step: Callable[[int, float], None],
) -> None:
    """Run run_pretraining.py as `hparams` says; `on_step` gets step and loss of each logged line."""

    def read(line: str) -> None:
        if match := _STEP.match(line):
            on_step(int(match[1]), float(match[3]))

    keys = profile.train
    xla = keys.compile is True
    environment = {
        **Runtime(keys.seed, keys.precision, xla).variables(),
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": "-1"}),
        # XLA compiles for the CPU only when told so here.
        **({"TF_XLA_FLAGS": "--tf_xla_cpu_global_jit"} if xla and not gpu else {}),
    }
    arguments = [f"--data-dir={data_dir}", f"--model-name={profile.model_name}", f"--hparams={hparams}"]
    _run(checkout, "run_pretraining.py", arguments, log, environment, read)


def _run(
    checkout: Path, script: str, arguments: list[str], log: Path, extra: dict[str, str], on_line: Callable[[str], None]
) -> None:
    argv = [sys.executable, "-s", str(checkout / script), *arguments]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(argv)}\n")
    code = process.run(argv, cwd=checkout, env=process.environment(extra), log=log, on_line=on_line)
    if code == process.INTERRUPTED:  # by a signal that went to it alone
        raise Interrupted("interrupted; the same command resumes")
    if code:
        raise StageFailed(f"{script} ended with code {code}; the whole log is {log}", process.tail(log))


def latest_step(model_dir: Path) -> int | None:
    """Step of the latest checkpoint that upstream's `checkpoint` file names, if that is there."""
    try:
        text = (model_dir / "checkpoint").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = re.search(r'^model_checkpoint_path: ".*model\.ckpt-(\d+)"$', text, re.M)
    if match is None or not (model_dir / f"model.ckpt-{match[1]}.index").is_file():
        return None
    return int(match[1])
