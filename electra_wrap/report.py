"""report.html: what a run was, how it learned and what came of it, in one file that needs nothing else."""

from __future__ import annotations

import datetime
import io
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from electra_wrap import __version__, check, paths, process, scalars, stages, training
from electra_wrap.errors import ElectraWrapError, UsageError
from electra_wrap.profile import NETWORKS, toml
from electra_wrap.progress import duration, say
from electra_wrap.rundir import write_text
from electra_wrap.stages import Run
from electra_wrap.upstream import checkout

#: Colours that everybody can tell apart (Okabe and Ito, 2008), and lines that do without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")

STYLE: Any = {"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}

#: The figures: title, unit, and the scalars in each.
FIGURES = (
    ("Total loss", "nats", ("loss/total",)),
    ("Generator: loss", "nats for a masked token", ("loss/generator",)),
    ("Generator: masked tokens guessed right", "share", ("generator/accuracy",)),
    ("Discriminator: loss", "nats for a token", ("loss/discriminator",)),
    ("Discriminator: AUC", "0.5 is guessing", ("discriminator/auc",)),
    ("Discriminator: precision and recall", "share", ("discriminator/precision", "discriminator/recall")),
    ("Tokens that the generator replaced", "share", ("discriminator/replaced",)),
    ("Learning rate", "", ("train/learning_rate",)),
    ("Gradient norm", "before clipping at 1", ("train/gradient_norm",)),
    ("Speed", "tokens a second", ("speed/tokens_per_second",)),
)

#: Points of a curve: more cannot be seen, and a million steps would make a page of megabytes.
POINTS = 100

#: Held-out lines that are shown as the models see them: how many, and of how many characters.
SENTENCES, LENGTHS = 2, range(50, 110)

#: By this a file of ours is known, which may be written anew.
GENERATOR = '<meta name="generator" content="electra_wrap'


def write(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or of several that are compared, and return where it is.

    That is `out`, or report.html in the run's directory. UsageError if there is a file that is no report.
    """
    runs = [stages.open_run(directory) for directory in directories]
    if out is None and len(runs) > 1:
        raise UsageError("several runs are compared in a file of its own; name it: --out FILE")
    out = out or runs[0].directory / "report.html"
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(f"{out} is no report of ours; choose another --out")
    names = [run.directory.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory.path) for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(paths.PACKAGE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        runs=[_facts(run, name) for run, name in zip(runs, names, strict=True)],
        figures=figures([_curves(run) for run in runs], names),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        lines=list(zip(itertools.cycle(COLOURS), names, strict=False)),
    )
    write_text(out, page.encode("utf-8", "replace").decode())  # the names of files need not be Unicode
    return out


def _curves(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """The scalars of training and of evaluation by tag: [n, 2], step and value."""
    read = {kind: scalars.read(run.model_dir / kind) for kind in ("train", "eval")}
    return {
        kind: {tag: np.array(sorted((step, value) for step, _, value in curve)) for tag, curve in found.items()}
        for kind, found in read.items()
    }


def thinned(curve: np.ndarray, points: int = POINTS) -> np.ndarray:
    """Return at most so many points of a curve, [n, 2] to [m, 2]: means of as many of its points, one after another."""
    if len(curve) <= points:
        return curve
    return np.array([part.mean(0) for part in np.array_split(curve, points)])


def figures(curves: Sequence[dict[str, dict[str, np.ndarray]]], names: Sequence[str]) -> list[tuple[str, str]]:
    """Draw each figure of which there is something; return title and SVG."""
    drawn = []
    for title, unit, tags in FIGURES:
        if not any(tag in found for one in curves for found in one.values() for tag in tags):
            continue
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that its own font lacks; the browser's has them
            figure = Figure(figsize=(4.2, 2.6), layout="constrained")
            axes = figure.subplots()
            for (i, one), (line, tag) in itertools.product(enumerate(curves), zip(LINES, tags, strict=False)):
                what = [tag.split("/")[1]] if len(tags) > 1 else []
                # One run: a colour for what it was trained on, and one for what it was not. Several: one for each.
                first, second = COLOURS[:2] if len(curves) == 1 else [COLOURS[i % len(COLOURS)]] * 2
                # What begins with "_" is no label, and "$" begins a formula.
                shown = "\u200b" + names[i].replace("$", r"\$")
                name = " ".join([shown, *what] if len(curves) > 1 else [*what, "training"])
                if (curve := one["train"].get(tag)) is not None:
                    axes.plot(*thinned(curve).T, line, color=first, lw=1.2, label=name)
                if (curve := one["eval"].get(tag)) is not None:
                    name = " ".join([*what, "held out"]) if len(curves) == 1 else "_"
                    axes.plot(*curve.T, line, color=second, lw=1.2, label=name, marker="o", ms=4, mec="white", mew=0.5)
            axes.set_ylabel(unit)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(alpha=0.25, lw=0.5)
            if len(axes.lines) > 1:
                axes.legend(frameon=False, fontsize=8)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        drawn.append((title, text.getvalue()[text.getvalue().index("<svg") :]))
    return drawn


def _facts(run: Run, name: str) -> dict[str, Any]:
    """What the page says of a run."""
    done = run.directory.manifest["stages"]
    evaluations = {int(step): values for step, values in training.evaluations(run).items()}
    spent = scalars.read(run.model_dir / "train", void=True)
    cost = {tag: max((v for _, _, v in spent.get(tag, ())), default=None) for tag in training.COSTS}
    size = run.recorded("vocab").get("facts", {}).get("vocab_size")
    speeds = [v for _, _, v in spent.get("speed/tokens_per_second", ())]
    return {
        "name": name,
        "profile": run.profile,
        "step": run.step,
        "flat": {key: value for key, value in run.profile.flat().items() if value is not None},
        "toml": toml(run.profile.model_dump()),
        "shapes": {network: run.profile.model.shape(network) for network in NETWORKS},
        "parameters": {network: size and run.profile.parameters(network, size) for network in NETWORKS},
        "best": training.best(run),
        "evaluations": dict(sorted(evaluations.items())),
        "last": evaluations[max(evaluations)] if evaluations else {},
        "hours": cost["cost/hours"],
        "kilowatt_hours": cost["cost/kilowatt_hours"],
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "corpus": run.recorded("corpus").get("facts", {}),
        "vocabulary": run.recorded("vocab").get("facts", {}),
        "data": run.recorded(run.engine.DATA).get("facts", {}),
        "stages": [
            {"name": key, **entry, "took": duration(entry["seconds"]) if "seconds" in entry else ""}
            for key, entry in done.items()
        ],
        "pin": checkout.Pin.read() if run.profile.engine == "upstream" else None,
        "patches": [path.stem for path in sorted(paths.PATCHES.glob("*.patch"))],
        "sentences": _sentences(run),
    }


def _sentences(run: Run) -> list[dict[str, Any]]:
    """Held-out sentences: what the generator made of them and what the discriminator found.

    None if the models that are there are not those of the latest checkpoint.
    """
    (convert,) = (stage for stage in stages.stages(run) if stage.name == "convert")
    if stages.reason(run, convert):
        return []
    texts: list[str] = []
    for path in sorted((run.directory / "heldout").glob("*")):
        with path.open(encoding="utf-8", errors="replace") as file:
            texts += itertools.islice((line.strip() for line in file if len(line) in LENGTHS), SENTENCES - len(texts))
    if not texts:
        return []
    job = {"task": "replace", "model_dir": str(run.directory / "hf"), "texts": texts, "seed": run.profile.train.seed}
    try:
        return cast(list[dict[str, Any]], process.call("electra_wrap.check", job, env=check.ENVIRONMENT))
    except ElectraWrapError as error:
        say(f"report: without sentences: {error}")
        return []
