"""The model card: the README.md of an exported model, with the metadata that a hub reads."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from electra_wrap import __version__, corpus, sources, training, vocab
from electra_wrap.profile import NETWORKS, Network, toml

if TYPE_CHECKING:
    from electra_wrap.stages import Run

TEMPLATE = Path(__file__).with_name("model_card.md")

#: What a hub calls what each network does: its pipeline (a discriminator has none before it is fine-tuned), the type
#: and the name of the task that it is measured by.
PIPELINES: dict[Network, str | None] = {"discriminator": None, "generator": "fill-mask"}
TASKS = {
    "discriminator": ("token-classification", "replaced token detection"),
    "generator": ("fill-mask", "masked language modelling"),
}

#: The metrics of an evaluation: key in the manifest, a hub's type of metric, and what it means.
METRICS = (
    ("loss/total", "loss", "what training minimises: the generator's loss and 50 times the discriminator's"),
    ("loss/generator", "loss", "cross-entropy of the masked tokens, in nats"),
    ("loss/discriminator", "loss", "cross-entropy of replaced or not, in nats"),
    ("generator/accuracy", "accuracy", "share of the masked tokens for which the likeliest token is the original one"),
    ("generator/sampled_accuracy", "accuracy", "share of the masked tokens for which the one it draws is the original"),
    ("discriminator/accuracy", "accuracy", "share of all tokens that are judged rightly, at a probability of 0.5"),
    ("discriminator/precision", "precision", "share of those it says are replaced that are"),
    ("discriminator/recall", "recall", "share of the replaced tokens that it finds"),
    ("discriminator/auc", "roc_auc", "probability that a replaced token is ranked above one that is not"),
)


#: A data set on a hub, and a source that is on this machine though it is written as a URL.
_DATASET = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+|[\w.-]+)([@:]|$)")
_LOCAL = re.compile(r"(file|local)://|hf://datasets//")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of an evaluation."""

    name: str
    type: str
    meaning: str
    value: float

    def of(self, network: Network) -> bool:
        return network in self.name.split("/")


def evaluation(run: Run, step: int) -> dict[str, float]:
    """The evaluation of a step that the manifest has, without what is not finite; empty if it has none."""
    found = training.evaluations(run).get(str(step), {})
    return {key: value for key, value in found.items() if math.isfinite(value)}


def card(run: Run, network: Network, step: int, made_by: Any) -> str:
    """Return the README.md of a model that an engine exported at a step."""
    import jinja2

    profile, size = run.profile, len(vocab.read(run.vocabulary))
    facts, evaluated = run.recorded("corpus").get("facts", {}), evaluation(run, step)
    metrics = [Metric(key, kind, what, evaluated[key]) for key, kind, what in METRICS if key in evaluated]
    names, shown = profile.corpus.sources, [_shown(name) for name in profile.corpus.sources]
    tokenizer = _shown(profile.tokenizer.source)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(run, network, metrics),
        **{"profile": profile, "network": network, "step": step, "credit": made_by.CREDIT},
        parameters=f"{profile.parameters(network, size) / 1e6:.3g} million",
        **{"sources": shown, "local": shown != names, "corpus": facts},
        mended=[(what, facts[key]) for key, what in corpus.FINDINGS.items() if what and facts.get(key)],
        **{"vocab_size": size, "fit": _fit(run)},
        tokenizer_source="trained on the same text" if tokenizer == "train" else f"from `{tokenizer}`",
        shapes={each: profile.model.shape(each) for each in NETWORKS},
        settings=_settings(run, step, made_by),
        **{"metrics": metrics, "evaluated": evaluated.get("examples")},
        toml=toml(_portable(profile.model_dump())),
        versions=_versions(run),
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # the names of files need not be Unicode


def _metadata(run: Run, network: Network, metrics: list[Metric]) -> str:
    # Imported here: it costs a third of a second.
    from huggingface_hub import EvalResult, ModelCardData

    profile, (task, task_name) = run.profile, TASKS[network]
    sets = [found[1] for name in profile.corpus.sources if (found := _DATASET.match(name))]
    data = ModelCardData(
        language=profile.language.partition("-")[0],  # a hub knows no regions
        library_name="transformers",
        pipeline_tag=PIPELINES[network],
        tags=["electra", network, "pretraining"],
        datasets=sets or None,
        model_name=f"{profile.model_name}-{network}" if metrics else None,
        eval_results=[
            EvalResult(
                task_type=task,
                task_name=task_name,
                dataset_type="held-out",
                dataset_name="held-out text of the corpus",
                metric_type=metric.type,
                metric_name=metric.name,
                metric_value=round(metric.value, 6),
            )
            for metric in metrics
            if metric.of(network)
        ]
        or None,
    )
    return str(data.to_yaml())


def _fit(run: Run) -> dict[str, float]:
    """How the vocabulary fits the corpus, if that is known."""
    facts = run.recorded("vocab").get("facts", {})
    return facts if "tokens_per_word" in facts else {}


def _settings(run: Run, step: int, made_by: Any) -> list[tuple[str, Any]]:
    keys, model, facts = run.profile.train, run.profile.model, run.recorded("train").get("facts", {})
    device = facts.get("device")
    gpus = [] if device in (None, "cpu") else device
    engine = made_by.__name__.split(".")[-2]
    begun = facts.get("from_step")
    return [
        ("tokens in a sequence", model.max_seq_length),
        ("share that is masked", model.mask_prob),
        ("steps", f"{step:,}" if step == keys.steps else f"{step:,} of {keys.steps:,}"),
        ("sequences in a batch", keys.batch_size),
        ("learning rate", keys.learning_rate),
        ("warm-up steps", f"{keys.warmup_steps:,}"),
        ("weight decay", keys.weight_decay),
        ("seed", keys.seed),
        ("engine", engine + (f" (from step {begun:,})" if begun else "")),
        # Of a training that goes on it is not known yet.
        *([("precision", made_by.precision(keys.precision, gpus))] if device else []),
        *([("device", f"{len(gpus)} × {gpus[0]}" if gpus else "CPU")] if device else []),
    ]


def _versions(run: Run) -> list[tuple[str, str]]:
    """electra_wrap and what each stage was done with: packages, and for upstream's scripts pin and patches."""
    found: dict[str, str] = {}
    for stage in ("corpus", "vocab", run.engine.DATA, "train", "convert"):
        found |= run.recorded(stage).get("versions", {})
    return [("electra_wrap", __version__), *sorted(found.items())]


def _shown(source: str) -> str:
    """A source as strangers may see it: of what is on this machine, its name alone."""
    return source if sources.is_remote(source) and not _LOCAL.search(source) else Path(source).name


def _portable(values: dict[str, Any]) -> dict[str, Any]:
    """A profile's values with sources as strangers may see them."""
    given = values["corpus"]["source"]
    source = _shown(given) if isinstance(given, str) else list(map(_shown, given))
    tokenizer = {**values["tokenizer"], "source": _shown(values["tokenizer"]["source"])}
    return {**values, "corpus": {**values["corpus"], "source": source}, "tokenizer": tokenizer}
