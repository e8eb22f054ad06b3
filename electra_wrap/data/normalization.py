"""Words as upstream's BasicTokenizer makes them, by the tokenizers library."""

import collections
import functools
import itertools
import unicodedata
from typing import Any

#: Cased characters other than letters: ª, º, Roman numerals, letters in circles and squares.
_CASED = (
    "\u00aa\u00ba\u2160-\u217f\u24b6-\u24e9"
    "\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189"
)


def text_steps(*, lowercase: bool, strip_accents: bool) -> tuple[Any, Any]:
    """Return the normalizer and the pre-tokenizer that equal upstream's BasicTokenizer.

    Upstream drops and splits characters by the Unicode version of its Python. The library has
    others, so the regular expressions list the characters of this Python.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    ranges = _ranges()
    marks = ranges["Mn"] if strip_accents else ""
    dropped = marks + "".join(ranges[category] for category in ("Cc", "Cf", "Cn", "Co"))
    steps = [normalizers.Replace(Regex(rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd{dropped}]"), "")]
    if lowercase:
        # Python, and so upstream, lowercases a word's last sigma to its final form. BertNormalizer
        # does not. Marks, apostrophes, … beside it do not count (Unicode 3.13, Final_Sigma).
        cased, ignored = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}{_CASED}]", r"\p{Case_Ignorable}*"
        final_sigma = Regex(f"(?<={cased}{ignored})Σ(?!{ignored}{cased})")
        steps.append(normalizers.Replace(final_sigma, "ς"))
    bert = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
    )
    # Upstream takes all ASCII symbols for punctuation. Of the rarer CJK, BertNormalizer leaves out
    # a range, and that of transformers.js everything.
    words = "\U00020000-\U0002ceaf\U0002f800-\U0002fa1f" + "".join(
        r for c, r in ranges.items() if c[0] == "P"
    )
    split = pre_tokenizers.Split(Regex(rf"[!-/:-@\[-`{{-~{words}]"), "isolated")
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    return normalizers.Sequence([*steps, bert]), pre_tokenizer


@functools.cache
def _ranges() -> dict[str, str]:
    """Return the characters of each category, without ASCII, as ranges in a regular expression."""
    ranges = collections.defaultdict[str, str](str)
    points = (*range(0x80, 0xD800), *range(0xE000, 0x110000))  # without surrogates
    for category, run in itertools.groupby(map(chr, points), unicodedata.category):
        characters = "".join(run)
        ranges[category] += f"{characters[0]}-{characters[-1]}"
    return ranges
