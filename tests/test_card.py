"""The model card."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import tiny
from huggingface_hub import ModelCard

from electra_wrap import packages, profiles
from electra_wrap.engine import Checkpoint
from electra_wrap.metrics import UPSTREAM
from electra_wrap.monitor.card import model_card
from electra_wrap.pipeline.execute import execute
from electra_wrap.profile import NETWORKS
from electra_wrap.run import Run


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, corpus_text: Path) -> Run:
    """A run of two steps, up to the exported models."""
    keys = ('engine="native"', 'description="Un modelo: «pequeño»"', "language=es-MX")
    run = Run(tiny(corpus_text, *keys, steps=2), tmp_path_factory.mktemp("converted") / "run")
    execute(run, until="convert")
    return run


def card(run: Run, step: int = 2) -> str:
    return model_card(run, "generator", Checkpoint("native", step, run.model_dir))


def test_card_describes_the_model_and_what_it_was_made_from(converted: Run, tmp_path: Path) -> None:
    counts = converted.results("corpus")
    for network in NETWORKS:
        path = converted.exported / network / "README.md"
        data = ModelCard.load(path).data.to_dict()
        assert data["language"] == "es" and data["library_name"] == "transformers"
        assert data["tags"] == ["electra", network, "pretraining"]
        assert "license" not in data and "model-index" in data
        pipeline_tag = {"discriminator": None, "generator": "fill-mask"}[network]
        assert data.get("pipeline_tag") == pipeline_tag
        text = path.read_text(encoding="utf-8")
        assert f"{counts['lines']:,} lines" in text
        assert f"{counts['held_out_lines']:,} lines, in whole documents" in text
        for name, version in packages.versions("torch", "tokenizers").items():
            assert f"| {name} | `{version}` |" in text
        assert "`text.txt`" in text and str(converted.profile.corpus.source) not in text
        assert "{" not in text
        profile = tmp_path / "again.toml"
        profile.write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
        again = profiles.load(str(profile)).model_dump()
        assert again["corpus"].pop("source") == [str(tmp_path / "text.txt")]
        expected = converted.profile.model_dump()
        del expected["corpus"]["source"]
        assert again == expected
    assert "torch" not in sys.modules


def test_card_has_the_evaluation_of_its_own_step(
    converted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: number / 8 for number, name in enumerate(UPSTREAM.values())}
    values |= {"discriminator/auc": float("nan"), "examples": 1234}  # nothing was replaced
    by_step = {"1": {"generator/accuracy": 0.99}, "2": values}
    monkeypatch.setitem(converted.model, "evaluations", {"upstream": by_step})
    text = card(converted)
    results = ModelCard(text).data.eval_results or []
    assert {result.metric_name: result.metric_value for result in results} == {
        name: values[name]
        for name in ("loss/generator", "generator/accuracy", "generator/sampled_accuracy")
    }
    recall = values["discriminator/recall"]
    assert f"| discriminator/recall | {recall:.4f} |" in text and "1,234 examples" in text
    assert "evaluated by the upstream engine" in text and "nan" not in text
    assert "was not evaluated" in card(converted, step=7)


def test_card_credits_each_engine_that_trained(
    converted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = [
        {"engine": "upstream", "from_step": 0, "to_step": 1200},
        {"engine": "native", "from_step": 1200, "to_step": 2000},
    ]
    monkeypatch.setitem(converted.model, "trained_by", segments)
    text = card(converted, step=1600)
    assert "- steps 1 to 1,200 with [google-research/electra](" in text
    assert "- steps 1,201 to 1,600 with electra_wrap's native engine" in text
    assert "| engine | upstream (steps 1 to 1,200), native (steps 1,201 to 1,600) |" in text
    text = card(converted, step=1000)
    assert "trained for 1,000 steps with [google-research/electra](" in text
    assert "| engine | upstream |" in text
    monkeypatch.delitem(converted.model, "trained_by")
    assert "trained for 2 steps with electra_wrap's native engine" in card(converted)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/ana/secret/es.txt", "es.txt"),
        ("file:///home/ana/secret/es.txt", "es.txt"),
        ("hf://datasets//home/ana/secret/es::train:texto", "es::train:texto"),
        ("https://example.org/texts/es.txt.gz", "https://example.org/texts/es.txt.gz"),
        ("hf://datasets/ana/textos@main:es", "hf://datasets/ana/textos@main:es"),
    ],
)
def test_card_has_no_path_of_this_machine(converted: Run, source: str, shown: str) -> None:
    corpus = converted.profile.corpus.model_copy(update={"source": [source]})
    profile = converted.profile.model_copy(update={"corpus": corpus})
    text = card(Run(profile, converted.directory))
    assert f"- `{shown}`\n" in text and f'"{shown}"' in text and "/home" not in text
    datasets = ModelCard(text).data.to_dict().get("datasets")
    assert datasets == (["ana/textos"] if "textos" in source else None)
