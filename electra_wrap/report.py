"""report.html: the settings, learning curves and results of a run, in one file."""

import datetime
import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from electra_wrap import __version__, checkpoints, monitor
from electra_wrap.errors import UsageError
from electra_wrap.files import write_text
from electra_wrap.metrics import UPSTREAM
from electra_wrap.profile import toml
from electra_wrap.progress import format_duration
from electra_wrap.run import Run
from electra_wrap.templates import render

#: Colors that color-blind people can tell apart (Okabe and Ito, 2008).
COLORS = {"training": "#0072B2", "held out": "#D55E00"}

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

#: Curves, [n, 2] of step and value, by source (training, held out) and tag.
Curves = dict[str, dict[str, np.ndarray]]


def write(run: Run) -> Path:
    """Write report.html in the run directory, and return its path.

    UsageError if that exists and is not a report.
    """
    out = run.directory / "report.html"
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(f"{out} is not a report; rename it")
    curves = _read_curves(run)
    evaluations, speeds = run.model.evaluations, curves["training"].get("speed/tokens_per_second")
    page = render(
        "report.html",
        run=run,
        toml=toml(run.profile.model_dump()),
        step=max(checkpoints.steps(run.model_dir), default=None),
        last=evaluations[max(evaluations)] if evaluations else {},
        hours=monitor.total_hours(run),
        tokens_per_second=None if speeds is None else float(np.median(speeds[:, 1])),
        sentences=_sentences(run),
        figures=_draw_figures(curves),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        format_duration=format_duration,
    )
    write_text(out, page)
    return out


def _sentences(run: Run) -> list[dict[str, Any]]:
    """Return held-out sentences with the models' output; empty if hf/ is another model's."""
    record = run.manifest.stages.get("convert")
    if record is None or record.inputs["model_name"] != run.profile.model_name:
        return []
    sentences: list[dict[str, Any]] = run.results("convert").get("sentences", [])
    return sentences


def _read_curves(run: Run) -> Curves:
    logged, evaluations = monitor.read_scalars(run.model_dir / "train"), run.model.evaluations
    curves = {"training": {tag: np.array(points) for tag, points in logged.items() if points}}
    if evaluations:
        curves["held out"] = {
            tag: np.array([(s, evaluations[s].get(tag, np.nan)) for s in sorted(evaluations)])
            for tag in UPSTREAM.values()
        }
    return curves


def _draw_figures(curves: Curves) -> list[tuple[str, str]]:
    """Return title and SVG of each figure for which there is data."""
    figures = []
    for title, unit, tag in FIGURES:
        style: Any = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": title}
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that this font lacks; the browser has them
            figure = Figure(figsize=(4.2, 2.6), layout="constrained")
            axes = figure.subplots()
            _plot(axes, curves, tag)
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


def _plot(axes: Axes, curves: Curves, tag: str) -> None:
    for source, by_tag in curves.items():
        if tag in by_tag:
            steps, values = _shorten(by_tag[tag]).T
            marker = "" if source == "training" else "o"
            color = COLORS[source]
            axes.plot(
                steps, values, marker=marker, color=color, label=source, lw=1.2, ms=4, mec="white"
            )


def _shorten(curve: np.ndarray) -> np.ndarray:
    """Reduce a curve, [n, 2], to at most POINTS means of neighboring points."""
    parts = np.array_split(curve, min(len(curve), POINTS))
    return np.array([part.mean(axis=0) for part in parts])
