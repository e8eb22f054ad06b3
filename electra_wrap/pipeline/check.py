"""Stage `check`: both exported models load in transformers and give finite values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from electra_wrap import packages, subprocesses
from electra_wrap.pipeline.stage import Stage, Values
from electra_wrap.progress import log
from electra_wrap.run import Run

#: A plain sentence, and one with words that do not fit.
TEXTS = ("Los pájaros están hablando", "Los pájaros están cantando en la piedra del mañana")


#: Held-out lines that the report shows with the models' output: their number, and their length.
SENTENCES, SENTENCE_LENGTHS = 2, range(50, 110)


def _execute(run: Run) -> Values:
    lines = (line for line in _held_out_lines(run) if len(line) in SENTENCE_LENGTHS)
    results: Values = subprocesses.call(
        "electra_wrap.inference",
        "check",
        {
            "directory": str(run.exported),
            "texts": TEXTS,
            "sentences": list(itertools.islice(lines, SENTENCES)),
            "seed": run.profile.train.seed,
        },
        log=run.log_file("check"),
        env=subprocesses.OFFLINE,
    )
    log("check: discriminator and generator load in transformers")
    return results


def _held_out_lines(run: Run) -> Iterator[str]:
    for path in sorted(run.held_out.glob("*")):
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from map(str.strip, file)


STAGE = Stage(
    name="check",
    inputs=lambda run, digest: {"hf": digest(run.exported)},
    execute=_execute,
    versions=lambda run: packages.versions("transformers", "torch"),
    depends_on=("convert",),
)
