"""Released tokenizers, which must divide text as upstream's does: a model knows its own tokens."""

import itertools
import unicodedata
from pathlib import Path

from electra_wrap import hub, subprocesses
from electra_wrap.data import vocab
from electra_wrap.data.normalization import text_steps
from electra_wrap.data.tokenization import SPECIAL_TOKENS, line_encoder
from electra_wrap.errors import UsageError

#: Bytes of text that are tokenized twice.
COMPARED_BYTES = 500_000

#: Longer words are [UNK] for released tokenizers, but not for upstream's scripts.
COMPARED_WORD_CHARACTERS = 100


def find_tokenizer(source: str) -> Path | None:
    """Return the released tokenizer, a tokenizer.json or a directory, that has a vocabulary.

    `source` is that of `vocab.locate`. None if the vocabulary stands alone.
    """
    names, vocabulary = ("tokenizer.json", "tokenizer_config.json"), vocab.locate(source)
    if source.startswith(hub.SCHEME):
        for name in (*names, "config.json"):
            hub.download(source, name)  # to the vocabulary's directory
    elif vocabulary.suffix == ".json":
        return vocabulary
    directory = vocabulary.parent
    return directory if any((directory / name).is_file() for name in names) else None


def refuse_difference(source: str, corpus: Path, log: Path, **normalization: bool) -> None:
    """Raise UsageError unless the tokenizer of a vocabulary divides text as upstream's does.

    `corpus` is a directory of shards, of which a sample is tokenized. Lines with what no released
    tokenizer handles as upstream's do not count: words of more than 100 characters, the final
    sigma, characters that are newer than Python's Unicode, and [MASK] as text.
    """
    released = find_tokenizer(source)
    if released is None:
        return
    sample = map(str.strip, vocab.sample(corpus, COMPARED_BYTES))
    lines = [line for line in sample if not any(map(line.__contains__, SPECIAL_TOKENS))]
    job = {"path": str(released), "texts": lines}
    found = subprocesses.call("electra_wrap.inference", "read_tokenizer", job, log=log)
    for key, value in normalization.items():
        if found[key] != value:
            problem = f"tokenizer.{key} = {value}, but the tokenizer of {source} has {found[key]}"
            raise UsageError(f"{problem}; set tokenizer.{key}, or give another vocabulary")
    tokens = vocab.read(vocab.locate(source))
    encode = line_encoder(tokens, **normalization)
    normalizer, pre_tokenizer = text_steps(**normalization)
    for line, ids in zip(lines, found["ids"], strict=True):
        own = encode(line)
        if own == ids or any(c == "Σ" or unicodedata.category(c) == "Cn" for c in line):
            continue
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line))
        if all(len(word) <= COMPARED_WORD_CHARACTERS for word, _ in words):
            pairs = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(own, ids, strict=False)
            )
            start = len(list(pairs))
            theirs, ours = (_show(tokens, part[start : start + 8]) for part in (ids, own))
            problem = f"{source} divides {line!r:.60} into {theirs} where upstream's has {ours}"
            raise UsageError(f"{problem}; give another vocabulary, or weights of another model")


def _show(tokens: list[str], ids: list[int]) -> str:
    """Return tokens as text. A released tokenizer may have added some to its vocabulary."""
    return repr(" ".join(tokens[n] if n < len(tokens) else f"[{n}]" for n in ids))
