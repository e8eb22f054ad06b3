"""The converted models, asked a question in transformers.

Run as a module (`process.call`), because it imports PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from electra_wrap import process
from electra_wrap.errors import UsageError

#: What a process that loads local models needs: nothing from a hub.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def find_discriminator(directory: Path) -> Path:
    """Return the discriminator's directory of a model, an `hf/` or a run directory. UsageError if there is none."""
    for candidate in (directory, directory / "discriminator", directory / "hf" / "discriminator"):
        if (config := candidate / "config.json").is_file():
            architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
            if "ElectraForPreTraining" in architectures:
                return candidate
    raise UsageError(f"{directory} has no discriminator; give a run directory, its hf/ or its hf/discriminator")


def detect(model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each text its tokens, the probability that each was replaced, and that rounded to 0 or 1.

    [CLS] and [SEP] are left out. Texts longer than the model's positions are cut.
    """
    import torch
    from transformers import AutoTokenizer, ElectraForPreTraining

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = _load(ElectraForPreTraining, model)
    results = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            probabilities = torch.sigmoid(network(**batch).logits[0]).tolist()
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        results.append(
            {
                "text": text,
                "tokens": tokens[1:-1],
                "probabilities": [round(p, 6) for p in probabilities[1:-1]],
                "replaced": [int(p > 0.5) for p in probabilities[1:-1]],
            }
        )
    return results


def check(directory: str, texts: list[str]) -> dict[str, Any]:
    """Load both networks under `directory`; run the detector on `texts`, and the generator with a masked word.

    UsageError if a model has missing, unexpected or mismatched weights, or gives values that are not finite.
    """
    import torch
    from transformers import AutoTokenizer, ElectraForMaskedLM

    found = detect(f"{directory}/discriminator", texts)
    tokenizer = AutoTokenizer.from_pretrained(f"{directory}/generator")
    generator = _load(ElectraForMaskedLM, f"{directory}/generator")
    batch = tokenizer(f"{texts[0]} {tokenizer.mask_token}", return_tensors="pt", truncation=True)
    with torch.no_grad():
        logits = generator(**batch).logits
    if not torch.isfinite(logits).all():
        raise UsageError(f"{directory}/generator gives values that are not finite; take an earlier checkpoint")
    return {"detected": found}


def _load(model_class: Any, directory: str) -> Any:
    """Load a model and insist that its file and its class agree on every parameter."""
    model, report = model_class.from_pretrained(directory, output_loading_info=True, use_safetensors=True)
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise UsageError(f"{directory} does not fit {model_class.__name__}: {problems}; convert it again")
    return model.eval()


def answer(task: str, **arguments: Any) -> Any:
    """`detect` or `check`, by name."""
    return detect(**arguments) if task == "detect" else check(**arguments)


if __name__ == "__main__":
    process.serve(answer)
