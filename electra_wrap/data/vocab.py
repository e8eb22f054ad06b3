"""The vocabulary (from a hub, a file, or trained) and tokenizer files for transformers."""

import collections
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_wrap import files, hub
from electra_wrap.errors import UsageError
from electra_wrap.files import write_json, write_text
from electra_wrap.progress import log

#: In the order of BERT's vocabularies. Upstream pads with id 0, whatever token that is.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

#: Longer words become [UNK]: the default of upstream's WordpieceTokenizer. transformers has 100.
MAX_WORD_CHARACTERS = 200

#: A trained vocabulary has the most frequent characters of its text: this many, or more until they
#: make up this share of it. A word with another one becomes [UNK].
ALPHABET, COVERAGE = 1000, 0.9995

#: Share of the rows of released embeddings that may have no token: some pad them, say to 1,024.
SPARE_ROWS = 0.05

#: Bytes of text that `measure` reads.
MEASURED_BYTES = 8_000_000

#: Stretches of each shard that make up a sample.
STRETCHES = 100

#: Words in a WordCache, which take some 150 MB.
MAX_WORDS = 2**19


class WordCache(dict[str, tuple[int, ...]]):
    """The ids of words. Each word is tokenized once, as most words of a text are repeated.

    A full cache is emptied; frequent words soon return.
    """

    def __init__(self, tokenize: Callable[[str], Sequence[int]]) -> None:
        self._tokenize = tokenize

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= MAX_WORDS:
            self.clear()
        self[word] = ids = tuple(self._tokenize(word))
        return ids

    def ids(self, line: str) -> list[int]:
        """Return the ids of a line's words, which are separated by single spaces."""
        ids: list[int] = []
        for word in line.split(" "):
            ids += self[word]
        return ids


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
        _write(target, tokens)
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
    _write(target, sorted(ids, key=ids.__getitem__))
    read(target)


def _write(path: Path, tokens: Iterable[str]) -> None:
    write_text(path, "".join(f"{token}\n" for token in tokens))


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


def write_tokenizer(
    directory: Path, tokens: list[str], *, max_length: int, **normalization: bool
) -> None:
    """Write vocab.txt and tokenizer files with which transformers gives text the ids of training.

    The class is PreTrainedTokenizerFast, which uses tokenizer.json as it is. ElectraTokenizer would
    rebuild its tokenizer from vocab.txt, with at most 100 characters a word.
    """
    _write(directory / "vocab.txt", tokens)
    write_text(directory / "tokenizer.json", build_tokenizer(tokens, **normalization).to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": normalization["lowercase"],
        "strip_accents": normalization["strip_accents"],
        "tokenize_chinese_chars": True,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    config |= {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    write_json(directory / "tokenizer_config.json", config)


def line_encoder(tokens: list[str], **normalization: bool) -> Callable[[str], list[int]]:
    """Return a function from a line to its ids. Special tokens in it are plain text."""
    tokenizer = build_tokenizer(tokens, **normalization)
    tokenizer.encode_special_tokens = True
    return WordCache(lambda word: tokenizer.encode(word, add_special_tokens=False).ids).ids


def build_tokenizer(tokens: list[str], **normalization: bool) -> Any:
    """Return a `tokenizers.Tokenizer` that equals upstream's FullTokenizer.

    It adds [CLS] and [SEP] to a text or a pair of texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    ids = {token: number for number, token in enumerate(tokens)}
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = text_steps(**normalization)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return tokenizer


def text_steps(*, lowercase: bool, strip_accents: bool) -> tuple[Any, Any]:
    """Return the normalizer and the pre-tokenizer that equal upstream's BasicTokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    normalizer: Any = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )
    if lowercase:
        # Python, and so upstream, lowercases a word's last sigma to its final form. BertNormalizer
        # does not. Marks and apostrophes beside it do not count (Unicode 3.13, Final_Sigma). A
        # lookbehind has a fixed length, so there is one for each number of them.
        cased, ignored = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{M}\p{Cf}'’.:·]"
        before = "|".join(f"(?<={cased}{ignored * number})" for number in range(5))
        final_sigma = Regex(f"(?:{before})Σ(?!{ignored}*{cased})")
        replace = normalizers.Replace(final_sigma, "ς")
        normalizer = normalizers.Sequence([replace, normalizer])
    return normalizer, pre_tokenizers.BertPreTokenizer()
