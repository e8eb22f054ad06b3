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
from pathlib import Path

import pytest
from conftest import SPANISH

from electra_wrap import paths, profiles

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Seconds for one command, on a busy machine.
TIMEOUT = 300

#: Begins most commands that are tested. The tables below leave it out, and `.venv/bin/`.
PREFIX = "python -m electra_wrap "

#: Begins the others.
EXAMPLE = "python examples/"

#: A model that trains in a second; the same on the sample that ships, in place of a large corpus.
TINY = (
    "--set corpus.max_lines=300 --set corpus.shards=2 --set tokenizer.vocab_size=300"
    " --set model.hidden_size=64 --set model.num_hidden_layers=1 --set model.max_seq_length=32"
    " --set model.generator_hidden_size=1.0 --set train.steps=4 --set train.warmup_steps=1"
    " --set train.batch_size=4 --set train.log_every=1 --set train.device=cpu"
)
SAMPLE = shlex.quote(f"corpus.source={paths.CONFIGS / 'spanish-sample.txt'}")
TINY_SAMPLE = f"{TINY} --set {SAMPLE} --set tokenizer.source=train"

NATIVE = "run --profile spanish-small --set engine=native"
SHARED = f"{NATIVE} --run-dir /shared/es"
FIRST_PHASE = "run --profile spanish-base-128 --set engine=native"
SECOND_PHASE = "run --profile spanish-base --set engine=native"

#: The options that reduce a command. Others run as they are.
REDUCED = {
    "run": f"{TINY} --set corpus.held_out=0 --until convert",
    "run --profile catalan.toml": f"{TINY} --set 'corpus.source=news/*.txt' --until vocab",
    NATIVE: f"{TINY_SAMPLE} --set corpus.held_out=0.1",
    f"{SHARED} --until vocab": f"{TINY_SAMPLE} --run-dir shared/es",
    f"{SHARED} --shard $SLURM_ARRAY_TASK_ID/16": f"{TINY_SAMPLE} --run-dir shared/es",
    SHARED: f"{TINY_SAMPLE} --run-dir shared/es --until examples",
    FIRST_PHASE: f"{TINY_SAMPLE} --set corpus.held_out=0.1",
    # The sizes and the vocabulary are those of the first phase.
    SECOND_PHASE: f"--set {SAMPLE} --set corpus.held_out=0.1 --set corpus.max_lines=300"
    " --set corpus.shards=2 --set train.steps=2 --set train.warmup_steps=1"
    " --set train.batch_size=4 --set train.log_every=1 --set train.device=cpu",
    "bench --profile spanish-tiny": f"{TINY} --engine native --steps 12",
    "tensorboard runs/spanish-small": "--port 0",
    "run --profile examples/spanish-debian.toml": f"{TINY_SAMPLE} --set corpus.held_out=0.1",
    "convert runs/spanish-debian --step 12000 --out step-12000": "--step 4",
}

#: The options that reduce the commands of these scripts.
REDUCED_SCRIPTS = {
    "compare.py": "--examples 20 --steps 2 --seeds 0",
    "fine_tuning.py": "--examples 20 --steps 2",
}

#: Commands that fail without a GPU, and what their error says. They have exit code 3.
NO_GPU = 'train.device = "gpu", but PyTorch sees none'
NEEDS_GPU = {
    "doctor --profile spanish-small --set engine=native": "spanish-small needs: GPUs, native",
    NATIVE: NO_GPU,
    f'{NATIVE} --launch "torchrun --nnodes 2 --node-rank 0 --master-addr FIRST --nproc-per-node 8'
    ' --shutdown-timeout 300"': NO_GPU,
    "bench --profile spanish-small --vocab-size 30522 --steps 1200 --engine native": NO_GPU,
    "bench --profile spanish-base-128 --vocab-size 30522 --steps 600 --engine native": NO_GPU,
    FIRST_PHASE: NO_GPU,
}

#: Commands that need google-research/electra.
NEEDS_UPSTREAM = {"vendor"}

#: Commands that no test runs.
NOT_RUN = {
    # It runs this test.
    "python3 -m venv .venv-tox && .venv-tox/bin/pip install -q tox && .venv-tox/bin/tox",
    # Needs two machines; tests/test_native.py runs torchrun on one.
    "torchrun --nnodes 2 --node-rank 1 --master-addr FIRST --nproc-per-node 8"
    " --shutdown-timeout 300 -m electra_wrap.native.train runs/spanish-small",
    # Needs an account at a hub.
    "hf upload NAME runs/spanish-small/hf/discriminator",
    # Takes minutes.
    "python tests/measure_records.py",
    # Needs Debian or Ubuntu, and downloads 0.75 GB.
    "python examples/spanish_text.py",
}

#: README.md's first command installs the package, which is installed here.
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -e . && "


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, in order and each as in the tables."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s+)#.*", "", line).removeprefix(INSTALL)
            command = command.removeprefix(".venv/bin/")
            is_tested = command.startswith((PREFIX, EXAMPLE))
            assert not command or is_tested or command in NOT_RUN, command
            found.append(command.removeprefix(PREFIX))
    return [command for command in found if command]


def test_listed_commands_are_documented() -> None:
    documented = {command for page in PAGES for command in commands(page)}
    assert {*REDUCED, *NEEDS_GPU, *NEEDS_UPSTREAM, *NOT_RUN} <= documented


def test_command_of_the_test_suite() -> None:
    """`.ci/run` takes it from README.md."""
    text = (ROOT / "README.md").read_text("utf-8")
    block = text.split("<!-- tests -->\n", 1)[1].split("\n```\n", 1)[0]
    assert block.splitlines()[0] == "```bash" and block.splitlines()[1] in NOT_RUN
    assert INSTALL in text


def test_every_key_of_a_profile_is_documented() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    keys = profiles.load("spanish-tiny").flat()
    assert not [key for key in keys if key not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if anchor:  # of a page; a picture has none
            headings = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in anchors, target


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
        self, command: str, options: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        child = subprocess.Popen(
            ["bash", "-c", command if command.startswith(EXAMPLE) else f"{PREFIX}{command}"],
            cwd=self.directory,
            env={**self._environment, **variables, "APPENDED_OPTIONS": options},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        output = ""
        try:
            if command.startswith("tensorboard"):
                assert child.stdout is not None
                while "http://" not in output and (line := child.stdout.readline()):
                    output += line
                os.killpg(child.pid, signal.SIGTERM)
            stdout, stderr = child.communicate(timeout=TIMEOUT)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, child.returncode, output + stdout, stderr)


def run_reduced(shell: Shell, page: Path) -> None:
    """Run the commands of a page in order, and assert that each of them succeeds.

    Commands that an earlier page has, too, are left out.
    """
    left_out = {command for other in PAGES[: PAGES.index(page)] for command in commands(other)}
    left_out |= {*NEEDS_GPU, *NEEDS_UPSTREAM, *NOT_RUN} - REDUCED.keys()
    for command in commands(page):
        if command in left_out:
            continue
        if "electra_small/" in command:  # a checkpoint of upstream's, with its vocabulary
            shutil.copytree(shell.directory / "back", shell.directory / "electra_small")
            vocabulary = shell.directory / "runs" / "spanish-small" / "vocab.txt"
            shutil.copy(vocabulary, shell.directory / "electra_small")
        script = command.removeprefix(EXAMPLE).partition(" ")[0]
        done = shell.run(command, REDUCED.get(command) or REDUCED_SCRIPTS.get(script, ""))
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"


def run_without_gpu(shell: Shell, command: str) -> None:
    """Run a command that needs a GPU, and assert that it fails with the line that says so."""
    done = shell.run(command, HF_HUB_OFFLINE="1", https_proxy="http://127.0.0.1:9")
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 3, f"{command}\n{done.stderr}"
    assert error.startswith(f"electra_wrap: error: {NEEDS_GPU[command]}"), command


@pytest.mark.slow
def test_commands_work_as_documented(tmp_path: Path) -> None:
    """README.md's commands make the runs that the other pages use. Two processes work at once."""
    shell, without_gpu = Shell(tmp_path / "reduced"), Shell(tmp_path / "without_gpu")
    (shell.directory / "texts.txt").write_text("\n".join(SPANISH), encoding="utf-8")
    (shell.directory / "news").mkdir()
    (shell.directory / "news" / "today.txt").write_text("\n".join(SPANISH), encoding="utf-8")
    ignored = shutil.ignore_patterns("text", "*.ipynb", "__pycache__")
    shutil.copytree(ROOT / "examples", shell.directory / "examples", ignore=ignored)
    held_out = shell.directory / "examples" / "text" / "held-out.txt"
    held_out.parent.mkdir()
    forms = ["Los libros, el libro, la libra y las libras.", *SPANISH]
    documents = ("\n".join(f"{line} Párrafo {i}." for line in forms) for i in range(60))
    held_out.write_text("\n\n".join(documents), encoding="utf-8")
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
    for command in NEEDS_UPSTREAM:
        done = shell.run(command)
        assert done.returncode == 0, done.stderr
