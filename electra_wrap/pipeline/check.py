"""Stage `check`: both exported models load in transformers and give finite values."""

from __future__ import annotations

from electra_wrap import packages, subprocesses
from electra_wrap.pipeline.stage import Stage, Values
from electra_wrap.progress import log
from electra_wrap.run import Run

#: A plain sentence, and one with words that do not fit.
TEXTS = ("Los pájaros están hablando", "Los pájaros están cantando en la piedra del mañana")


def _execute(run: Run) -> Values:
    results: Values = subprocesses.call(
        "electra_wrap.inference",
        "check",
        {"directory": str(run.exported), "texts": TEXTS},
        log=run.log_file("check"),
        env=subprocesses.OFFLINE,
    )
    log("check: discriminator and generator load in transformers")
    return results


STAGE = Stage(
    name="check",
    inputs=lambda run, digest: {"hf": digest(run.exported)},
    execute=_execute,
    versions=lambda run: packages.versions("transformers", "torch"),
    depends_on=("convert",),
)
