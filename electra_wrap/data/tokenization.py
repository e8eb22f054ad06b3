"""Tokenizers that equal upstream's, and their files for transformers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from electra_wrap.data.normalization import text_steps
from electra_wrap.files import write_json, write_text

#: In the order of BERT's vocabularies. Upstream pads with id 0, whatever token that is.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

#: Longer words become [UNK]: the default of upstream's WordpieceTokenizer. transformers has 100.
MAX_WORD_CHARACTERS = 200

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


def write_vocabulary(path: Path, tokens: Iterable[str]) -> None:
    """Write vocab.txt."""
    write_text(path, "".join(f"{token}\n" for token in tokens))


def write_tokenizer(
    directory: Path, tokens: list[str], *, max_length: int, **normalization: bool
) -> None:
    """Write vocab.txt and tokenizer files with which transformers gives text the ids of training.

    Of BERT's tokenizer classes, which transformers 4 and 5 both have, ConvBertTokenizer alone uses
    tokenizer.json as it is. The others rebuild their tokenizer in transformers 5, with at most 100
    characters a word. What transformers 5 saves of PreTrainedTokenizerFast, 4 cannot load.
    """
    write_vocabulary(directory / "vocab.txt", tokens)
    write_text(directory / "tokenizer.json", build_tokenizer(tokens, **normalization).to_str())
    config = {
        "tokenizer_class": "ConvBertTokenizer",
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
