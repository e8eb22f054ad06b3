"""The vocabulary (from a hub, a file, or trained) and transformers' tokenizer files around it."""

from __future__ import annotations

import collections
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from electra_wrap.errors import EnvironmentLacks, UsageError
from electra_wrap.rundir import write_json, write_text

#: In the order of BERT's vocabularies. Upstream pads with id 0, whatever token that is.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

#: Longer words become [UNK]: WordpieceTokenizer's default in the pin. transformers' default is 100.
MAX_WORD_CHARACTERS = 200

#: Characters that a trained vocabulary has of its own; rarer ones make a word [UNK].
MAX_ALPHABET = 1000

#: Text on which a vocabulary's fit is measured; from how many places of each shard a sample comes.
MEASURED_BYTES, STRETCHES = 8_000_000, 100

#: Words that are remembered; some 150 MB.
MAX_WORDS = 2**19


class Words(dict[str, tuple[int, ...]]):
    """The ids of words, computed once each: text repeats its words, so nearly all of them are looked up.

    When there are too many, all are forgotten; the frequent ones are soon back.
    """

    def __init__(self, compute: Callable[[str], Sequence[int]]) -> None:
        self._compute = compute

    def __missing__(self, word: str) -> tuple[int, ...]:
        if len(self) >= MAX_WORDS:
            self.clear()
        self[word] = ids = tuple(self._compute(word))
        return ids

    def ids(self, line: str) -> list[int]:
        """The ids of a line's words, which are what is between its spaces."""
        found: list[int] = []
        for word in line.split(" "):
            found += self[word]
        return found


def read(path: Path) -> list[str]:
    """Return the tokens of vocab.txt, in order. UsageError if upstream or transformers would read it otherwise."""
    try:
        tokens = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable UTF-8 vocabulary: {error}; give a vocab.txt") from None
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens, 1):
        if token != token.strip() or not token:
            raise UsageError(f"{path}: line {number} is {token!r}; a token has no spaces around it and is not empty")
        if token in seen:
            raise UsageError(f"{path}: {token!r} is on lines {seen[token]} and {number}; keep one")
        seen[token] = number
    for token in SPECIAL_TOKENS:
        if token not in seen:
            raise UsageError(f"{path}: {token} is missing; a vocabulary for ELECTRA needs {' '.join(SPECIAL_TOKENS)}")
    if seen["[PAD]"] != 1:
        raise UsageError(f"{path}: [PAD] is on line {seen['[PAD]']}; upstream pads with id 0, so it must be first")
    return tokens


def fetch(source: str, target: Path, sha256: str | None) -> None:
    """Copy the vocabulary at `source`, `hf://REPOSITORY[@REVISION]` or a path, to `target`.

    UsageError if there is none, if it is malformed, or if its digest is not `sha256`; EnvironmentLacks if the
    hub cannot be reached.
    """
    path = _download(source.removeprefix("hf://")) if source.startswith("hf://") else Path(source)
    if not path.is_file():
        raise UsageError(no_such_file(source))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in (None, digest):
        raise UsageError(f"tokenizer.source = {source!r} has sha256 {digest}, the profile says {sha256}; correct one")
    read(path)
    write_text(target, path.read_bytes().decode("utf-8"))


def no_such_file(source: str) -> str:
    """The message for a `tokenizer.source` that is not there."""
    return f"tokenizer.source = {source!r}: no such file; give a vocab.txt, hf://REPOSITORY or train"


def _download(repository: str) -> Path:
    # Imported here: it costs a third of a second, and only this needs it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it retries for half a minute, and tells each time
    name, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(name, "vocab.txt", revision=revision or None))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UsageError(f"hf://{repository}: {_first_sentence(error)}; correct tokenizer.source") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise EnvironmentLacks(
            f"hf://{repository} cannot be fetched ({_first_sentence(error)}); "
            "with a local copy: --set tokenizer.source=PATH/vocab.txt"
        ) from None


def _first_sentence(error: Exception) -> str:
    """The first sentence of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")


def train(
    corpus: Path, target: Path, *, vocab_size: int, lowercase: bool, strip_accents: bool, sample_bytes: int | None
) -> None:
    """Train a WordPiece vocabulary of at most `vocab_size` tokens on the shards in `corpus`, or on a sample of them.

    The same text gives the same vocabulary. Left to itself, the trainer numbers the characters inside words in
    the order of a hash table, and breaks ties between merges by those numbers; so they are numbered for it.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer = _text_rules(lowercase, strip_accents)
    words: collections.Counter[str] = collections.Counter()
    for line in sample(corpus, sample_bytes):
        words.update(line.split())
    characters: collections.Counter[str] = collections.Counter()
    inside: set[str] = set()
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
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(tokens) > vocab_size:
        raise UsageError(
            f"tokenizer.vocab_size = {vocab_size} is less than the corpus has characters ({len(tokens)}); choose more"
        )
    write_text(target, "".join(f"{token}\n" for token, _ in tokens))
    read(target)


def sample(corpus: Path, most: int | None) -> Iterator[str]:
    """Yield the lines of the shards in `corpus`; of more than about `most` bytes, only stretches from everywhere."""
    shards = sorted(corpus.glob("*.txt"))
    size = sum(path.stat().st_size for path in shards)
    share = 1.0 if most is None else min(1.0, most / max(1, size))
    for path in shards:
        with path.open("rb") as file:
            if share == 1:
                yield from map(bytes.decode, file)
                continue
            whole = path.stat().st_size
            for begin in range(0, whole, max(1, whole // STRETCHES)):
                file.seek(max(0, begin - 1))
                if begin:
                    file.readline()  # of which the beginning is missing, or the end of the line before
                left = share * whole / STRETCHES
                while left > 0 and (line := file.readline()):
                    left -= len(line)
                    yield line.decode()


def measure(
    corpus: Path, tokens: list[str], *, lowercase: bool, strip_accents: bool, max_seq_length: int
) -> dict[str, float]:
    """Return how a vocabulary fits a sample of the shards in `corpus`.

    Tokens for each word (what is between spaces), and what share of the tokens is [UNK] and is beyond what an example
    has of one line: upstream cuts lines of more than `max_seq_length` - 2 tokens. Empty if there is no text.
    """
    tokenizer = build_tokenizer(tokens, lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.encode_special_tokens = True
    known = Words(lambda word: tokenizer.encode(word, add_special_tokens=False).ids)
    unknown = tokens.index("[UNK]")
    words = found = unknowns = cut = 0
    for line in sample(corpus, MEASURED_BYTES):
        if text := line.strip():
            ids = known.ids(text)
            words += text.count(" ") + 1
            found += len(ids)
            unknowns += ids.count(unknown)
            cut += max(0, len(ids) - (max_seq_length - 2))
    if not found:
        return {}
    return {"tokens_per_word": found / words, "unknown_share": unknowns / found, "cut_share": cut / found}


def write_tokenizer(
    directory: Path, tokens: list[str], *, lowercase: bool, strip_accents: bool, max_length: int
) -> None:
    """Write vocab.txt and transformers' tokenizer files, such that text becomes the ids it had in training.

    The class is PreTrainedTokenizerFast, which takes tokenizer.json as it is. ElectraTokenizer would rebuild its
    own from vocab.txt, with 100 characters a word.
    """
    tokenizer = build_tokenizer(tokens, lowercase=lowercase, strip_accents=strip_accents)
    write_text(directory / "vocab.txt", "".join(f"{token}\n" for token in tokens))
    write_text(directory / "tokenizer.json", tokenizer.to_str())
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "do_lower_case": lowercase,
            "strip_accents": strip_accents,
            "tokenize_chinese_chars": True,
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **special,
        },
    )


def build_tokenizer(tokens: list[str], *, lowercase: bool, strip_accents: bool) -> Any:
    """Return the `tokenizers.Tokenizer` that equals upstream's FullTokenizer, with [CLS] … [SEP] around a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _text_rules(lowercase, strip_accents)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _text_rules(lowercase: bool, strip_accents: bool) -> tuple[Any, Any]:
    from tokenizers import Regex, normalizers, pre_tokenizers

    normalizer: Any = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )
    if lowercase:
        # Python, and so upstream, lowercases a word's last sigma to its final form; BertNormalizer does not. Marks
        # and apostrophes beside it do not count (Unicode 3.13, Final_Sigma); a lookbehind needs their number.
        cased, ignored = r"[\p{Lu}\p{Ll}\p{Lt}]", r"[\p{M}\p{Cf}'’.:·]"
        before = "|".join(f"(?<={cased}{ignored * number})" for number in range(5))
        final_sigma = Regex(f"(?:{before})Σ(?!{ignored}*{cased})")
        normalizer = normalizers.Sequence([normalizers.Replace(final_sigma, "ς"), normalizer])
    return normalizer, pre_tokenizers.BertPreTokenizer()
