"""The vocabulary: from a hub, from a file, or trained."""

import collections
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from electra_wrap import files, hub
from electra_wrap.data.normalization import text_steps
from electra_wrap.data.tokenization import (
    MAX_WORD_CHARACTERS,
    SPECIAL_TOKENS,
    line_encoder,
    write_vocabulary,
)
from electra_wrap.errors import UsageError
from electra_wrap.progress import log, warn

#: A trained vocabulary has the most frequent characters of its text: this many, or more until they
#: make up this share of it. A word with another one becomes [UNK].
ALPHABET, COVERAGE = 1000, 0.9995

#: Share of the rows of released embeddings that may have no token: some pad them, say to 1,024.
SPARE_ROWS = 0.05

#: Shares of [UNK] from which to warn, and from which there is nothing to learn.
UNKNOWN_SHARE, UNKNOWN_SHARE_MAX = 0.01, 0.5

#: Bytes of text that `measure` reads.
MEASURED_BYTES = 8_000_000

#: Stretches of each shard that make up a sample.
STRETCHES = 100


def read(path: Path) -> list[str]:
    """Return the tokens of vocab.txt, or of a tokenizer.json with a WordPiece model, by their ids.

    They are those of upstream's load_vocab: each line is stripped, and of a repeated token the last
    line counts. The lines before it have a token that no text gives, so that all ids stay.
    UsageError if it is not a WordPiece vocabulary with BERT's special tokens.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        is_json = path.suffix == ".json"
        lines = _read_json(text) if is_json else text.removesuffix("\n").split("\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a vocabulary") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "give a vocab.txt, or the tokenizer.json of a WordPiece model"
        raise UsageError(f"{path}: not a UTF-8 vocabulary: {error}; {fix}") from None
    if text.startswith("\ufeff"):
        raise UsageError(f"{path} begins with a byte order mark; save it as UTF-8 without one")
    if text.startswith("{") and not is_json:
        raise UsageError(f"{path} is JSON; name it tokenizer.json")
    tokens = [line.strip() for line in lines]
    last = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in SPECIAL_TOKENS if token not in last]:
        raise UsageError(f"{path}: {missing[0]} is missing; give a vocabulary of a BERT or ELECTRA")
    if last["[PAD]"]:
        problem = f"{path}: [PAD] is not on line 1, and upstream pads with id 0"
        raise UsageError(f"{problem}; give a vocabulary that begins with it")
    return [t if last[t] == number else f"[line {number}]" for number, t in enumerate(tokens)]


def _read_json(text: str) -> list[str]:
    """Return the tokens of a tokenizer.json. ValueError unless it is WordPiece as upstream's."""
    model = json.loads(text)["model"]
    if model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(f"it is of the type {model['type']}")
    if (prefix := model.get("continuing_subword_prefix", "##")) != "##":
        raise ValueError(f"it marks the continuation of a word with {prefix!r}, not ##")
    ids: dict[str, int] = model["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(ids))):
        raise ValueError("its numbers have gaps")
    return tokens


def is_uncased(tokens: Iterable[str]) -> bool:
    """Whether a vocabulary has letters, but no upper-case ones: [A], or [unused1], do not count."""
    words = "".join(token for token in tokens if not token.startswith("["))
    return words != words.upper() and words == words.lower()


def fetch(source: str, target: Path, sha256: str | None) -> None:
    """Copy the vocabulary at `source`, which `locate` finds, to `target`.

    UsageError if it is malformed, or if its SHA-256 is not `sha256`.
    """
    path = locate(source)
    digest = files.sha256(path)
    if sha256 not in (None, digest):
        raise UsageError(f"{source} has sha256 {digest}, the profile says {sha256}; correct one")
    tokens = read(path)
    if path.suffix == ".json":
        write_vocabulary(target, tokens)
    else:
        with files.atomic(target) as temporary:
            shutil.copyfile(path, temporary)


def locate(source: str) -> Path:
    """Return the file, vocab.txt or tokenizer.json, of a path or of hf://NAME[@REVISION].

    UsageError if there is none, EnvironmentProblem if the hub cannot be reached.
    """
    if source.startswith(hub.SCHEME):
        path = hub.download(source, "vocab.txt") or hub.download(source, "tokenizer.json")
        if path is None:
            raise UsageError(f"{source} has no vocabulary; correct tokenizer.source")
        return path
    if not Path(source).is_file():
        raise UsageError(f"{source}: no such file; give a vocabulary, hf://NAME or train")
    return Path(source)


def refuse_other_size(source: object, tokens: list[str], rows: int) -> None:
    """Raise UsageError unless a vocabulary fits weights with embeddings of `rows` rows."""
    spare = rows - len(tokens)
    if not 0 <= spare <= SPARE_ROWS * rows:
        problem = f"{source} has {len(tokens):,} tokens, but the weights have {rows:,} rows"
        raise UsageError(f"{problem}; give the vocabulary that they were trained with")
    if spare:
        log(f"vocab: the weights have {spare:,} rows more than {source} has tokens")


def train(
    corpus: Path, target: Path, *, vocab_size: int, sample_bytes: int | None, **normalization: bool
) -> None:
    """Train a WordPiece vocabulary on the shards in `corpus`, or on a sample of them.

    It has at most `vocab_size` tokens. The same text gives the same vocabulary: left to itself, the
    trainer numbers the characters inside words in the order of a hash table and breaks ties
    between merges by these numbers, so it is given them as special tokens, in order.
    `normalization`, here and below, is that of `profile.Tokenizer`.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalizer, pre_tokenizer = text_steps(**normalization)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    lines = sample(corpus, sample_bytes)
    words = collections.Counter(word for line in lines for word in line.split())
    characters, inside = collections.Counter[str](), set[str]()
    for word, number in words.items():
        for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(word)):
            inside.update(piece[1:])
            for character in piece:
                characters[character] += number
    del words
    ranked = sorted(sorted(characters), key=lambda c: -characters[c])
    covered = itertools.accumulate(characters[c] for c in ranked)
    enough = sum(number < COVERAGE * characters.total() for number in covered) + 1
    needed = itertools.accumulate(1 + (c in inside) for c in ranked)  # tokens: c, and ##c
    room = sum(number <= vocab_size - len(SPECIAL_TOKENS) for number in needed)
    size = max(ALPHABET, min(enough, room))
    alphabet, rare = ranked[:size], ranked[size:]
    if rare:
        share = sum(characters[c] for c in rare) / characters.total()
        log(f"vocab: {len(rare):,} rare characters are left out, {share:.3%} of the text")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in sorted(inside & set(alphabet)))],
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(corpus, sample_bytes), trainer)
    ids = tokenizer.get_vocab()
    if len(ids) > vocab_size:
        problem = f"tokenizer.vocab_size = {vocab_size} is less than the {len(ids)} characters"
        raise UsageError(f"{problem} of the corpus; choose more")
    write_vocabulary(target, sorted(ids, key=ids.__getitem__))
    read(target)


def sample(corpus: Path, max_bytes: int | None) -> Iterator[str]:
    """Yield the lines of the shards in `corpus`.

    If they have more than about `max_bytes`, yield those of `STRETCHES` stretches at equal
    distances in each shard.
    """
    shards = sorted(corpus.glob("*.txt"))
    sizes = [path.stat().st_size for path in shards]
    share = 1.0 if max_bytes is None else min(1.0, max_bytes / max(1, sum(sizes)))
    for path, size in zip(shards, sizes, strict=True):
        with path.open("rb") as file:
            if share == 1:
                yield from map(bytes.decode, file)
                continue
            for start in range(0, size, max(1, size // STRETCHES)):
                file.seek(max(0, start - 1))
                if start:
                    file.readline()  # the rest of a line, or the end of the one before
                left = share * size / STRETCHES
                while left > 0 and (line := file.readline()):
                    left -= len(line)
                    yield line.decode()


def measure(
    corpus: Path, tokens: list[str], *, max_seq_length: int, **normalization: bool
) -> dict[str, float]:
    """Return how a vocabulary fits a sample of the shards in `corpus`; empty without text.

    That is the mean number of tokens in a word (what is between spaces), the share of tokens that
    are [UNK], the share of words that are too long for another token, and the share of tokens that
    is cut off: upstream cuts lines to `max_seq_length` - 2 tokens.
    """
    encode, unk_id = line_encoder(tokens, **normalization), tokens.index("[UNK]")
    words = total = unknown = cut = too_long = 0
    for line in filter(None, map(str.strip, sample(corpus, MEASURED_BYTES))):
        ids = encode(line)
        words += line.count(" ") + 1
        total += len(ids)
        unknown += ids.count(unk_id)
        cut += max(0, len(ids) - (max_seq_length - 2))
        if len(line) > MAX_WORD_CHARACTERS:
            too_long += sum(len(word) > MAX_WORD_CHARACTERS for word in line.split(" "))
    if not total:
        return {}
    return {
        "tokens_per_word": total / words,
        "unknown_share": unknown / total,
        "too_long_share": too_long / words,
        "cut_share": cut / total,
    }


def judge_unknown(tokens: list[str], fit: dict[str, float], *, lowercase: bool) -> None:
    """Warn of too many [UNK] in what `measure` returns, and say what they may come from.

    UsageError if they are half of the tokens.
    """
    if fit["unknown_share"] <= UNKNOWN_SHARE:
        return
    fix = "the vocabulary does not fit the text; give another one"
    if is_uncased(tokens) and not lowercase:
        fix = "the vocabulary has no upper-case letters; set tokenizer.lowercase = true"
    elif fit["too_long_share"] > UNKNOWN_SHARE:
        fix = f"words of more than {MAX_WORD_CHARACTERS} characters become one; divide them"
    problem = f"{fit['unknown_share']:.0%} of the text's tokens are [UNK]; {fix}"
    if fit["unknown_share"] > UNKNOWN_SHARE_MAX:
        raise UsageError(problem)
    warn(problem)
