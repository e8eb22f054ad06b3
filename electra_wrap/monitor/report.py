"""report.html: the settings, learning curves and results of one or more runs, in one file."""

from __future__ import annotations

import datetime
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from electra_wrap import __version__
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES, find_checkpoint
from electra_wrap.errors import UsageError, mask
from electra_wrap.files import write_text
from electra_wrap.metrics import UPSTREAM
from electra_wrap.monitor import evaluation, scalars, training
from electra_wrap.monitor.templates import render
from electra_wrap.profile import toml
from electra_wrap.progress import format_duration
from electra_wrap.run import Run

#: Colors that color-blind people can tell apart (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: The figures: title, unit and tag of the scalar.
FIGURES = (
    ("Total loss", "nats", "loss/total"),
    ("Generator loss", "nats per masked token", "loss/generator"),
    ("Generator accuracy on masked tokens", "share", "generator/accuracy"),
    ("Discriminator loss", "nats per token", "loss/discriminator"),
    ("Discriminator AUC", "0.5 is chance", "discriminator/auc"),
    ("Discriminator precision", "share", "discriminator/precision"),
    ("Discriminator recall", "share", "discriminator/recall"),
    ("Tokens replaced by the generator", "share", "discriminator/replaced"),
    ("Learning rate", "", "train/learning_rate"),
    ("Gradient norm", "before clipping at 1", "train/gradient_norm"),
    ("Speed", "tokens per second", "speed/tokens_per_second"),
)

#: Points in a curve. More cannot be seen, and a long training would make a page of megabytes.
POINTS = 100

#: Identifies a report, which may be overwritten.
GENERATOR = '<meta name="generator" content="electra_wrap'

#: Curves, [n, 2] of step and value, by source (training or an engine's evaluations) and tag.
Curves = dict[str, dict[str, np.ndarray]]


def write(directories: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, or a comparison of several, and return its path.

    The path is `out`, by default report.html in the run directory. UsageError if that exists and
    is not a report.
    """
    runs = [Run.open(directory) for directory in directories]
    if out is None and len(runs) > 1:
        raise UsageError("a comparison of runs needs a file of its own; name it with --out FILE")
    out = out or runs[0].directory / "report.html"
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(f"{out} is not a report; choose another --out")
    names = [run.directory.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    curves = [_read_curves(run) for run in runs]
    page = render(
        "report.html.j2",
        views=list(map(_describe, runs, names, curves)),
        figures=_draw_figures(curves, names),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        format_duration=format_duration,
    )
    write_text(out, page)
    return out


def _read_curves(run: Run) -> Curves:
    logged = scalars.read(run.model_dir / "train")
    curves = {"training": {tag: np.array(points) for tag, points in logged.items() if points}}
    for engine in ENGINES:
        if by_step := evaluation.evaluations(run, engine):
            curves[f"held out ({engine})"] = {
                tag: np.array([(step, by_step[step].get(tag, np.nan)) for step in by_step])
                for tag in UPSTREAM.values()
            }
    return curves


def _draw_figures(curves: Sequence[Curves], names: Sequence[str]) -> list[tuple[str, str]]:
    """Return title and SVG of each figure for which there is data."""
    figures = []
    for title, unit, tag in FIGURES:
        style: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": title}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that this font lacks; the browser has them
            figure = Figure(figsize=(4.2, 2.6), layout="constrained")
            axes = figure.subplots()
            _plot(axes, curves, names, tag)
            if not axes.lines:
                continue
            axes.set_ylabel(unit)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, lw=0.5)
            if len(axes.lines) > 1:
                axes.legend(frameon=False, fontsize=8)
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
        figures.append((title, svg.getvalue()[svg.getvalue().index("<svg") :]))
    return figures


def _plot(axes: Axes, curves: Sequence[Curves], names: Sequence[str], tag: str) -> None:
    """Plot a tag: of one run with a color for each source, of several with one for each run."""
    for run_index, by_source in enumerate(curves):
        for source_index, (source, by_tag) in enumerate(by_source.items()):
            if tag not in by_tag:
                continue
            label, color, marker = source, source_index, "o" if source_index else ""
            if len(curves) > 1:
                # Matplotlib hides labels that begin with "_", and "$" begins a formula.
                name = "\u200b" + names[run_index].replace("$", r"\$")
                label, color = "_" if source_index else name, run_index
            steps, values = shorten(by_tag[tag]).T
            (line,) = axes.plot(steps, values, marker=marker, lw=1.2, ms=4, mec="white")
            line.set(color=COLORS[color % len(COLORS)], label=label)


def shorten(curve: np.ndarray) -> np.ndarray:
    """Reduce a curve, [n, 2], to at most POINTS means of neighboring points."""
    parts = np.array_split(curve, min(len(curve), POINTS))
    return np.array([part.mean(axis=0) for part in parts])


def _describe(run: Run, name: str, curves: Curves) -> dict[str, Any]:
    """Return what the template needs of a run."""
    checkpoint, speeds = find_checkpoint(run), curves["training"].get("speed/tokens_per_second")
    best = {engine: evaluation.best(run, engine) for engine in ENGINES}
    return {
        "name": name,
        "run": run,
        "toml": mask(toml(run.profile.model_dump())),
        "step": checkpoint.step if checkpoint else None,
        "evaluations": {engine: evaluation.evaluations(run, engine) for engine in ENGINES},
        "best": {engine: found.step if found else None for engine, found in best.items()},
        "evaluated_by": evaluation.ranking_engine(run),
        "last": next(reversed(evaluation.evaluations(run).values()), {}),
        "hours": training.total_hours(run),
        "tokens_per_second": None if speeds is None else float(np.median(speeds[:, 1])),
        "sentences": _sentences(run, checkpoint),
    }


def _sentences(run: Run, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
    """Return held-out sentences with the output of both networks, as the stage `check` got it.

    Empty if the exported models are not those of the latest checkpoint.
    """
    exported, checked = run.results("convert"), run.record("check")
    latest = (checkpoint.step if checkpoint else None, run.profile.model_name)
    if (exported.get("step"), exported.get("model_name")) != latest:
        return []
    if checked.get("outcome") != "done" or checked["inputs"] != {"hf": run.digest(run.exported)}:
        return []
    return list(checked["results"].get("sentences", []))
