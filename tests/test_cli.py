"""The command line: light imports, and one line for each failure."""

import argparse
import ast
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TESTS, python

from electra_wrap import cli as cli_module
from electra_wrap import paths

Cli = Callable[..., subprocess.CompletedProcess[str]]

#: Libraries that belong in child processes, each with the modules that may import it.
TRAINING = {f"native/{name}.py" for name in ("evaluate", "saving", "setup", "train")}
HEAVY = {
    "tensorflow": {"upstream/estimator.py", "upstream/tf1.py", "weights.py"},
    "torch": {*TRAINING, "inference.py", "native/encoder.py", "native/model.py"},
    "transformers": {"inference.py", "native/encoder.py", "native/model.py"},
    "accelerate": TRAINING,
}


def loaded(code: str, *arguments: str, cwd: Path | None = None) -> set[str]:
    """Return the modules that are loaded after code has run."""
    done = python("-c", f"{code}\nimport sys; print(*sys.modules)", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", [["--help"], ["profiles"], ["show"], ["run", "--dry-run"]])
def test_command_imports_neither_tensorflow_nor_torch(command: list[str], tmp_path: Path) -> None:
    code = "from electra_wrap import cli\ntry: cli.entry_point()\nexcept SystemExit: pass\n"
    assert not {*HEAVY, "triton", "keras"} & loaded(code, *command, cwd=tmp_path)


def test_help_imports_no_slow_library() -> None:
    slow = {"fsspec", "git", "huggingface_hub", "jinja2", "matplotlib", "numpy", "tokenizers"}
    assert not slow & loaded("from electra_wrap import cli")


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
    for path in TESTS.rglob("*.py"):
        found = imports(path) & set(HEAVY)
        assert not found or path.parent.name == "children", f"{path.name} imports {found}"
        assert not ("tensorflow" in found and found - {"tensorflow"}), path.name


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("inference", "import torch, transformers; transformers.ElectraForPreTraining"),
        ("weights", "import tensorflow; tensorflow.train.load_checkpoint"),
        ("upstream.tf1", ""),
        ("native.train", ""),
        ("native.examples", ""),
    ],
)
def test_child_process_loads_at_most_one_framework(module: str, use: str) -> None:
    found = {"tensorflow", "torch", "triton"} & loaded(f"import electra_wrap.{module}\n{use}")
    assert not ("tensorflow" in found and found - {"tensorflow"})


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
        (["run", "--run-dir", "loop"], 3, "loop"),
        (["run", "--set", "\x1b]0;title\x07=1"], 2, "is not KEY=VALUE"),
        (["run", "--profile", "\x1b[2J.toml"], 2, "no profile file"),
        (["\x1b[2J"], 2, "invalid choice"),
        (["show", "--what", "nope"], 2, "invalid choice"),
        (["show", "--profile", "spanish-demo", "--what", "hparams"], 3, "run --until vocab"),
        (["show", "nowhere"], 2, "is not a run directory"),
        (["show", "loop"], 3, "loop"),
        (["evaluate", "."], 2, "is not a run directory"),
        (["report", "nowhere\x1b[31m"], 2, "is not a run directory"),
        (["detect", "--model", "nowhere", "x"], 2, "has no discriminator"),
        (["convert", "x", "--out", "y", "--strip-accents"], 2, "--lowercase"),
        (["convert", "x", "--out", "y", "--heads=-1"], 2, "positive"),
        (["convert", "x", "--out", "loop", "--to-tf"], 2, "give one SOURCE, or with --to-tf two"),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    cli: Cli, tmp_path: Path, command: list[str], code: int, message: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = cli(*command)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == code and done.stdout == ""
    assert error.startswith("electra_wrap: error: ") and message in error
    assert "Traceback" not in done.stderr and not re.search(r"[\x00-\x09\x1b]", done.stderr)


def test_output_controls_no_terminal(cli: Cli, tmp_path: Path) -> None:
    utf8 = {"PYTHONIOENCODING": "utf-8"}
    shown = cli("show", "--set", 'description="\x9b31m\u202e"', env=utf8).stdout
    assert "\x9b" not in shown and "\u202e" not in shown
    assert json.loads(shown)["description"] == "\x9b31m\u202e"
    run = tmp_path / "run\x1b[31m"
    run.mkdir()
    (run / "profile.json").write_text(shown, encoding="utf-8")
    done = cli("report", run)
    assert (run / "report.html").is_file() and done.stdout.count("\n") == 1
    assert "\x1b" not in done.stdout + done.stderr


def test_output_to_an_ascii_terminal(cli: Cli, tmp_path: Path) -> None:
    text = 'extends = "spanish-tiny"\ndescription = "señal"\n'
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    done = cli("show", "--profile", "mine.toml", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["description"] == "señal" and done.returncode == 0
    done = cli("run", "--profile", "señal", env={"PYTHONIOENCODING": "ascii"})
    assert done.stderr.startswith("electra_wrap: error: no profile 'se\\xf1al'")
    assert done.returncode == 2


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
    assert re.fullmatch("electra_wrap: error: this is a bug of .*\n", capsys.readouterr().err)


def test_show_prints_json(cli: Cli) -> None:
    for what in ("profile", "hparams", "discriminator", "generator"):
        done = cli("show", "--what", what)
        assert isinstance(json.loads(done.stdout), dict) and done.stderr == ""
    assert json.loads(cli("show", "--set", "train.steps=77").stdout)["train"]["steps"] == 77


def test_profiles_lists_names_and_descriptions(cli: Cli) -> None:
    names = ("base", "base-128", "demo", "small", "small-32k", "tiny")
    lines = [line.split() for line in cli("profiles").stdout.splitlines()]
    assert [line[0] for line in lines] == [f"spanish-{name}" for name in names]
    assert all(len(line) > 3 for line in lines)


def test_missing_gpu_is_reported_before_any_work(cli: Cli, tmp_path: Path) -> None:
    arguments = ("run", "--set", "train.device=gpu", "--until", "train")
    done = cli(*arguments, env={"CUDA_VISIBLE_DEVICES": "-1"})
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 3 and "native engine sees none" in error and "=cpu" in error
    assert not (tmp_path / "runs" / "spanish-tiny" / "corpus").exists()
