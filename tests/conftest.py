"""Fixtures. Neither fixtures nor tests import tensorflow or torch, which abort in one process."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from electra_wrap import paths, profiles, subprocesses
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.pipeline import execute
from electra_wrap.profile import Profile, toml
from electra_wrap.run import Run
from electra_wrap.upstream import checkout

TESTS = Path(__file__).parent

#: A shell starts background jobs with SIGINT ignored, which the commands of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

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

    Tests that use it skip where git cannot fetch it. They fail if it was changed, and under
    `tox -e upstream`.
    """
    try:
        return checkout.ensure()
    except EnvironmentProblem as error:
        if os.environ.get("ELECTRA_WRAP_REQUIRE_UPSTREAM") or checkout.directory().exists():
            pytest.fail(str(error))
        pytest.skip(str(error))


#: Profiles that ship, without the one that continues a run of another.
PROFILES = [name for name, _ in profiles.shipped() if name != "spanish-base"]


def python(
    *arguments: str | Path, env: Mapping[str, str] = {}, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python where electra_wrap can be imported. `env` is added to the environment."""
    argv = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(paths.PACKAGE.parent), **env}
    return subprocess.run(
        argv, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, check=False
    )


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m electra_wrap` as a user does, in an empty directory."""
    return functools.partial(python, "-m", "electra_wrap", cwd=tmp_path)


def child(script: str, *arguments: str | Path, stdin: str = "", **variables: str) -> str:
    """Run a script of tests/children, which may import tensorflow or torch; return its stdout."""
    env = subprocesses.child_environment(variables)
    done = python(TESTS / "children" / script, *arguments, env=env, stdin=stdin)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tiny(corpus: Path, *overrides: str, steps: int = 4) -> Profile:
    """Return `spanish-tiny` on `corpus`, with a smaller model."""
    settings = """model.hidden_size=64 model.max_seq_length=32 corpus.held_out=0.2 engine=upstream
        train.warmup_steps=1 train.log_every=1 train.batch_size=4 train.device=cpu"""
    values = [f"corpus.source={json.dumps(str(corpus))}", f"train.steps={steps}", *settings.split()]
    if not any(override.startswith("tokenizer.source") for override in overrides):
        values.append("tokenizer.vocab_size=300")
    return profiles.load("spanish-tiny", [*values, *overrides])


@pytest.fixture(scope="session")
def corpus_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 different documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with path.open("w", encoding="utf-8") as file:
        for i in range(60):
            file.writelines(f"{s[i % 7 :]} {s[: i % 11]} {i * j}\n" for j, s in enumerate(SPANISH))
            file.write("\n")
    return path


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A complete run of the native engine, evaluated three times. Tests change copies only."""
    keys = ("engine=native", "model_name=m", "train.evaluate_every=2", "train.keep=2")
    keys += ('description="Un modelo: «pequeño»"', "language=es-MX")
    run = Run(tiny(corpus_text, *keys, steps=6), tmp_path_factory.mktemp("learned") / "run")
    execute(run)
    return run


#: The arguments of the scripts: --some-name=value becomes a.some_name.
FAKE_MODEL = """
import sys, types
options = [option.partition("=") for option in sys.argv[1:]]
a = types.SimpleNamespace(**{name[2:].replace("-", "_"): value for name, _, value in options})
"""

FAKE_BUILD = """
import struct
from pathlib import Path
from electra_wrap.upstream import records
from model import a

def write_examples(job, a):
    text = sorted(Path(a.corpus_dir).iterdir())[job].read_text("utf-8")
    if "CRASH" in text: raise SystemExit("job %d failed" % job)
    records.tf.io.gfile.makedirs(a.output_dir)
    name = "pretrain_data.tfrecord-%d-of-%s" % (job, a.num_out_files)
    with Path(a.output_dir, name).open("wb") as f:
        for line in text.splitlines():
            record = "/".join((a.seed, a.max_seq_length, line)).encode()
            f.write(struct.pack("<Q", len(record)) + b"crc_" + record + b"crc_")

records.build(write_examples, a)
"""

FAKE_TRAIN = """
import json, os, re, sys, time
from pathlib import Path
from electra_wrap import checkpoints
from electra_wrap.events import Evaluation, Setup, Step, emit
from model import a
h = json.load(open(a.hparams))
d = Path(a.data_dir, "models", a.model_name).absolute()
d.mkdir(exist_ok=True)
state = d / "checkpoint"
start = int(re.search(r"ckpt-(\\d+)", state.read_text())[1]) if state.exists() else 0
print(os.environ["ELECTRA_WRAP_RUNTIME"], os.environ.get("CUDA_VISIBLE_DEVICES"))
if h["learning_rate"] == 0.666: sys.exit("loss was NaN")
runtime = json.loads(os.environ["ELECTRA_WRAP_RUNTIME"])
if h["do_eval"]:
    step = int(open(runtime["checkpoint"] + ".index").read())
    scalars = {"discriminator/auc": 0.5, "loss/total": 100 + step}
    emit(Evaluation(step, h["num_eval_steps"] * h["eval_batch_size"], scalars))
    sys.exit()
emit(Setup({"device": "1 × CPU", "threads": os.environ.get("THREADS", "2")}))
for step in range(start + 1, runtime["stop"] + 1):
    emit(Step(step, time.monotonic(), {"loss/total": 50 / step}))
files = [d / ("model.ckpt-%d%s" % (step, s)) for s in (".index", ".data-00000-of-00001")]
for file in files: file.write_text(str(step))
checkpoints.finish(d, step, files)
state.write_text('model_checkpoint_path: "model.ckpt-%d"\\n' % step)
"""

FAKE_PATCH = """--- a/run_pretraining.py
+++ b/run_pretraining.py
@@ -0,0 +1 @@
+# patched
"""


def git(path: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=path, text=True).strip()


def pin_fake(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make and pin a git repository, whose scripts need no TensorFlow, and a patch for it."""
    repository, patches, vendor = (directory / name for name in ("upstream", "patches", "vendor"))
    for path in (repository / "model", patches, vendor):
        path.mkdir(parents=True)
    scripts = {"build_pretraining_dataset.py": FAKE_BUILD, "run_pretraining.py": FAKE_TRAIN}
    for name, content in (scripts | {"model/__init__.py": FAKE_MODEL, "run.sh": ""}).items():
        (repository / name).write_text(content, encoding="utf-8")
    (repository / "run.sh").chmod(0o755)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    git(repository, "init", "--quiet", "--initial-branch=master")
    git(repository, "add", "--all")
    git(repository, *identity, "commit", "--quiet", "-m", "scripts")
    (patches / "0001-test.patch").write_text(FAKE_PATCH, encoding="utf-8")
    git(repository, "apply", "--cached", "--unidiff-zero", str(patches / "0001-test.patch"))
    lock = {"url": str(repository), "commit": git(repository, "rev-parse", "HEAD")}
    lock["patched_tree"] = git(repository, "write-tree")
    git(repository, "reset", "--quiet")
    (vendor / "electra.lock").write_text(toml(lock), encoding="utf-8")
    monkeypatch.setattr(paths, "LOCK_FILE", vendor / "electra.lock")
    monkeypatch.setattr(paths, "PATCHES", patches)
    monkeypatch.setattr(paths, "vendor_directory", lambda: vendor)
    return repository


@pytest.fixture
def fake_upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of `pin_fake`."""
    return pin_fake(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def once_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 40 documents, and a run with it that was evaluated at steps 2 and 4."""
    directory = tmp_path_factory.mktemp("once")
    documents = ("".join(f"{i}. {s}\n" for s in SPANISH) + "\n" for i in range(40))
    (directory / "text.txt").write_text("".join(documents), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        pin_fake(directory, patch)
        profile = tiny(directory / "text.txt", "train.evaluate_every=2")
        execute(Run(profile, directory / "run"), until="evaluate")
    return directory


@pytest.fixture
def text(once_trained: Path, tmp_path: Path) -> Path:
    """A copy of the text of `once_trained`."""
    return Path(shutil.copy2(once_trained / "text.txt", tmp_path))


@pytest.fixture
def make_run(tmp_path: Path, text: Path) -> Callable[..., Run]:
    """Return a function that makes runs of the tiny profile in one run directory."""

    def make(*overrides: str, **keys: Any) -> Run:
        return Run(tiny(keys.pop("corpus", text), *overrides, **keys), tmp_path / "run")

    return make


@pytest.fixture
def trained(once_trained: Path, make_run: Callable[..., Run], fake_upstream: Path) -> Run:
    """A copy of the run of `once_trained`."""
    shutil.copytree(once_trained / "run", make_run().directory, symlinks=True)
    return make_run()
