"""The upstream engine: what stages.py asks of an engine, done by google-research/electra's scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_wrap import process, vocab
from electra_wrap.profile import NETWORKS
from electra_wrap.progress import Meter
from electra_wrap.rundir import finish, write_json, write_text
from electra_wrap.upstream import checkout, scripts

if TYPE_CHECKING:
    from electra_wrap.stages import Run

#: The stage that makes training data, its outputs (training, held out), and the packages behind each stage.
DATA, OUTPUTS = "tfrecords", ("pretrain_tfrecords", "heldout_tfrecords")
PACKAGES = {DATA: ("tensorflow",), "train": ("tensorflow",), "convert": ("tensorflow", "safetensors")}

#: Text for each record file. Upstream's 1000 files are for a corpus of gigabytes; training mixes the files.
BYTES_PER_RECORD_FILE = 2**20

GPUS, NO_GPU = "electra_wrap.upstream.gpus", "TensorFlow sees none; install electra-wrap[gpu] and the NVIDIA driver"

#: What trained a model, in its model card.
CREDIT = "[google-research/electra](https://github.com/google-research/electra), driven by electra_wrap"

latest_step = scripts.latest_step


def versions() -> dict[str, str]:
    """What of the engine, other than packages, its results depend on."""
    pin = checkout.Pin.read()
    return {"upstream": pin.commit, "patched upstream": pin.patched_tree}


def precision(wanted: str, gpus: list[str]) -> str:
    """The precision of products: the profile's, where `auto` is what the scripts do."""
    return "float32" if wanted == "auto" else wanted


def prepare(run: Run) -> None:
    """Fetch, verify and patch upstream, before hours of other work. EnvironmentLacks if that cannot be."""
    checkout.ensure(run.upstream)


def record_files(text_bytes: int, shards: int) -> int:
    """Number of record files for so much text: about one for each MiB, a multiple of `shards`, at most 1000 or so."""
    wanted = min(1000, max(1, text_bytes // BYTES_PER_RECORD_FILE))
    return shards * max(1, round(wanted / shards))


def build(run: Run, text: Path, out: Path) -> int:
    """Build the records of the shards in `text` with one process for each; return the number of examples."""
    parts = list(text.iterdir())
    with Meter(f"tfrecords of {text.name}", len(parts), "shards") as meter:
        scripts.build_records(
            checkout.ensure(run.upstream),
            run.profile,
            text,
            run.vocabulary,
            out,
            files=record_files(sum(path.stat().st_size for path in parts), len(parts)),
            log=run.log(DATA),
            on_done=meter.update,
        )
    return sum(count(path) for path in out.iterdir())


def count(path: Path) -> int:
    """Number of records in a TFRecord file: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    number = 0
    with path.open("rb") as file:
        while header := file.read(12):
            file.seek(int.from_bytes(header[:8], "little") + 4, 1)
            number += 1
    return number


def train(run: Run, gpus: list[str], on_step: Callable[[int, float], None]) -> None:
    """Train until the profile's last step; `on_step` gets step and loss of each logged step."""
    hparams = run.directory / "hparams.json"
    write_json(hparams, run.hparams())
    source = checkout.ensure(run.upstream)
    log = run.log("train")
    scripts.train(source, run.profile, run.directory.path, hparams, gpu=bool(gpus), log=log, on_step=on_step)


def files(model_dir: Path, step: int) -> list[Path]:
    """The files of a checkpoint."""
    return [model_dir / f"model.ckpt-{step}.{part}" for part in ("index", "data-00000-of-00001")]


def export(run: Run, step: int, out: Path, *, slots: bool = False) -> dict[str, Any]:
    """Write `out`/discriminator and `out`/generator as transformers loads them; `slots`: with Adam's, for training."""
    size = len(vocab.read(run.vocabulary))
    job = {
        "task": "convert",
        "checkpoint": str(run.model_dir / f"model.ckpt-{step}"),
        "out": str(out),
        "slots": slots,
        "expected": {network: run.profile.hf_config(network, size) for network in NETWORKS},
    }
    return {"variables": process.call("electra_wrap.weights", job, log=run.log("convert"))["variables"]}


def adopt(run: Run, step: int, exported: Path) -> None:
    """Make a checkpoint of what another engine exported with slots, from which `train` goes on."""
    made = exported / "checkpoint"
    job = {"task": "convert_back", "step": step, "out": str(made), **{n: str(exported / n) for n in NETWORKS}}
    process.call("electra_wrap.weights", job, log=run.log("train"))
    for file in files(made, step):
        finish(file, run.model_dir / file.name)
    write_text(run.model_dir / "checkpoint", (made / "checkpoint").read_text(encoding="utf-8"))
