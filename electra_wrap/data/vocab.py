"""The vocabulary (from a hub, a file, or trained) and tokenizer files for transformers."""

import collections
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_wrap import files, hub
from electra_wrap.errors import UsageError
from electra_wrap.files import write_json, write_text

#: In the order of BERT's vocabularies. Upstream pads with id 0, whatever token that is.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

#: Longer words become [UNK]: the default of upstream's WordpieceTokenizer. transformers has 100.
MAX_WORD_CHARACTERS = 200

#: Characters that a trained vocabulary may have; a word with another one becomes [UNK].
MAX_ALPHABET = 1000

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
    """Return the tokens of vocab.txt, or of a tokenizer.json with a WordPiece model, in order.

    UsageError if it is damaged, or if upstream and transformers would number its tokens
    differently.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        if path.suffix == ".json":
            ids = json.loads(text)["model"]["vocab"]
            tokens = sorted(ids, key=ids.__getitem__)
            if [ids[token] for token in tokens] != list(range(len(ids))):
                raise ValueError("its numbers have gaps")
        else:
            tokens = text.removesuffix("\n").split("\n")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fix = "give a vocab.txt, or the tokenizer.json of a WordPiece model"
        raise UsageError(f"{path}: not a UTF-8 vocabulary: {error}; {fix}") from None
    if problem := _find_problem(tokens):
        raise UsageError(f"{path}: {problem}")
    return tokens


def _find_problem(tokens: list[str]) -> str | None:
    seen: set[str] = set()
    for line, token in enumerate(tokens, 1):
        if token != token.strip() or not token:
            return f"line {line} is {token!r}; remove white space and empty lines"
        if token in seen:
            return f"{token!r} is on line {line} again; keep one"
        seen.add(token)
    if missing := [token for token in SPECIAL_TOKENS if token not in seen]:
        return f"{missing[0]} is missing; add {' '.join(SPECIAL_TOKENS)}"
    if tokens[0] != "[PAD]":
        return "[PAD] is not on line 1; move it there: upstream pads with id 0"
    return None


def fetch(source: str, target: Path, sha256: str | None) -> None:
    """Copy the vocabulary at `source`, which `locate` finds, to `target`.

    UsageError if it is malformed, or if its SHA-256 is not `sha256`.
    """
    path = locate(source)
    digest = files.sha256(path)
    if sha256 not in (None, digest):
        raise UsageError(f"{source} has sha256 {digest}, the profile says {sha256}; correct one")
    _write(target, read(path))


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
    normalizer, pre_tokenizer = _text_steps(**normalization)
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
    alphabet = sorted(sorted(characters), key=lambda c: -characters[c])[:MAX_ALPHABET]
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
    are [UNK], and the share that is cut off: upstream cuts lines to `max_seq_length` - 2 tokens.
    """
    encode, unk_id = line_encoder(tokens, **normalization), tokens.index("[UNK]")
    words = total = unknown = cut = 0
    for line in filter(None, map(str.strip, sample(corpus, MEASURED_BYTES))):
        ids = encode(line)
        words += line.count(" ") + 1
        total += len(ids)
        unknown += ids.count(unk_id)
        cut += max(0, len(ids) - (max_seq_length - 2))
    if not total:
        return {}
    shares = {"unknown_share": unknown / total, "cut_share": cut / total}
    return {"tokens_per_word": total / words, **shares}


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
    tokenizer.normalizer, tokenizer.pre_tokenizer = _text_steps(**normalization)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _text_steps(*, lowercase: bool, strip_accents: bool) -> tuple[Any, Any]:
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
