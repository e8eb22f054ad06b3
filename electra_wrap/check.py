"""The converted models, asked a question in transformers.

Run as a module (`process.call`), because it imports PyTorch.
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

from electra_wrap import process
from electra_wrap.errors import UsageError
from electra_wrap.progress import say

#: What a process that loads local models needs: nothing from a hub.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

#: Texts that a child is asked about at once.
BATCH = 32

#: Share of a text's tokens that `replace` masks: upstream's default.
MASKED_SHARE = 0.15


def find_discriminator(directory: Path) -> Path:
    """Return the discriminator's directory of a model, an `hf/` or a run directory. UsageError if there is none."""
    for candidate in (directory, directory / "discriminator", directory / "hf" / "discriminator"):
        if _is(candidate, "ElectraForPreTraining"):
            return candidate
    raise UsageError(f"{directory} has no discriminator; give a run directory, its hf/ or its hf/discriminator")


def find_generator(discriminator: Path) -> Path:
    """Return the directory of the generator beside a discriminator's. UsageError if there is none."""
    generator = discriminator.parent / "generator"
    if not _is(generator, "ElectraForMaskedLM"):
        raise UsageError(f"{discriminator.parent} has no generator; give a run directory or its hf/, which has both")
    return generator


def _is(directory: Path, model_class: str) -> bool:
    # What is no such file has no such entry.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return model_class in json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"]
    return False


def ask(job: Mapping[str, Any], texts: Iterable[str], batch: int) -> Iterator[dict[str, Any]]:
    """Yield what `detect` or `replace`, called with `job` and `batch` texts at a time in a child, say of each text.

    Texts are read as results are taken. Those that were cut are told on stderr, once.
    """
    texts, cut, length = iter(texts), 0, 0
    batches = iter(lambda: list(itertools.islice(texts, batch)), [])
    jobs = ({**job, "texts": some} for some in batches)
    with contextlib.closing(process.calls("electra_wrap.check", jobs, env=ENVIRONMENT)) as answers:
        for result in itertools.chain.from_iterable(answers):
            if result["cut"] is not None:
                cut, length = cut + 1, len(result["tokens"])
            yield result
    if cut:
        what = "a text was" if cut == 1 else f"{cut:,} texts were"
        say(f"{what} longer than the {length} tokens that the model reads, and cut there")


def detect(model: str, texts: list[str]) -> list[dict[str, Any]]:
    """Return for each text its tokens, the probability that each was replaced, and that rounded to 0 or 1.

    [CLS] and [SEP] are left out. Texts longer than the model's positions are cut: `cut` is the number of characters
    that were read, else None.
    """
    from transformers import ElectraForPreTraining

    tokenizer, network = _tokenizer(model), _load(ElectraForPreTraining, model)
    rows, cuts = _ids(tokenizer, network, texts)
    found = _judge(model, tokenizer, network, rows)
    return [{"text": text, **one, "cut": cut} for text, one, cut in zip(texts, found, cuts, strict=True)]


def replace(model_dir: str, texts: list[str], seed: int) -> list[dict[str, Any]]:
    """Let the generator replace tokens of each text, and return what `detect` does for the outcome.

    Of each text, 15% of the tokens (as in training [CLS] and [SEP] count; at least one) are masked, none of them
    special, and sampled from the generator's softmax. Results have besides: `original`, the tokens as they were;
    `masked`, the positions among them, ascending; `sampled`, the token of each; `changed`, those of the positions
    whose token is another one. They are functions of model, text and seed, so that no batch or order matters.

    `model_dir` is what `find_discriminator` takes. UsageError if there is no generator, or of another vocabulary.
    """
    import torch
    from transformers import ElectraForMaskedLM, ElectraForPreTraining

    discriminator = find_discriminator(Path(model_dir))
    model, proposer = str(discriminator), str(find_generator(discriminator))
    tokenizer, network = _tokenizer(model), _load(ElectraForPreTraining, model)
    generator = _load(ElectraForMaskedLM, proposer)
    sizes = [one.config.vocab_size for one in (network, generator)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"{model} has {sizes[0]:,} words and {proposer} {sizes[1]:,}; take both from one training")
    rows, cuts = _ids(tokenizer, network, texts)
    randoms = [random.Random(f"{seed} {text}") for text in texts]
    chosen = [_choose(row, tokenizer.all_special_ids, own) for row, own in zip(rows, randoms, strict=True)]
    masked = [
        _put(row, places, [tokenizer.mask_token_id] * len(places)) for row, places in zip(rows, chosen, strict=True)
    ]
    with torch.inference_mode():
        hidden = generator.electra(*_batch(masked)).last_hidden_state
        # One text at a time: the logits of a batch would take gigabytes.
        logits = (
            generator.generator_lm_head(generator.generator_predictions(hidden[row, places]))
            for row, places in enumerate(chosen)
        )
        sampled = [_sample(_finite(proposer, one), own) for one, own in zip(logits, randoms, strict=True)]
    corrupted = [_put(*each) for each in zip(rows, chosen, sampled, strict=True)]
    found = _judge(model, tokenizer, network, corrupted)
    return [
        {
            "text": text,
            "original": tokenizer.convert_ids_to_tokens(row[1:-1]),
            "masked": [place - 1 for place in places],
            "sampled": tokenizer.convert_ids_to_tokens(ids),
            "changed": [place - 1 for place, new in zip(places, ids, strict=True) if new != row[place]],
            **one,
            "cut": cut,
        }
        for text, row, places, ids, one, cut in zip(texts, rows, chosen, sampled, found, cuts, strict=True)
    ]


def check(directory: str, texts: list[str]) -> dict[str, Any]:
    """Load both networks under `directory`; run the detector on `texts`, as they are and as the generator leaves them.

    UsageError if a model has missing, unexpected or mismatched weights, or gives values that are not finite.
    """
    return {"detected": detect(f"{directory}/discriminator", texts), "corrupted": replace(directory, texts, seed=0)}


def _ids(tokenizer: Any, network: Any, texts: list[str]) -> tuple[list[list[int]], list[int | None]]:
    """The ids of each text, [CLS] … [SEP]; the number of characters that were read, for those that had to be cut."""
    length = min(tokenizer.model_max_length, network.config.max_position_embeddings)
    read = tokenizer(texts, return_offsets_mapping=True)
    rows, cuts = [], []
    for row, offsets in zip(read["input_ids"], read["offset_mapping"], strict=True):
        rows.append(row if len(row) <= length else [*row[: length - 1], row[-1]])
        cuts.append(None if len(row) <= length else offsets[length - 2][1])
    return rows, cuts


def _choose(row: list[int], never: list[int], own: random.Random) -> list[int]:
    """Choose the positions to mask: all different, where training may choose one twice."""
    candidates = [place for place, token in enumerate(row) if token not in never]
    return sorted(own.sample(candidates, min(len(candidates), max(1, round(MASKED_SHARE * len(row))))))


def _put(row: list[int], places: list[int], ids: list[int]) -> list[int]:
    new = dict(zip(places, ids, strict=True))
    return [new.get(place, token) for place, token in enumerate(row)]


def _sample(logits: Any, own: random.Random) -> list[int]:
    """Sample from the softmax of each row of logits, [n, vocab_size], by inverting its distribution function."""
    import torch

    ends = logits.double().softmax(-1).cumsum(-1)
    draws = torch.tensor([[own.random()] for _ in ends], dtype=torch.float64).view(-1, 1) * ends[:, -1:]
    return [int(word) for word in torch.searchsorted(ends, draws, right=True)]


def _batch(rows: list[list[int]]) -> tuple[Any, Any]:
    """Ids and attention mask, [n, length] both; padding is not attended to."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row) for row in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)


def _judge(model: str, tokenizer: Any, network: Any, rows: list[list[int]]) -> list[dict[str, Any]]:
    """What the discriminator says of rows of ids."""
    import torch

    with torch.inference_mode():
        logits = _finite(model, network(*_batch(rows)).logits)
    found = []
    for row, probabilities in zip(rows, torch.sigmoid(logits).tolist(), strict=True):
        inside = probabilities[1 : len(row) - 1]
        found.append(
            {
                "tokens": tokenizer.convert_ids_to_tokens(row[1:-1]),
                "probabilities": [round(p, 6) for p in inside],
                "replaced": [int(p > 0.5) for p in inside],
            }
        )
    return found


def _finite(directory: str, values: Any) -> Any:
    if not values.isfinite().all():
        raise UsageError(f"{directory} gives values that are not finite; take an earlier checkpoint")
    return values


@functools.cache
def _tokenizer(directory: str) -> Any:
    from transformers import AutoTokenizer

    return read(AutoTokenizer, directory)


@functools.cache
def _load(model_class: Any, directory: str) -> Any:
    """Load a model and insist that its file and its class agree on every parameter."""
    model, report = read(model_class, directory, output_loading_info=True, use_safetensors=True)
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise UsageError(f"{directory} does not fit {model_class.__name__}: {problems}; convert it again")
    return model.eval()


def read(a_class: Any, directory: str, **keys: Any) -> Any:
    """Load something of transformers' that may be from strangers: no code of theirs is run, no pickle read.

    UsageError if it cannot be loaded.
    """
    try:
        return a_class.from_pretrained(directory, trust_remote_code=False, **keys)
    except Exception as error:  # each library behind it has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{directory} cannot be loaded ({reason}); convert it again") from None


if __name__ == "__main__":
    process.serve(detect, replace, check)
