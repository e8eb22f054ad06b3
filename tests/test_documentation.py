"""Every command in README.md and docs/ works as it stands there.

Commands that would take long are reduced by options that the wrapper of `python` appends. Commands
that need a GPU also run without those options, and must fail with the line that names the GPU.
"""

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SPANISH

from electra_wrap import paths, profiles
from electra_wrap.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Begin the commands that are tested. The tables below leave out the first, and `.venv/bin/`.
PREFIX = "python -m electra_wrap "
OTHERS = ("python examples/", "python benchmarks/", "tensorboard ")

#: A model that trains in a second; the sample that ships, in place of a large corpus; both.
TINY = (
    "--set corpus.max_lines=300 --set corpus.shards=2 --set tokenizer.vocab_size=300"
    " --set model.hidden_size=64 --set model.num_hidden_layers=1 --set model.max_seq_length=32"
    " --set model.generator_hidden_size=1.0 --set train.steps=4 --set train.warmup_steps=1"
    " --set train.batch_size=4 --set train.log_every=1 --set train.device=cpu"
)
SAMPLE = (
    f"--set {shlex.quote(f'corpus.source={paths.CONFIGS}/spanish-sample.txt')}"
    " --set corpus.blank_lines_separate_documents=true --set corpus.held_out=0.1"
)
TINY_SAMPLE = f"{TINY} {SAMPLE} --set tokenizer.source=train"

NATIVE = "run --profile spanish-small --set engine=native"
SHARED = f"{NATIVE} --run-dir /shared/es"
FIRST_PHASE = "run --profile spanish-base-128 --set engine=native"
SECOND_PHASE = "run --profile spanish-base --set engine=native"
BENCH = "python benchmarks/bench.py --profile"

#: The options that reduce a command, or all commands of a program. Others run as they are.
REDUCED = {
    "run": f"{TINY} --set corpus.held_out=0 --until convert",
    "run --profile catalan.toml": f"{TINY} --set 'corpus.source=news/*.txt' --until vocab",
    NATIVE: TINY_SAMPLE,
    f"{SHARED} --until examples": f"{TINY_SAMPLE} --run-dir shared/es",
    SHARED: f"{TINY_SAMPLE} --run-dir shared/es",
    FIRST_PHASE: TINY_SAMPLE,
    # The sizes and the vocabulary are those of the first phase.
    SECOND_PHASE: re.sub(r"--set (tokenizer|model)\S+", "", TINY_SAMPLE),
    "run --profile examples/spanish-debian.toml": TINY_SAMPLE,
    "convert runs/spanish-debian --step 12000 --out step-12000": "--step 4",
    "convert runs/spanish-small --step 500000 --out step-500000": "--step 4",
    f"{BENCH} spanish-tiny": f"{TINY} --engine native --steps 12",
    "python examples/compare.py": "--examples 20 --steps 2 --seeds 0",
    "python examples/fine_tuning.py": "--examples 20 --steps 2",
    "tensorboard --logdir": "--inspect",  # it prints the scalars, and does not serve them
}

#: Commands that fail without a GPU, and what their error says. They have exit code 3.
NO_GPU = 'train.device = "gpu", but the native engine sees none'
NEEDS_GPU = {
    "doctor --profile spanish-small --set engine=native": "spanish-small needs: GPUs, native",
    NATIVE: NO_GPU,
    f'{NATIVE} --launch "torchrun --nnodes 2 --node-rank 0 --master-addr FIRST --nproc-per-node 8'
    ' --shutdown-timeout 300"': NO_GPU,
    f"{BENCH} spanish-small --vocab-size 30522 --steps 1200 --engine native": NO_GPU,
    FIRST_PHASE: NO_GPU,
}

#: Commands that no test runs.
NOT_RUN = {
    # Runs the tests.
    "python3 -m venv .venv-tox && .venv-tox/bin/pip install -q tox && .venv-tox/bin/tox",
    # Needs two machines; tests/test_native.py runs torchrun on one.
    "torchrun --nnodes 2 --node-rank 1 --master-addr FIRST --nproc-per-node 8"
    " --shutdown-timeout 300 -m electra_wrap.native.train runs/spanish-small",
    "hf upload NAME runs/spanish-small/hf/discriminator",  # needs an account at a hub
    "python examples/spanish_text.py",  # needs Debian or Ubuntu, and downloads 0.75 GB
}

#: README.md's first command installs the package, which is installed here.
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -e . && "


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, in order and each as in the tables."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"(^|\s+)#.*", "", line).removeprefix(INSTALL).removeprefix("exec ")
            command = command.removeprefix(".venv/bin/")
            assert command.startswith((PREFIX, *OTHERS)) or command in {"", *NOT_RUN}, command
            found.append(command.removeprefix(PREFIX))
    return [command for command in found if command]


def test_listed_commands_are_documented() -> None:
    documented = {command for page in PAGES for command in commands(page)}
    programs = {" ".join(command.split()[:2]) for command in documented}
    assert {*NEEDS_GPU, *NOT_RUN, "vendor"} <= documented
    assert REDUCED.keys() <= documented | programs


def test_command_of_the_test_suite() -> None:
    """`.ci/run` takes it from README.md."""
    text = PAGES[0].read_text("utf-8")
    begin, command, *_ = text.split("<!-- tests -->\n", 1)[1].splitlines()
    assert begin == "```bash" and command in NOT_RUN and INSTALL in text


def test_stages_and_every_key_of_a_profile_are_documented() -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert " ──► ".join(["text", *(stage.name for stage in STAGES)]) + "\n" in text
    sections = profiles.load("spanish-tiny").model_dump()
    keys = [f"{s}.{key}" for s in ("corpus", "tokenizer", "model", "train") for key in sections[s]]
    assert not [key for key in [*sections, *keys] if key not in text]


def test_pre_commit_has_the_packages_of_tox() -> None:
    tox, pre_commit = ROOT / "tox.ini", ROOT / ".pre-commit-config.yaml"
    expected = re.search(r"^    mypy==.*?(?=^\w)", tox.read_text("utf-8"), re.M | re.S)
    found = re.search(r"^ +- mypy==.*?(?=^ +\w)", pre_commit.read_text("utf-8"), re.M | re.S)
    assert expected and found and expected[0].split() == found[0].replace("- ", "").split()


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
    """Runs commands in a directory, with programs that append options to their arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory, programs = directory, directory.with_name(f"{directory.name}-bin")
        ignored = shutil.ignore_patterns("text", "*.ipynb", "__pycache__")
        for name in ("examples", "benchmarks"):
            shutil.copytree(ROOT / name, directory / name, ignore=ignored)
        for new in (programs, directory / "examples" / "text", directory / "news"):
            new.mkdir()
        for name, module in (("python", ""), ("tensorboard", " -m tensorboard.main")):
            program = f'{shlex.quote(sys.executable)}{module} \\"\\$@\\" $APPENDED_OPTIONS'
            (programs / name).write_text(f'#!/bin/sh\neval "exec {program}"\n', encoding="utf-8")
            (programs / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(paths.PACKAGE.parent),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
        }

    def run(
        self, command: str, options: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = command if command.startswith(OTHERS) else f"{PREFIX}{command}"
        return subprocess.run(
            ["timeout", "--signal=KILL", "300", "bash", "-c", command],  # on a busy machine
            cwd=self.directory,
            env={**self._environment, **variables, "APPENDED_OPTIONS": options},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )


def run_reduced(shell: Shell, page: Path) -> None:
    """Run the commands of a page that no page before has, in order. Assert that they succeed."""
    left_out = {command for other in PAGES[: PAGES.index(page)] for command in commands(other)}
    left_out |= {*NEEDS_GPU, *NOT_RUN, "vendor"} - REDUCED.keys()
    for command in (command for command in commands(page) if command not in left_out):
        if "electra_small/" in command:  # a checkpoint of upstream's, with its vocabulary
            shutil.copytree(shell.directory / "back", shell.directory / "electra_small")
            vocabulary = shell.directory / "runs/spanish-small/vocab.txt"
            shutil.copy(vocabulary, shell.directory / "electra_small")
        program = " ".join(command.split()[:2])
        done = shell.run(command, REDUCED.get(command, REDUCED.get(program, "")))
        assert done.returncode == 0 and "Traceback" not in done.stderr, done
        assert "loss/total" in done.stdout or not command.startswith("tensorboard"), done


def run_without_gpu(shell: Shell, command: str) -> None:
    """Run a command that needs a GPU, and assert that it fails with the line that says so."""
    done = shell.run(command, HF_HUB_OFFLINE="1", https_proxy="http://127.0.0.1:9")
    error = re.sub("^(electra_wrap: error|bench: native): ", "", done.stderr.splitlines()[-1])
    assert done.returncode == 3 and error.startswith(NEEDS_GPU[command]), done


@pytest.mark.slow
def test_commands_work_as_documented(tmp_path: Path) -> None:
    """README.md's commands make the runs that the other pages use. Two processes work at once."""
    shell, without_gpu = Shell(tmp_path / "reduced"), Shell(tmp_path / "without_gpu")
    forms = ["Los libros, el libro, la libra y las libras.", *SPANISH]
    documents = ("\n".join(f"{line} Párrafo {i}." for line in forms) for i in range(60))
    tables = re.findall(r"^```toml\n(.*?)^```", PAGES[0].read_text("utf-8"), re.M | re.S)
    files = {"texts.txt": "\n".join(SPANISH), "news/today.txt": "\n".join(SPANISH)}
    files |= {"examples/text/held-out.txt": "\n\n".join(documents), "catalan.toml": tables[0]}
    for name, text in files.items():
        (shell.directory / name).write_text(text, encoding="utf-8")
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
def test_vendor_works_as_documented(tmp_path: Path) -> None:
    done = Shell(tmp_path / "upstream").run("vendor")
    assert done.returncode == 0, done.stderr
