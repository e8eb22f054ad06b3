"""Exported models in transformers: find replaced tokens, and have the generator replace some.

`detect`, `replace` and `check` import PyTorch. Call them in a child process, through `infer` or
`subprocesses.call`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from electra_wrap import subprocesses
from electra_wrap.errors import UsageError
from electra_wrap.files import read_text
from electra_wrap.profile import read_hf_config
from electra_wrap.progress import log
from electra_wrap.run import MANIFEST

#: Texts that a child process gets at once.
BATCH_SIZE = 32

#: Share of a text's tokens that `replace` masks: upstream's default.
MASKED_SHARE = 0.15


def find_discriminator(directory: Path) -> Path:
    """Return the discriminator's directory in a run directory, an `hf/` or its own directory.

    UsageError if there is none.
    """
    for candidate in (directory, directory / "discriminator", directory / "hf" / "discriminator"):
        if _has_architecture(candidate, "ElectraForPreTraining"):
            return candidate
    if (directory / MANIFEST).is_file():
        raise UsageError(f"{directory} has no exported model yet; `run` exports it")
    raise UsageError(f"{directory} has no discriminator; give a run directory or its hf/")


def find_generator(discriminator: Path) -> Path:
    """Return the generator's directory beside a discriminator's. UsageError if there is none."""
    generator = discriminator.parent / "generator"
    if not _has_architecture(generator, "ElectraForMaskedLM"):
        raise UsageError(f"{generator.parent} has no generator; give a run directory or its hf/")
    return generator


def _has_architecture(directory: Path, architecture: str) -> bool:
    # Any other file lacks the entry in one of these ways.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        config = json.loads(read_text(directory / "config.json"))
        return architecture in config["architectures"]
    return False


def infer(
    function: str, arguments: Mapping[str, Any], texts: Iterable[str], batch_size: int = BATCH_SIZE
) -> Iterator[dict[str, Any]]:
    """Yield the result of `detect` or `replace` for each text, from one child process.

    `arguments` are all arguments but the texts. `batch_size` texts are read at a time, when the
    results of the texts before them were consumed. One message at the end counts truncated texts.
    """
    iterator = iter(texts)
    batches = iter(lambda: list(itertools.islice(iterator, batch_size)), [])
    jobs = ({**arguments, "texts": batch} for batch in batches)
    calls = subprocesses.call_each(__name__, function, jobs, env=subprocesses.OFFLINE)
    truncated = length = 0
    with contextlib.closing(calls) as results:
        for result in itertools.chain.from_iterable(results):
            if result["cut"] is not None:
                truncated += 1
                length = len(result["tokens"])
            yield result
    if truncated:
        log(f"texts truncated to the model's {length} tokens: {truncated:,}")


def detect(model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each text its tokens and the discriminator's prediction for each of them.

    `probabilities` are those of having been replaced; `replaced` is 1 where they exceed 0.5. [CLS]
    and [SEP] are left out. Texts longer than the model's positions are truncated: `cut` is the
    number of characters that were read, or None.
    """
    rows, cuts = _encode(model, texts)
    return _predict(model, texts, rows, cuts)


def replace(model_dir: str, texts: list[str], seed: int) -> list[dict[str, Any]]:
    """Replace tokens of each text with the generator's, and return `detect`'s results for them.

    Of each text, 15% of the tokens are masked (as in training, [CLS] and [SEP] count; at least
    one), none of them special, and sampled from the generator's softmax. The results also have
    `original`, the tokens before; `masked`, the ascending positions of masked tokens; `sampled`,
    the token of each; and `changed`, the positions where that is another token. They depend on
    model, text and seed alone, not on the batch or the order.

    `model_dir` is what `find_discriminator` takes. UsageError if there is no generator, or one of
    another vocabulary.
    """
    discriminator_dir = find_discriminator(Path(model_dir))
    model = str(discriminator_dir)
    generator = _load_model("ElectraForMaskedLM", str(find_generator(discriminator_dir)))
    vocab_size = _load_model("ElectraForPreTraining", model).config.vocab_size
    if generator.config.vocab_size != vocab_size:
        sizes = f"{vocab_size:,} tokens and its generator {generator.config.vocab_size:,}"
        raise UsageError(f"{model} has {sizes}; use two models of one training")
    tokenizer = _load_tokenizer(model)
    rows, cuts = _encode(model, texts)
    samples = [
        _sample(generator, tokenizer, row, f"{seed} {text}")
        for row, text in zip(rows, texts, strict=True)
    ]
    results = _predict(model, texts, list(map(_substitute, rows, samples)), cuts)
    for result, row, sample in zip(results, rows, samples, strict=True):
        result["original"] = tokenizer.convert_ids_to_tokens(row[1:-1])
        result["masked"] = [position - 1 for position in sample]
        result["sampled"] = tokenizer.convert_ids_to_tokens(list(sample.values()))
        result["changed"] = [p - 1 for p, token in sample.items() if token != row[p]]
    return results


def check(directory: str, texts: list[str], sentences: list[str], seed: int) -> dict[str, Any]:
    """Load both models under `directory`; return what `detect` and `replace` return for `texts`.

    Also what `replace` returns for `sentences` with `seed`, which the report shows. UsageError if a
    model has missing, unexpected or mismatched weights, or values are not finite.
    """
    return {
        "detected": detect(f"{directory}/discriminator", texts),
        "corrupted": replace(directory, texts, seed=0),
        "sentences": replace(directory, sentences, seed=seed) if sentences else [],
    }


def _encode(model: str, texts: list[str]) -> tuple[list[list[int]], list[int | None]]:
    """Return the ids of each text, [CLS] … [SEP], and its `cut` (see `detect`)."""
    tokenizer = _load_tokenizer(model)
    discriminator = _load_model("ElectraForPreTraining", model)
    length = min(tokenizer.model_max_length, discriminator.config.max_position_embeddings)
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
        hidden = generator.electra(torch.tensor([masked])).last_hidden_state[0, positions]
        logits = generator.generator_lm_head(generator.generator_predictions(hidden))
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
    probabilities = logits.sigmoid().tolist()
    return [
        {
            "text": text,
            "tokens": tokenizer.convert_ids_to_tokens(row[1:-1]),
            "probabilities": [round(p, 6) for p in values[1 : len(row) - 1]],
            "replaced": [int(p > 0.5) for p in values[1 : len(row) - 1]],
            "cut": cut,
        }
        for text, row, values, cut in zip(texts, rows, probabilities, cuts, strict=True)
    ]


def _require_finite(model: Any, values: Any) -> Any:
    if values.isfinite().all():
        return values
    problem = f"{model.name_or_path} gives values that are not finite"
    raise UsageError(f"{problem}; use an earlier checkpoint")


@functools.cache
def _load_model(model_class: str, directory: str) -> Any:
    """Load a model. UsageError unless its file and its class have the same parameters.

    Of the files of the directory, only config.json and model.safetensors count: not the other
    formats that transformers would take, an index of files elsewhere, or another model's adapter.
    """
    import transformers

    with _loading(directory):
        if Path(directory, "adapter_config.json").exists():
            raise UsageError(f"{directory} is an adapter of another model; merge them")
        model, report = getattr(transformers, model_class).from_pretrained(
            directory,
            config=transformers.ElectraConfig(**read_hf_config(Path(directory))),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if problems := {kind: sorted(map(str, names)) for kind, names in report.items() if names}:
        raise UsageError(f"{directory} does not fit {model_class}: {problems}; convert it again")
    return model.eval()


@functools.cache
def _load_tokenizer(directory: str) -> Any:
    import transformers

    with _loading(directory):
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@contextlib.contextmanager
def _loading(directory: str) -> Iterator[None]:
    """Convert exceptions, of which each library has its own, to UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{directory} cannot be loaded ({reason}); convert it again") from None


if __name__ == "__main__":
    subprocesses.serve(detect, replace, check)
