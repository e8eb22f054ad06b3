"""The command line: light imports, and one line for each failure."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import campaign
import pytest
from conftest import SPANISH

from electra_wrap import cli as cli_module
from electra_wrap import paths

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

#: Libraries that belong in child processes, each with the files that may import it.
HEAVY = {
    "tensorflow": {
        "data/tfrecords.py",
        "upstream/estimator.py",
        "upstream/gpus.py",
        "upstream/tf1.py",
        "weights.py",
    },
    "torch": {
        "inference.py",
        "native/devices.py",
        "native/evaluate.py",
        "native/encoder.py",
        "native/exchange.py",
        "native/model.py",
        "native/saving.py",
        "native/setup.py",
        "native/train.py",
    },
    "transformers": {"inference.py", "native/encoder.py", "native/model.py"},
    "accelerate": {"native/evaluate.py", "native/saving.py", "native/setup.py", "native/train.py"},
    "datasets": {"data/sources.py"},
}


def python(code: str, directory: Path) -> str:
    """Run code in a process that can import electra_wrap; return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={"PYTHONPATH": str(paths.PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [["--help"], ["profiles"], ["show"], ["run", "--dry-run"]])
def test_command_imports_neither_tensorflow_nor_torch(command: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom electra_wrap import cli\n"
        f"sys.argv = ['electra_wrap', *{command!r}]\n"
        "try: cli.entry_point()\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'torch', 'transformers', 'triton', 'keras'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    python(code, tmp_path)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_child_modules_import_frameworks() -> None:
    """With PyTorch's CUDA wheels the two abort in one process."""
    for path in paths.PACKAGE.rglob("*.py"):
        name = str(path.relative_to(paths.PACKAGE))
        for heavy, allowed in HEAVY.items():
            assert heavy not in imports(path) or name in allowed, f"{name} imports {heavy}"
    for path in Path(__file__).parent.rglob("*.py"):
        found = imports(path) & set(HEAVY)
        is_child = path.parent.name == "children" or path.name == "measure_gpu.py"  # it forks
        assert not found or is_child, f"{path.name} imports {found}"
        assert not ("tensorflow" in found and found - {"tensorflow"}), path.name


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("inference", "import torch, transformers; transformers.ElectraForPreTraining"),
        ("weights", "import tensorflow; tensorflow.train.load_checkpoint"),
        ("upstream.tf1", "pass"),
        ("native.train", "pass"),
        ("native.examples", "pass"),
        ("data.tfrecords", "import tensorflow"),
    ],
)
def test_child_process_loads_at_most_one_framework(module: str, use: str, tmp_path: Path) -> None:
    code = f"import sys, electra_wrap.{module}\n{use}\n"
    code += "print(*sorted({'tensorflow', 'torch', 'triton'} & set(sys.modules)))"
    loaded = set(python(code, tmp_path).split())
    assert not ("tensorflow" in loaded and loaded - {"tensorflow"})


def test_help_imports_no_slow_library(tmp_path: Path) -> None:
    slow = "{'fsspec', 'huggingface_hub', 'jinja2', 'matplotlib', 'numpy', 'tokenizers'}"
    code = f"import sys\nfrom electra_wrap import cli\nprint(*{slow} & set(sys.modules))"
    assert python(code, tmp_path).strip() == ""


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ([], 2, "COMMAND"),
        (["rnu"], 2, "invalid choice"),
        (["run", "--profile", "nope"], 2, "no profile 'nope'"),
        (["run", "--profile=--"], 2, "gives no value"),
        (["run", "--until", "nope"], 2, "the stages are corpus, vocab"),
        (["run", "--set", "corpus.source=nowhere.txt"], 2, "nowhere.txt"),
        (["run", "--run-dir", "/proc/nothing"], 3, "/proc/nothing"),
        (["show", "--what", "nope"], 2, "invalid choice"),
        (["show", "--profile", "spanish-demo", "--what", "hparams"], 3, "run --until vocab"),
        (["detect", "--model", "nowhere", "x"], 2, "has no discriminator"),
        (["tensorboard"], 2, "required: RUN_DIR"),
        (["evaluate", "."], 2, "is not a run directory"),
        (["corpus", "nowhere"], 2, "is not a run directory"),
        (["show", "nowhere"], 2, "is not a run directory"),
        (["bench", "--steps", "1"], 2, "at least"),
        (["bench", "--profile", "spanish-small"], 2, "--vocab-size N"),
        (["convert", "x", "--out", "y", "--strip-accents"], 2, "--lowercase"),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    cli: Cli, command: list[str], code: int, message: str
) -> None:
    done = cli(*command)
    error = done.stderr.splitlines()[-1]
    assert (
        done.returncode == code and error.startswith("electra_wrap: error: ") and message in error
    )
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_output_to_an_ascii_terminal(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'extends = "spanish-tiny"\ndescription = "señal"\n', encoding="utf-8"
    )
    done = cli("show", "--profile", "mine.toml", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["description"] == "señal" and done.returncode == 0
    done = cli("run", "--profile", "señal", env={"PYTHONIOENCODING": "ascii"})
    assert (
        done.stderr.startswith("electra_wrap: error: no profile 'se\\xf1al'")
        and done.returncode == 2
    )


def test_debug_prints_the_traceback(cli: Cli) -> None:
    assert "Traceback" in cli("--debug", "run", "--until", "nope").stderr


def test_internal_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: argparse.Namespace) -> None:
        raise KeyError("one\ntwo")

    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # pytest's own stay as they are
    with pytest.raises(SystemExit) as raised:
        cli_module._main(argparse.Namespace(function=broken, debug=False))
    assert raised.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_show_prints_json(cli: Cli) -> None:
    for what in ("profile", "hparams", "discriminator", "generator"):
        done = cli("show", "--what", what)
        assert isinstance(json.loads(done.stdout), dict) and done.stderr == ""
    assert json.loads(cli("show", "--set", "train.steps=77").stdout)["train"]["steps"] == 77


def test_profiles_lists_names_and_descriptions(cli: Cli) -> None:
    lines = cli("profiles").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "spanish-base",
        "spanish-base-128",
        "spanish-demo",
        "spanish-small",
        "spanish-small-32k",
        "spanish-tiny",
    ]


def test_missing_gpu_is_reported_before_any_work(cli: Cli, tmp_path: Path) -> None:
    done = cli(
        "run", "--set", "train.device=gpu", "--until", "train", env={"CUDA_VISIBLE_DEVICES": "-1"}
    )
    assert done.returncode == 3
    error = done.stderr.splitlines()[-1]
    assert "PyTorch sees none" in error and "train.device=cpu" in error
    assert not (tmp_path / "runs" / "spanish-tiny" / "corpus").exists()


@pytest.mark.slow
def test_run_with_faults_gives_the_undisturbed_result(tmp_path: Path) -> None:
    """A short `campaign.py`."""
    text = "\n".join(f"{line} {number}" for number in range(3000) for line in SPANISH).encode()
    kinds = ("kill all processes", "damage a file", "SIGTERM")
    runs = campaign.campaign(tmp_path, text, "native", 3, seed=1, kinds=kinds, seconds=1.0)
    assert sum(outcomes.recovered for outcomes in runs.kinds.values()) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--set", "\x1b]0;title\x07=1"),
        ("run", "--until", "\x1b[2J"),
        ("run", "--profile", "\x1b[2J.toml"),
        ("\x1b[2J",),
        ("run", "--set", 'corpus.source="https://me:hunter2@host/x"'),
        ("run", "--set", 'tokenizer.source="https://me:hunter2@host/x"'),
    ],
)
def test_message_has_no_secret_and_no_control_character(
    cli: Cli, arguments: tuple[str, ...]
) -> None:
    done = cli(*arguments)
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1], done.stderr
    assert "hunter2" not in done.stderr and not re.search(r"[\x00-\x09\x1b]", done.stderr)


def test_json_on_stdout_controls_no_terminal(cli: Cli) -> None:
    done = cli("show", "--set", 'description="\x9b31m"', env={"PYTHONIOENCODING": "utf-8"})
    assert "\x9b" not in done.stdout and json.loads(done.stdout)["description"] == "\x9b31m"


def test_paths_that_lead_in_a_circle_are_one_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for arguments in (("report", "loop"), ("show", "loop"), ("run", "--run-dir", "loop")):
        done = cli(*arguments)
        assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("number", ["0", "x", "-1", "1" * 5000])
def test_number_that_is_not_positive_is_one_error(cli: Cli, number: str) -> None:
    done = cli("convert", "x", "--out", "y", f"--heads={number}")
    assert done.returncode == 2 and "is not a positive number" in done.stderr


@pytest.mark.parametrize("option", [("--host", "999.9.9.9"), ("--port", "-5"), ("--port", "65536")])
def test_host_or_port_that_does_not_exist_is_one_error(
    cli: Cli, tmp_path: Path, option: tuple[str, str]
) -> None:
    (tmp_path / "run" / "models").mkdir(parents=True)
    done = cli("tensorboard", "run", *option)
    assert done.returncode == 2 and f"error: {' '.join(option)}" in done.stderr
    assert done.stderr.count("\n") == 1
