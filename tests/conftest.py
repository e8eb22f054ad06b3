"""Fixtures. Neither fixtures nor tests import tensorflow or torch, which abort in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from electra_wrap import paths, profiles, subprocesses
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.profile import Profile
from electra_wrap.run import Run
from electra_wrap.upstream import checkout

TESTS = Path(__file__).parent

hypothesis.settings.register_profile("no-deadline", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("no-deadline")

SPANISH = [
    "Los pájaros están hablando.",
    "El niño comió una manzana y después durmió la siesta.",
    "¿Cuándo llegará la cigüeña a la torre de la iglesia?",
    "¡Qué día tan hermoso! — exclamó la señora Ibáñez.",
    "El pingüino cruzó el río con ímpetu y volvió al anochecer.",
    "Mañana iré a Córdoba, aunque llueva a cántaros.",
    "La acción transcurre en Bogotá, según el guión original.",
    "José y Andrés jugarán al fútbol en el jardín público.",
    "Averigüé que el tren de las 10:35 salió con retraso.",
    "Ningún árbol dio tanta sombra como aquel viejo nogal.",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests with upstream last."""
    items.sort(key=lambda item: item.get_closest_marker("upstream") is not None)


@pytest.fixture(scope="session")
def upstream() -> Path:
    """The verified, patched checkout of upstream.

    Tests that use it skip where git cannot reach upstream, and fail under `tox -e upstream`.
    """
    try:
        return checkout.ensure()
    except EnvironmentProblem as error:
        if os.environ.get("ELECTRA_WRAP_REQUIRE_UPSTREAM"):
            pytest.fail(str(error))
        pytest.skip(str(error))


#: Profiles that ship, without the one that continues a run of another.
PROFILES = [name for name, _ in profiles.shipped() if name != "spanish-base"]


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m electra_wrap` as a user does, in an empty directory."""

    def call(
        *arguments: str, env: dict[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "electra_wrap", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent), **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def child(script: str, *arguments: str | Path, stdin: str = "", **variables: str) -> str:
    """Run a script of tests/children, which may import tensorflow or torch; return its stdout."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "children" / script), *map(str, arguments)],
        env=subprocesses.child_environment(variables),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tiny(corpus: Path, *overrides: str, steps: int = 4) -> Profile:
    """Return `spanish-tiny` on `corpus`, with a smaller model."""
    return profiles.load(
        "spanish-tiny",
        [
            f"corpus.source={json.dumps(str(corpus))}",
            *(
                []
                if any(o.startswith("tokenizer.source") for o in overrides)
                else ["tokenizer.vocab_size=300"]
            ),
            "model.hidden_size=64",
            "model.max_seq_length=32",
            f"train.steps={steps}",
            "train.warmup_steps=1",
            "train.batch_size=4",
            "train.log_every=1",
            "train.device=cpu",
            'engine="upstream"',
            "corpus.held_out=0.2",
            *overrides,
        ],
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A corpus of 40 documents with ten lines each."""
    path = tmp_path / "text.txt"
    path.write_text(
        "".join("".join(f"{i}. {s}\n" for s in SPANISH) + "\n" for i in range(40)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def corpus_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 different documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    documents = (
        "".join(f"{s[i % 7 :]} {s[: i % 11]} {i * j}\n" for j, s in enumerate(SPANISH)) + "\n"
        for i in range(60)
    )
    path.write_text("".join(documents), encoding="utf-8")
    return path


FAKE_BUILD = """
import argparse, os, struct
from electra_wrap.upstream import records
p = argparse.ArgumentParser()
for name in ("corpus-dir", "vocab-file", "output-dir", "max-seq-length", "num-processes",
             "num-out-files", "seed", "blanks-separate-docs"):
    p.add_argument("--" + name, required=True)
for name in ("do-lower-case", "no-lower-case", "do-strip-accents", "no-strip-accents"):
    p.add_argument("--" + name, action="store_true")

def write_examples(job, a):
    name = sorted(os.listdir(a.corpus_dir))[job]
    with open(os.path.join(a.corpus_dir, name), encoding="utf-8") as f:
        text = f.read()
    print("job %d begins" % job, flush=True)
    if "CRASH" in text and not os.path.exists(os.path.join(os.path.dirname(a.corpus_dir), "fixed")):
        raise SystemExit("job %d failed" % job)
    os.makedirs(a.output_dir, exist_ok=True)
    out = os.path.join(a.output_dir, "pretrain_data.tfrecord-%d-of-%s" % (job, a.num_out_files))
    with open(out, "wb") as f:
        for line in text.splitlines():
            record = "/".join((a.seed, a.max_seq_length, line)).encode()
            f.write(struct.pack("<Q", len(record)) + b"crc_" + record + b"crc_")

records.build(write_examples, p.parse_args())
"""

FAKE_TRAIN = """
import argparse, json, os, re, time
from pathlib import Path
from electra_wrap import checkpoints
from electra_wrap.events import Evaluation, Setup, Step, emit
p = argparse.ArgumentParser()
for name in ("data-dir", "model-name", "hparams"):
    p.add_argument("--" + name, required=True)
a = p.parse_args()
h = json.load(open(a.hparams))
d = os.path.abspath(os.path.join(a.data_dir, "models", a.model_name))
os.makedirs(d, exist_ok=True)
state = os.path.join(d, "checkpoint")
start = int(re.search(r"ckpt-(\\d+)", open(state).read())[1]) if os.path.exists(state) else 0
print(os.environ["ELECTRA_WRAP_RUNTIME"], os.environ.get("CUDA_VISIBLE_DEVICES"))
emit(Setup({"device": "1 × CPU", "threads": os.environ.get("THREADS", "2")}))
if h["learning_rate"] == 0.666:
    print("loss was NaN"); raise SystemExit(1)
runtime = json.loads(os.environ["ELECTRA_WRAP_RUNTIME"])
if h["do_eval"]:
    step = int(open(runtime["checkpoint"] + ".index").read())
    scalars = {"discriminator/auc": 0.5, "loss/total": 100 + abs(step - 4)}  # step 4 is the best
    emit(Evaluation(step, h["num_eval_steps"] * h["eval_batch_size"], scalars))
    raise SystemExit
for step in range(start + 1, runtime["stop"] + 1):
    loss = 50 if h["learning_rate"] == 0.777 else 50 / step
    emit(Step(step, time.monotonic(), {"loss/total": loss}))
files = [Path(d, "model.ckpt-%d%s" % (step, s)) for s in (".index", ".data-00000-of-00001")]
for file in files:
    file.write_text(str(step))
checkpoints.finish(Path(d), step, files)
open(state, "w").write('model_checkpoint_path: "model.ckpt-%d"\\n' % step)
"""

FAKE_PATCH = """What: a test's patch.

diff --git a/run_pretraining.py b/run_pretraining.py
--- a/run_pretraining.py
+++ b/run_pretraining.py
@@ -0,0 +1 @@
+# patched
"""


@pytest.fixture
def git_repository(tmp_path: Path) -> Path:
    """A git repository with two scripts that have upstream's arguments and need no TensorFlow."""
    path = tmp_path / "upstream"
    path.mkdir()
    (path / "build_pretraining_dataset.py").write_text(
        textwrap.dedent(FAKE_BUILD), encoding="utf-8"
    )
    (path / "run_pretraining.py").write_text(textwrap.dedent(FAKE_TRAIN), encoding="utf-8")
    (path / "model").mkdir()
    (path / "model" / "__init__.py").write_text("", encoding="utf-8")
    (path / "run.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    (path / "run.sh").chmod(0o755)
    for command in (
        ["init", "--quiet", "--initial-branch=master"],
        ["add", "--all"],
        [
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@example.org",
            "commit",
            "--quiet",
            "-m",
            "scripts",
        ],
    ):
        subprocess.run(["git", *command], cwd=path, check=True)
    return path


def git(path: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=path, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def fake_upstream(git_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pin `git_repository` with one patch, and keep its checkout under tmp_path."""
    patches, vendor = tmp_path / "patches", tmp_path / "vendor"
    patches.mkdir()
    vendor.mkdir()
    (patches / "0001-test.patch").write_text(FAKE_PATCH, encoding="utf-8")
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "--quiet", str(git_repository), str(copy))
    (copy / "run_pretraining.py").write_text("# patched\n" + FAKE_TRAIN, encoding="utf-8")
    git(copy, "add", "--all")
    lock = vendor / "electra.lock"
    lock.write_text(
        f'url = "{git_repository}"\ncommit = "{git(git_repository, "rev-parse", "HEAD")}"\n'
        f'tree = "{git(git_repository, "rev-parse", "HEAD^{tree}")}"\n'
        f'patched_tree = "{git(copy, "write-tree")}"\nlicense = "none"\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(paths, "LOCK_FILE", lock)
    monkeypatch.setattr(paths, "PATCHES", patches)
    monkeypatch.setattr(paths, "vendor_directory", lambda: vendor)
    return git_repository


@pytest.fixture
def make_run(tmp_path: Path, text: Path) -> Callable[..., Run]:
    """Return a function that makes runs of the tiny profile in one run directory."""

    def make(*overrides: str, **keys: Any) -> Run:
        return Run(tiny(keys.pop("corpus", text), *overrides, **keys), tmp_path / "run")

    return make
