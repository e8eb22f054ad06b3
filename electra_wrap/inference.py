"""Exported models in transformers: find replaced tokens, and have the generator replace some.

`detect`, `replace` and `check` import PyTorch. Call them in a child process, through `infer` or
`subprocesses.call`.
"""

import functools
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from electra_wrap import subprocesses
from electra_wrap.architecture import read_hf_config
from electra_wrap.errors import UsageError
from electra_wrap.progress import log

#: Texts that a child process gets at once.
BATCH_SIZE = 32

#: Share of a text's tokens that `replace` masks: upstream's default.
MASKED_SHARE = 0.15


def find_discriminator(directory: Path) -> Path:
    """Return the discriminator's directory in a run directory, an `hf/` or its own directory.

    UsageError if there is none.
    """
    for candidate in (directory / "hf" / "discriminator", directory / "discriminator", directory):
        if (candidate / "config.json").is_file():
            return candidate
    raise UsageError(f"{directory} has no discriminator; give a run directory or its hf/")


def infer(
    function: str, arguments: Mapping[str, Any], texts: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yield the result of `detect` or `replace` for each text, from one child process.

    `arguments` are all arguments but the texts, which are read as results are consumed. One
    message at the end counts truncated texts.
    """
    iterator, truncated = iter(texts), 0
    batches = iter(lambda: list(itertools.islice(iterator, BATCH_SIZE)), [])
    jobs = ({**arguments, "texts": batch} for batch in batches)
    for results in subprocesses.call_each(__name__, function, jobs, env=subprocesses.OFFLINE):
        yield from results
        truncated += sum(result["cut"] is not None for result in results)
    if truncated:
        log(f"texts that were truncated to the model's length: {truncated:,}")


def detect(model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each text its tokens and the discriminator's prediction for each of them.

    `probabilities` are those of having been replaced; `replaced` is 1 where they exceed 0.5. [CLS]
    and [SEP] are left out. Texts longer than the model's positions are truncated: `cut` is the
    number of characters that were read, or None.
    """
    rows, cuts = _encode(model, texts)
    return _predict(model, texts, rows, cuts)


def replace(model: str, texts: list[str], seed: int) -> list[dict[str, Any]]:
    """Replace tokens of each text with the generator's, and return `detect`'s results for them.

    Of each text, 15% of the tokens are masked (as in training, [CLS] and [SEP] count; at least
    one), none of them special, and sampled from the generator's softmax. The results also have
    `original`, the tokens before; `masked`, the ascending positions of masked tokens; and
    `changed`, the positions where another token was sampled. They depend on model, text and seed
    alone, not on the batch or the order.

    `model` is a discriminator's directory, beside that of its generator.
    """
    generator = _load_model("ElectraForMaskedLM", str(Path(model).with_name("generator")))
    tokenizer, (rows, cuts) = _load_tokenizer(model), _encode(model, texts)
    samples = [
        _sample(generator, tokenizer, row, f"{seed} {text}")
        for row, text in zip(rows, texts, strict=True)
    ]
    results = _predict(model, texts, list(map(_substitute, rows, samples)), cuts)
    for result, row, sample in zip(results, rows, samples, strict=True):
        result["original"] = tokenizer.convert_ids_to_tokens(row[1:-1])
        result["masked"] = [position - 1 for position in sample]
        result["changed"] = [p - 1 for p, token in sample.items() if token != row[p]]
    return results


def load(directory: str) -> None:
    """Load both models under `directory`. UsageError if one has other weights than its config."""
    _load_model("ElectraForPreTraining", f"{directory}/discriminator")
    _load_model("ElectraForMaskedLM", f"{directory}/generator")


def check(directory: str, texts: list[str], sentences: list[str], seed: int) -> dict[str, Any]:
    """Load both models under `directory`; return what `detect` and `replace` return for `texts`.

    Also what `replace` returns for `sentences` with `seed`, which the report shows. UsageError if a
    model has missing, unexpected or mismatched weights, or values are not finite.
    """
    model = f"{directory}/discriminator"
    return {
        "detected": detect(model, texts),
        "corrupted": replace(model, texts, seed=0),
        "sentences": replace(model, sentences, seed=seed) if sentences else [],
    }


def read_tokenizer(path: str, texts: list[str]) -> dict[str, Any]:
    """Return how a released tokenizer normalizes text, and the ids that it gives `texts`.

    `path` is a tokenizer.json or a directory. A tokenizer.json in it counts, because the classes of
    transformers may rebuild another one. UsageError if the tokenizer cannot be loaded.
    """
    import transformers

    file = Path(path) if Path(path).is_file() else Path(path, "tokenizer.json")
    try:
        if file.is_file():
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each class has errors of its own
        raise UsageError(
            f"the tokenizer in {path} cannot be loaded ({error}); give another"
        ) from None
    if tokenizer.is_fast:
        normalizer = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"] or {}
        steps = [normalizer, *normalizer.get("normalizers", [])]
        options: Mapping[str, Any] = next(
            (step for step in steps if step.get("type") == "BertNormalizer"), {}
        )
        lowercase = options.get("lowercase", False)
    else:
        options = tokenizer.init_kwargs
        lowercase = options.get("do_lower_case", True)
    accents = options.get("strip_accents")
    return {
        "lowercase": lowercase,
        "strip_accents": lowercase if accents is None else accents,
        "ids": tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [],
    }


def _encode(model: str, texts: list[str]) -> tuple[list[list[int]], list[int | None]]:
    """Return the ids of each text, [CLS] … [SEP], and its `cut` (see `detect`)."""
    tokenizer = _load_tokenizer(model)
    positions = _load_model("ElectraForPreTraining", model).config.max_position_embeddings
    length = min(tokenizer.model_max_length, positions)
    encoded = tokenizer(texts, truncation=True, max_length=length)
    cuts = [e.offsets[-2][1] if e.overflowing else None for e in encoded.encodings]
    return encoded["input_ids"], cuts


def _sample(generator: Any, tokenizer: Any, row: list[int], seed: str) -> dict[int, int]:
    """Mask positions of a row, and return a token for each, from the softmax of the generator.

    The positions are ascending and all different, while training may choose one twice. The samples
    are drawn by inverse transform.
    """
    import torch

    source, special = random.Random(seed), tokenizer.all_special_ids
    candidates = [position for position, token in enumerate(row) if token not in special]
    number = min(len(candidates), max(1, round(MASKED_SHARE * len(row))))
    positions = sorted(source.sample(candidates, number))
    masked = _substitute(row, dict.fromkeys(positions, tokenizer.mask_token_id))
    with torch.inference_mode():
        logits = generator(torch.tensor([masked])).logits[0, positions]
    cumulative = _require_finite(generator, logits).double().softmax(-1).cumsum(-1)
    draws = torch.tensor([[source.random()] for _ in positions], dtype=torch.float64).view(-1, 1)
    tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return dict(zip(positions, tokens[:, 0].tolist(), strict=True))


def _substitute(row: list[int], sample: Mapping[int, int]) -> list[int]:
    return [sample.get(position, token) for position, token in enumerate(row)]


def _predict(
    model: str, texts: list[str], rows: list[list[int]], cuts: list[int | None]
) -> list[dict[str, Any]]:
    """Return what `detect` returns, for the ids of texts."""
    import torch

    tokenizer = _load_tokenizer(model)
    discriminator = _load_model("ElectraForPreTraining", model)
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        logits = _require_finite(discriminator, discriminator(**inputs).logits)
    return [
        {
            "text": text,
            "tokens": tokenizer.convert_ids_to_tokens(row[1:-1]),
            "probabilities": [round(p, 6) for p in values[1 : len(row) - 1]],
            "replaced": [int(p > 0.5) for p in values[1 : len(row) - 1]],
            "cut": cut,
        }
        for text, row, values, cut in zip(texts, rows, logits.sigmoid().tolist(), cuts, strict=True)
    ]


def _require_finite(model: Any, values: Any) -> Any:
    if not values.isfinite().all():
        problem = f"{model.name_or_path} gives values that are not finite"
        raise UsageError(f"{problem}; use an earlier checkpoint")
    return values


@functools.cache
def _load_model(model_class: str, directory: str) -> Any:
    """Load a model. UsageError unless its file and its class have the same parameters."""
    import transformers

    # Of other keys, some have transformers fetch and run code.
    config = transformers.ElectraConfig(**read_hf_config(Path(directory)))
    if not Path(directory, "model.safetensors").is_file():  # transformers reads other formats, too
        raise UsageError(f"{directory} has no model.safetensors; convert it again")
    model, report = getattr(transformers, model_class).from_pretrained(
        directory,
        config=config,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are reported
        output_loading_info=True,
    )
    if problems := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise UsageError(f"{directory} does not fit {model_class}: {problems}; convert it again")
    return model.eval()


@functools.cache
def _load_tokenizer(directory: str) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)
