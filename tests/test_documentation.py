"""Every command in README.md and docs/ works as it stands there.

Commands that would take long are reduced by options that the wrapper of `python` appends. Commands
that need a GPU also run without those options, and must fail with the line that names the GPU.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import SPANISH

from electra_wrap import paths
from electra_wrap.profile import Profile

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Seconds for one command, on a busy machine.
TIMEOUT = 300

SAMPLE = str(paths.CONFIGS / "spanish-sample.txt")


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


#: A model that trains in a second.
TINY = settings(
    "corpus.max_lines=300",
    "corpus.shards=2",
    "tokenizer.vocab_size=300",
    "model.hidden_size=64",
    "model.num_hidden_layers=1",
    "model.generator_hidden_size=1.0",
    "model.max_seq_length=32",
    "train.steps=4",
    "train.warmup_steps=1",
    "train.batch_size=4",
    "train.log_every=1",
    "train.device=cpu",
)
TEXT = settings(f"corpus.source={SAMPLE}", "tokenizer.source=train")
SHARED = [*TINY, *TEXT, "--run-dir", "shared/es"]

#: The options that reduce each command. In these tables, commands are without `.venv/bin/` and
#: without comments.
REDUCED: dict[str, list[str]] = {
    # README.md
    "python -m electra_wrap run": [*TINY, *settings("corpus.held_out=0"), "--until", "convert"],
    "python -m electra_wrap detect --model runs/spanish-tiny --replace"
    ' "Los pájaros están hablando"': [],
    "python -m electra_wrap run --profile spanish-small --set engine=native": [
        *TINY,
        *TEXT,
        *settings("corpus.held_out=0.1"),
    ],
    "python -m electra_wrap tensorboard runs/spanish-small": ["--port", "0"],
    "python -m electra_wrap profiles": [],
    "python -m electra_wrap run --profile catalan.toml": [
        *TINY,
        *settings("corpus.source=news/*.txt"),
        "--until",
        "vocab",
    ],
    "python -m electra_wrap show --profile spanish-small": [],
    "python -m electra_wrap show runs/spanish-small --what discriminator": [],
    # docs/clusters.md
    "python -m electra_wrap run --profile spanish-small --set engine=native --run-dir /shared/es"
    " --until vocab": SHARED,
    "python -m electra_wrap run --profile spanish-small --set engine=native --run-dir /shared/es"
    " --shard $SLURM_ARRAY_TASK_ID/16": SHARED,
    "python -m electra_wrap run --profile spanish-small --set engine=native --run-dir /shared/es": [
        *SHARED,
        "--until",
        "examples",
    ],
    # docs/converting-checkpoints.md
    "python -m electra_wrap convert runs/spanish-small --step best --out best": [],
    "python -m electra_wrap convert --to-tf best/discriminator best/generator --step 1000"
    " --out back": [],
    "python -m electra_wrap convert electra_small/ --vocab electra_small/vocab.txt --lowercase"
    " --strip-accents --out hf": [],
    # docs/engines-and-speed.md
    "python -m electra_wrap bench --profile spanish-tiny": [
        *TINY,
        "--engine",
        "native",
        "--steps",
        "12",
    ],
    # docs/evaluation-and-tensorboard.md
    "python -m electra_wrap evaluate runs/spanish-small": [],
    "python -m electra_wrap report runs/spanish-tiny runs/spanish-small --out both.html": [],
    "python -m electra_wrap detect --model runs/spanish-small --file texts.txt --json"
    " > found.jsonl": [],
    # docs/text-and-vocabulary.md
    "python -m electra_wrap corpus runs/spanish-small": [],
}

#: Commands that fail without a GPU, and what their error says. They have exit code 3.
NEEDS_GPU = {
    "python -m electra_wrap doctor --profile spanish-small --set engine=native": (
        "spanish-small needs: GPUs, native engine"
    ),
    "python -m electra_wrap run --profile spanish-small --set engine=native": (
        'train.device = "gpu", but PyTorch sees none'
    ),
    "python -m electra_wrap run --profile spanish-small --set engine=native --launch"
    ' "torchrun --nnodes 2 --node-rank 0 --master-addr FIRST --nproc-per-node 8'
    ' --shutdown-timeout 300"': 'train.device = "gpu", but PyTorch sees none',
    "python -m electra_wrap bench --profile spanish-small --vocab-size 30522 --steps 1200"
    " --engine native": 'train.device = "gpu", but PyTorch sees none',
    "python -m electra_wrap bench --profile spanish-base --vocab-size 30522 --set"
    " model.max_seq_length=128 --steps 600 --engine native": (
        'train.device = "gpu", but PyTorch sees none'
    ),
}

#: Commands that need google-research/electra.
NEEDS_UPSTREAM = {"python -m electra_wrap vendor"}

#: Commands that no test runs, and why.
NOT_RUN = {
    "python3 -m venv .venv-tox && .venv-tox/bin/pip install -q tox && .venv-tox/bin/tox": (
        "runs this test"
    ),
    "torchrun --nnodes 2 --node-rank 1 --master-addr FIRST --nproc-per-node 8"
    " --shutdown-timeout 300 -m electra_wrap.native.train runs/spanish-small": (
        "needs two machines; tests/test_native.py runs torchrun on one"
    ),
    "hf upload NAME runs/spanish-small/hf/discriminator": "needs an account at a hub",
    "python tests/measure_records.py": "takes minutes",
}


#: README.md's first command installs the package, which is installed here.
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -e . && "


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, in order and on one line each."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s+)#.*", "", line).removeprefix(INSTALL)
            if command:
                found.append(command.removeprefix(".venv/bin/"))
    return found


def test_every_command_is_tested_or_listed() -> None:
    documented = {command for page in PAGES for command in commands(page)}
    assert documented == {*REDUCED, *NEEDS_GPU, *NEEDS_UPSTREAM, *NOT_RUN}


def test_commands_of_the_test_suite() -> None:
    """`.ci/run` takes the command from README.md."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.split("<!-- tests -->\n", 1)[1].split("\n```\n", 1)[0]
    assert block.splitlines()[0] == "```bash" and block.splitlines()[1] in NOT_RUN
    assert INSTALL in text


def test_every_key_of_a_profile_is_documented() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    keys = Profile.load("spanish-tiny").flat()
    assert not [key for key in keys if key not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.M)
        anchors = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
        }
        assert not anchor or anchor in anchors, target


class Shell:
    """Runs commands in a directory, with a `python` that appends options to its arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        wrapper = directory.with_name(f"{directory.name}-bin") / "python"
        wrapper.parent.mkdir()
        python = shlex.quote(sys.executable)
        script = f'#!/bin/sh\neval "exec {python} \\"\\$@\\" $APPENDED_OPTIONS"\n'
        wrapper.write_text(script, encoding="utf-8")
        wrapper.chmod(0o755)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(paths.PACKAGE.parent),
            "PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
            "SLURM_ARRAY_TASK_ID": "0",
        }

    def run(
        self, command: str, options: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        child = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.directory,
            env={**self._environment, **variables, "APPENDED_OPTIONS": shlex.join(options)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        output = ""
        try:
            if " tensorboard " in command:
                assert child.stderr is not None
                while "http://" not in output and (line := child.stderr.readline()):
                    output += line
                os.killpg(child.pid, signal.SIGTERM)
            stdout, stderr = child.communicate(timeout=TIMEOUT)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, child.returncode, stdout, output + stderr)


def run_reduced(shell: Shell, page: Path) -> None:
    """Run the commands of a page in order, and assert that each of them succeeds.

    Commands that an earlier page has, too, are left out.
    """
    earlier = {command for other in PAGES[: PAGES.index(page)] for command in commands(other)}
    for command in commands(page):
        if command not in REDUCED or command in earlier:
            continue
        if "electra_small/" in command:  # a checkpoint of upstream's, with its vocabulary
            shutil.copytree(shell.directory / "back", shell.directory / "electra_small")
            vocabulary = shell.directory / "runs" / "spanish-small" / "vocab.txt"
            shutil.copy(vocabulary, shell.directory / "electra_small")
        done = shell.run(command, REDUCED[command])
        expected = 130 if " tensorboard " in command else 0
        assert done.returncode == expected, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"


def run_without_gpu(shell: Shell, command: str) -> None:
    """Run a command that needs a GPU, and assert that it fails with the line that says so."""
    done = shell.run(command, HF_HUB_OFFLINE="1", https_proxy="http://127.0.0.1:9")
    last_line = done.stderr.splitlines()[-1]
    assert done.returncode == 3, f"{command}\n{done.stderr}"
    assert last_line.startswith("electra_wrap: error: ")
    assert NEEDS_GPU[command] in last_line, command


@pytest.mark.slow
def test_commands_work_as_documented(tmp_path: Path) -> None:
    """README.md's commands make the runs that the other pages use. Two processes work at once."""
    shell, without_gpu = Shell(tmp_path / "reduced"), Shell(tmp_path / "without_gpu")
    (shell.directory / "texts.txt").write_text("\n".join(SPANISH), encoding="utf-8")
    (shell.directory / "news").mkdir()
    (shell.directory / "news" / "today.txt").write_text("\n".join(SPANISH), encoding="utf-8")
    readme = PAGES[0].read_text("utf-8")
    profiles = re.findall(r"^```toml\n(.*?)^```", readme, re.M | re.S)
    (shell.directory / "catalan.toml").write_text(profiles[0], encoding="utf-8")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = pool.submit(run_reduced, shell, PAGES[0])
        tasks = [pool.submit(run_without_gpu, without_gpu, command) for command in NEEDS_GPU]
        runs.result()
        tasks += [pool.submit(run_reduced, shell, page) for page in PAGES[1:]]
        for task in tasks:
            task.result()
    assert (shell.directory / "found.jsonl").read_text("utf-8").count("\n") == len(SPANISH)


@pytest.mark.upstream
@pytest.mark.usefixtures("upstream")
def test_upstream_commands_work_as_documented(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "upstream")
    for command in sorted(NEEDS_UPSTREAM):
        done = shell.run(command)
        assert done.returncode == 0, done.stderr
