"""The converted models, asked a question in transformers.

Run as a module (`process.call`), because it imports PyTorch.
"""

from __future__ import annotations

import contextlib
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
        # What is no such file has no such entry.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            config = json.loads((candidate / "config.json").read_text(encoding="utf-8"))
            if "ElectraForPreTraining" in config["architectures"]:
                return candidate
    raise UsageError(f"{directory} has no discriminator; give a run directory, its hf/ or its hf/discriminator")


def detect(model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each text its tokens, the probability that each was replaced, and that rounded to 0 or 1.

    [CLS] and [SEP] are left out. Texts longer than the model's positions are cut.
    """
    import torch
    from transformers import AutoTokenizer, ElectraForPreTraining

    tokenizer = _read(AutoTokenizer, model)
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
    tokenizer = _read(AutoTokenizer, f"{directory}/generator")
    generator = _load(ElectraForMaskedLM, f"{directory}/generator")
    batch = tokenizer(f"{texts[0]} {tokenizer.mask_token}", return_tensors="pt", truncation=True)
    with torch.no_grad():
        logits = generator(**batch).logits
    if not torch.isfinite(logits).all():
        raise UsageError(f"{directory}/generator gives values that are not finite; take an earlier checkpoint")
    return {"detected": found}


def _load(model_class: Any, directory: str) -> Any:
    """Load a model and insist that its file and its class agree on every parameter."""
    model, report = _read(model_class, directory, output_loading_info=True, use_safetensors=True)
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise UsageError(f"{directory} does not fit {model_class.__name__}: {problems}; convert it again")
    return model.eval()


def _read(a_class: Any, directory: str, **keys: Any) -> Any:
    """Load something of transformers' that may be from strangers: no code of theirs is run, no pickle read."""
    try:
        return a_class.from_pretrained(directory, trust_remote_code=False, **keys)
    except Exception as error:  # each library behind it has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{directory} cannot be loaded ({reason}); convert it again") from None


if __name__ == "__main__":
    process.serve(detect, check)
