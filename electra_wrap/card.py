"""The model card: the README.md of an exported model, with the metadata that a hub reads."""

import math
import re
from pathlib import Path
from typing import Any

from electra_wrap import __version__, hub
from electra_wrap.architecture import NETWORKS, Network
from electra_wrap.data import corpus, sources
from electra_wrap.metrics import UPSTREAM
from electra_wrap.profile import toml
from electra_wrap.run import Run
from electra_wrap.templates import render

#: Type and name of the task by which a network is evaluated.
_TASKS = {
    "discriminator": ("token-classification", "replaced token detection"),
    "generator": ("fill-mask", "masked language modelling"),
}

#: A hub's types of metrics, where our name is another one.
_METRIC_TYPES = {"auc": "roc_auc", "sampled_accuracy": "accuracy"}

#: A data set on a hub, and a source on this machine that is written as a URL.
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_LOCAL_URL = re.compile(r"(file|local)://")


def model_card(run: Run, network: Network, step: int) -> str:
    """Return the README.md of a network that was exported from the checkpoint of `step`."""
    public, evaluated = _public_profile(run), run.model.evaluations.get(step, {})
    metrics = {
        name: evaluated[name]
        for name in UPSTREAM.values()
        # With padding, the AUC is high for any model: it serves to compare with upstream alone.
        if math.isfinite(evaluated.get(name, math.nan)) and name != "discriminator/auc_with_padding"
    }
    return render(
        "model_card.md",
        metadata=_metadata(run, network, metrics),
        run=run,
        network=network,
        step=step,
        initial_model=_name(_source(run, network)),
        public=public,
        count_meanings=corpus.COUNTS,
        metrics=metrics,
        evaluated=evaluated,
        toml=toml(public),
        version=__version__,
    )


def _source(run: Run, network: Network) -> str:
    """Return where the weights come from that the training started with; "" if random ones."""
    source = run.profile.model.init_from or ""
    return source if isinstance(source, str) else str(getattr(source, network))


def _name(source: str) -> str:
    """Return the name of a model on a hub, or of a directory."""
    if source.startswith(hub.SCHEME):
        return source.removeprefix(hub.SCHEME).partition("@")[0]
    return Path(source).name


def _metadata(run: Run, network: Network, metrics: dict[str, float]) -> str:
    """Return the YAML that a hub reads."""
    from huggingface_hub import EvalResult, ModelCardData  # takes a third of a second

    task_type, task_name = _TASKS[network]
    results = []
    for name, value in metrics.items():
        family, kind = name.split("/")
        if network in (family, kind):
            result = EvalResult(
                task_type=task_type,
                task_name=task_name,
                dataset_type="held-out",
                dataset_name="held-out text of the corpus",
                metric_type="loss" if family == "loss" else _METRIC_TYPES.get(kind, kind),
                metric_name=name,
                metric_value=round(value, 6),
            )
            results.append(result)
    source = _source(run, network)
    datasets = [found[1] for name in run.profile.corpus.sources if (found := _DATASET.match(name))]
    data = ModelCardData(
        language=run.profile.language.partition("-")[0],  # a hub knows no regions
        library_name="transformers",
        # A discriminator has no task on a hub before it is fine-tuned.
        pipeline_tag="fill-mask" if network == "generator" else None,
        tags=["electra", network, "pretraining"],
        # On a hub, the name of a directory here is somebody else's model.
        base_model=_name(source) if source.startswith(hub.SCHEME) else None,
        datasets=datasets or None,
        model_name=f"{run.profile.model_name}-{network}" if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _public_profile(run: Run) -> dict[str, Any]:
    """Return the values of the profile without the paths of this machine."""

    def public(source: str) -> str:
        is_public = sources.is_remote(source) and not _LOCAL_URL.search(source)
        return source if is_public else Path(source).name

    values = run.profile.model_dump()
    values["corpus"]["source"] = list(map(public, run.profile.corpus.sources))
    values["tokenizer"]["source"] = public(values["tokenizer"]["source"])
    if (init_from := run.profile.model.init_from) is not None:
        values["model"]["init_from"] = (
            public(init_from)
            if isinstance(init_from, str)
            else {network: public(str(getattr(init_from, network))) for network in NETWORKS}
        )
    return values
