"""The command line: quick, light, one line for a failure."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import pytest
from conftest import SPANISH

from electra_wrap import cli as cli_module
from electra_wrap import doctor, paths, vocab
from electra_wrap.native import bench

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

#: Modules that belong in child processes, each with the only files of the package that may import it.
HEAVY = {
    "tensorflow": {
        *("weights.py", "upstream/estimator.py", "upstream/tf1.py", "upstream/gpus.py"),
        "native/records.py",
    },
    "torch": {"check.py", "native/devices.py", "native/exchange.py", "native/model.py", "native/train.py"},
    "transformers": {"check.py", "finetune.py", "native/model.py"},
    "accelerate": {"native/train.py"},
    "datasets": {"sources.py"},
}


def python(code: str, directory: Path) -> str:
    """Run code in a process that can import electra_wrap and nothing else of ours; return its stdout."""
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
def test_neither_tensorflow_nor_torch_is_imported(command: list[str], tmp_path: Path) -> None:
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


def test_no_module_can_bring_tensorflow_and_torch_into_one_process() -> None:
    """With PyTorch's CUDA wheels the two abort together; what is imported where must not be left to luck."""
    for path in paths.PACKAGE.rglob("*.py"):
        name = str(path.relative_to(paths.PACKAGE))
        for heavy, allowed in HEAVY.items():
            assert heavy not in imports(path) or name in allowed, f"{name} imports {heavy}"
    for path in Path(__file__).parent.rglob("*.py"):
        found = imports(path) & set(HEAVY)
        assert not found or path.parent.name == "children", f"{path.name} imports {found}"
        assert not ("tensorflow" in found and found - {"tensorflow"}), path.name


@pytest.mark.parametrize(
    "module",
    [
        *("electra_wrap.check", "electra_wrap.finetune", "electra_wrap.weights", "electra_wrap.upstream.tf1"),
        *("electra_wrap.native.train", "electra_wrap.native.records"),
    ],
)
def test_each_child_process_imports_one_of_the_two(module: str, tmp_path: Path) -> None:
    """What the modules load at run time: check and train load PyTorch's side, the others TensorFlow's."""
    touch = {
        "electra_wrap.check": "import torch, transformers; transformers.ElectraForPreTraining",
        "electra_wrap.finetune": "import transformers; transformers.Trainer",
        "electra_wrap.weights": "import tensorflow; tensorflow.train.load_checkpoint",
        "electra_wrap.upstream.tf1": "pass",
        "electra_wrap.native.train": "pass",
        "electra_wrap.native.records": "electra_wrap.native.records.convert('.', 0, 0, 'out')",
    }[module]
    code = f"import sys, {module}\n{touch}\nprint(*sorted({{'tensorflow', 'torch', 'triton'}} & set(sys.modules)))"
    loaded = set(python(code, tmp_path).split())
    assert loaded and not ("tensorflow" in loaded and loaded - {"tensorflow"})


@pytest.mark.parametrize(
    ("command", "code", "says"),
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
        (["finetune", "--model", "nowhere", "--task", "tagging", "--train", "x", "--test", "x"], 2, "has no discrim"),
        (["tensorboard"], 2, "has not trained yet"),
        (["bench", "--steps", "1"], 2, "too few to time"),
        (["bench", "--profile", "spanish-small"], 2, "--vocab-size N"),
        (["convert", "x", "--out", "y", "--strip-accents"], 2, "--lowercase"),
    ],
)
def test_a_failure_is_one_line_and_a_code(cli: Cli, command: list[str], code: int, says: str) -> None:
    done = cli(*command)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == code and error.startswith("electra_wrap: error: ") and says in error
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_terminal_that_knows_ascii_alone_is_no_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "spanish-tiny"\ndescription = "señal"\n', encoding="utf-8")
    done = cli("show", "--profile", "mine.toml", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["description"] == "señal" and done.returncode == 0
    done = cli("run", "--profile", "señal", env={"PYTHONIOENCODING": "ascii"})
    assert done.stderr.startswith("electra_wrap: error: no profile 'se\\xf1al'") and done.returncode == 2


def test_debug_shows_the_traceback(cli: Cli) -> None:
    assert "Traceback" in cli("--debug", "run", "--until", "nope").stderr


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(arguments: argparse.Namespace) -> None:
        raise KeyError("one\ntwo")

    with pytest.raises(SystemExit) as raised:
        cli_module.main(argparse.Namespace(function=broken, debug=False))
    assert raised.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_show_prints_json(cli: Cli) -> None:
    for what in ("profile", "hparams", "discriminator", "generator"):
        done = cli("show", "--what", what)
        assert isinstance(json.loads(done.stdout), dict) and done.stderr == ""
    assert json.loads(cli("show", "--set", "train.steps=77").stdout)["train"]["steps"] == 77


@pytest.mark.slow
def test_bench_measures(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("model.hidden_size=64", "model.num_hidden_layers=1", "train.batch_size=4", "train.device=cpu")
    overrides = [part for key in keys for part in ("--set", key)]
    done = cli("bench", "--engine", "native", "--steps", "24", "--vocab-size", "600", "--json", *overrides)
    (measured,) = json.loads(done.stdout)
    assert measured["engine"] == "native" and measured["precision"] == "float32" and measured["vocab_size"] == 600
    assert measured["sequences_per_second"] == pytest.approx(4 * measured["steps_per_second"])
    assert measured["tokens_per_second"] == pytest.approx(4 * 64 * measured["steps_per_second"])
    assert 0 < measured["share_of_peak"] < 1
    bench.show([measured])
    assert re.search(r"steps/s .*\n *native +cpu +float32", capsys.readouterr().out)


def test_profiles_lists_names_and_descriptions(cli: Cli) -> None:
    lines = cli("profiles").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "spanish-base",
        "spanish-demo",
        "spanish-small",
        "spanish-small-32k",
        "spanish-tiny",
    ]


def test_a_gpu_that_is_not_there_is_said_before_any_work(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--set", "train.device=gpu", "--until", "train", env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert done.returncode == 3
    error = done.stderr.splitlines()[-1]
    assert "PyTorch sees none" in error and "train.device=cpu" in error
    assert not (tmp_path / "runs" / "spanish-tiny" / "corpus").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A short `campaign.py`."""
    text = "\n".join(f"{line} {number}" for number in range(3000) for line in SPANISH).encode()
    kinds = ("kill all processes", "damage a file", "SIGTERM")
    found = campaign.campaign(tmp_path, text, "native", 3, seed=1, say=print, kinds=kinds, seconds=1.0)
    assert sum(one.alone for one in found.kinds.values()) == 3


def test_doctor_names_what_the_profile_needs_and_is_not_there(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "spanish-tiny"\n[train]\ndevice = "gpu"\n', encoding="utf-8")
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
    done = cli("doctor", "--profile", "mine.toml", "--set", "corpus.source=nowhere.txt", "--json", env=hidden)
    found = {one["what"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert all(found[what]["status"] == "missing" for what in ("corpus", "GPUs, native engine"))
    assert found["GPUs, upstream engine"]["status"] == "mend", "which this profile does not use"
    assert "PyTorch's CUDA wheels" in found["GPUs, native engine"]["mend"]
    assert all(found[what]["status"] == "ok" for what in ("Python", "processors", "disk"))
    assert "corpus, disk" not in done.stderr and "corpus" in done.stderr


def test_doctor_compares_the_packages_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=99", "nothing-at-all", "pydantic>=2", "datasets>=99 ; extra == 'datasets'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    (found,) = (one for one in doctor._packages() if one.what == "packages")
    assert found.status == "missing" and found.found.startswith("numpy ") and "nothing-at-all is missing" in found.found
    assert "pydantic" not in found.found and "datasets" not in found.found


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["MARK"]),)


@pytest.mark.parametrize("way", ["code", "pickle"])
def test_a_model_of_a_stranger_runs_nothing(
    cli: Cli, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"architectures": ["ElectraForPreTraining"], "model_type": "electra"}
    model, mark = tmp_path / "model", tmp_path / "mark"
    model.mkdir()
    vocab.write_tokenizer(model, [*vocab.SPECIAL_TOKENS, "x"], lowercase=False, strip_accents=False, max_length=9)
    monkeypatch.setenv("MARK", str(mark))
    if way == "code":
        (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
        (model / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = cli("detect", "--model", "model", "x")
    assert done.returncode == 2 and "cannot be loaded" in done.stderr and done.stderr.count("\n") == 1
    assert not mark.exists()
