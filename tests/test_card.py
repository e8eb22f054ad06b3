"""The model card."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from electra_wrap import profiles
from electra_wrap.architecture import NETWORKS
from electra_wrap.card import model_card
from electra_wrap.metrics import UPSTREAM
from electra_wrap.run import Run


def test_card_describes_the_model_and_what_it_was_made_from(learned: Run, tmp_path: Path) -> None:
    counts = learned.results("corpus")
    for network in NETWORKS:
        path = learned.exported / network / "README.md"
        data = ModelCard.load(path).data.to_dict()
        assert data["language"] == "es" and data["library_name"] == "transformers"
        assert data["tags"] == ["electra", network, "pretraining"]
        assert "license" not in data and "model-index" in data
        pipeline_tag = {"discriminator": None, "generator": "fill-mask"}[network]
        assert data.get("pipeline_tag") == pipeline_tag
        text = path.read_text(encoding="utf-8")
        assert f"{counts['lines']:,} lines" in text and "electra_wrap's native engine" in text
        assert f"{counts['held_out_lines']:,} lines, in whole documents" in text
        for name in ("threads", "torch", "precision"):
            assert f"| {name} | {learned.model.setup[name]} |" in text
        assert "`text.txt`" in text and str(learned.profile.corpus.source) not in text
        assert "{" not in text
        profile = tmp_path / "again.toml"
        profile.write_text(text.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
        again = profiles.load(str(profile)).model_dump()
        assert again["corpus"].pop("source") == [str(tmp_path / "text.txt")]
        expected = learned.profile.model_dump()
        del expected["corpus"]["source"]
        assert again == expected
    assert "torch" not in sys.modules


def test_card_has_the_evaluation_of_its_own_step(
    learned: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: number / 8 for number, name in enumerate(UPSTREAM.values())}
    values |= {"discriminator/auc": float("nan"), "examples": 1234}  # nothing was replaced
    by_step = {4: {"generator/accuracy": 0.99}, 6: values}
    monkeypatch.setattr(learned.model, "evaluations", by_step)
    text = model_card(learned, "generator", 6)
    results = ModelCard(text).data.eval_results or []
    assert {result.metric_name: result.metric_value for result in results} == {
        name: values[name]
        for name in ("loss/generator", "generator/accuracy", "generator/sampled_accuracy")
    }
    recall = values["discriminator/recall"]
    assert f"| discriminator/recall | {recall:.4f} |" in text and "1,234 examples" in text
    assert "auc_with_padding" not in text, "which is high for a random model, too"
    assert "nan" not in text and "was not evaluated" in model_card(learned, "generator", 7)


def test_card_names_engine_and_origin(learned: Run) -> None:
    values = {"model.init_from": "/home/ana/modelo", "tokenizer.source": "/home/ana/vocab.txt"}
    values |= {"tokenizer.vocab_size": None, "corpus.source": "hf://datasets/ana/textos/es.txt"}
    profile = learned.profile.with_values(values).model_copy(update={"engine": "upstream"})
    text = model_card(Run(profile, learned.directory), "generator", 6)
    assert "6 steps with [google-research/electra](" in text and "/home" not in text
    assert "started from the weights of `modelo`" in text and "from `vocab.txt`" in text
    assert "base_model" not in ModelCard(text).data.to_dict(), "on a hub, it is another model"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/ana/secret/es.txt", "es.txt"),
        ("file:///home/ana/secret/es.txt", "es.txt"),
        ("local:///home/ana/*.txt", "*.txt"),
        ("https://example.org/texts/es.txt.gz", "https://example.org/texts/es.txt.gz"),
        ("hf://datasets/ana/textos/es.txt", "hf://datasets/ana/textos/es.txt"),
    ],
)
def test_card_has_no_path_of_this_machine(learned: Run, source: str, shown: str) -> None:
    profile = learned.profile.with_values({"corpus.source": [source]})
    text = model_card(Run(profile, learned.directory), "generator", 6)
    assert f"- `{shown}`\n" in text and f'"{shown}"' in text and "/home" not in text
    datasets = ModelCard(text).data.to_dict().get("datasets")
    assert datasets == (["ana/textos"] if "textos" in source else None)
