"""The model card: the README.md of an exported model, with the metadata that a hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import jinja2

from electra_wrap import __version__
from electra_wrap.data import corpus, sources
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES
from electra_wrap.metrics import UPSTREAM
from electra_wrap.monitor import evaluation
from electra_wrap.profile import NETWORKS, Network, toml
from electra_wrap.run import Run

#: A hub's task for each network (a discriminator has none before it is fine-tuned), and the type
#: and name of the task by which it is evaluated.
PIPELINES: dict[Network, str | None] = {"discriminator": None, "generator": "fill-mask"}
TASKS = {
    "discriminator": ("token-classification", "replaced token detection"),
    "generator": ("fill-mask", "masked language modelling"),
}


#: A hub's types of metrics, where our name is another one.
METRIC_TYPES = {"auc": "roc_auc", "sampled_accuracy": "accuracy"}

#: A data set on a hub, and a source on this machine that is written as a URL.
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+|[\w.-]+)([@:]|$)")
_LOCAL_URL = re.compile(r"(file|local)://|hf://datasets//")


def model_card(run: Run, network: Network, checkpoint: Checkpoint) -> str:
    """Return the README.md of a network that was exported from a checkpoint."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    public = _public_profile(run)
    evaluated_by, evaluated = evaluation.find(run, checkpoint)
    metrics = {name: evaluated.get(name, math.nan) for name in UPSTREAM.values()}
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    text = environment.get_template("model_card.md").render(
        metadata=_metadata(run, network, metrics),
        run=run,
        profile=run.profile,
        network=network,
        checkpoint=checkpoint,
        engines=ENGINES,
        trained_by=_trained_by(run, checkpoint),
        parameters=run.profile.parameters(network, run.vocab_size),
        sources=public["corpus"]["source"],
        tokenizer_source=public["tokenizer"]["source"],
        count_meanings=corpus.COUNTS,
        shapes={each: run.profile.model.shape(each) for each in NETWORKS},
        metrics=metrics,
        evaluated_by=evaluated_by,
        examples=evaluated.get("examples"),
        toml=toml(public),
        versions=_versions(run),
    )
    return text.encode("utf-8", "replace").decode()  # file names need not be valid Unicode


def _trained_by(run: Run, checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Return which engine trained which steps: its name, the first step and the last."""
    unknown = {"engine": checkpoint.engine, "from_step": 0, "to_step": checkpoint.step}
    return [
        (segment["engine"], segment["from_step"] + 1, min(segment["to_step"], checkpoint.step))
        for segment in run.model.get("trained_by", [unknown])
        if segment["from_step"] < checkpoint.step
    ]


def _metadata(run: Run, network: Network, metrics: dict[str, float]) -> str:
    """Return the YAML that a hub reads."""
    from huggingface_hub import EvalResult, ModelCardData  # takes a third of a second

    task_type, task_name = TASKS[network]
    results = []
    for name, value in metrics.items():
        family, kind = name.split("/")
        if network in (family, kind):
            result = EvalResult(
                task_type=task_type,
                task_name=task_name,
                dataset_type="held-out",
                dataset_name="held-out text of the corpus",
                metric_type="loss" if family == "loss" else METRIC_TYPES.get(kind, kind),
                metric_name=name,
                metric_value=round(value, 6),
            )
            results.append(result)
    datasets = [found[1] for name in run.profile.corpus.sources if (found := _DATASET.match(name))]
    data = ModelCardData(
        language=run.profile.language.partition("-")[0],  # a hub knows no regions
        library_name="transformers",
        pipeline_tag=PIPELINES[network],
        tags=["electra", network, "pretraining"],
        datasets=datasets or None,
        model_name=f"{run.profile.model_name}-{network}" if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _versions(run: Run) -> dict[str, str]:
    """Return the versions of the packages in use, and upstream's pin and patches."""
    versions: dict[str, str] = {}
    for stage in ("corpus", "vocab", run.examples_record, run.train_record, "convert"):
        versions |= run.record(stage).get("versions", {})
    return {"electra_wrap": __version__, **dict(sorted(versions.items()))}


def _public(source: str) -> str:
    """Return a source without the paths of this machine."""
    is_public = sources.is_remote(source) and not _LOCAL_URL.search(source)
    return source if is_public else Path(source).name


def _public_profile(run: Run) -> dict[str, Any]:
    """Return the values of the profile without the paths of this machine."""
    values = run.profile.model_dump()
    values["corpus"]["source"] = [_public(source) for source in run.profile.corpus.sources]
    values["tokenizer"]["source"] = _public(values["tokenizer"]["source"])
    return values
