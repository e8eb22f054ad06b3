"""Tokenize with upstream's tokenizer: CHECKOUT VOCABULARY.

stdin has JSON [do_lower_case, strip_accents, texts, texts to split into words].
"""

import json
import sys

directory, vocabulary = sys.argv[1:]
sys.path.insert(0, directory)

from model import tokenization  # noqa: E402

from electra_wrap.upstream import records  # noqa: E402

lower, strip, texts, others = json.load(sys.stdin)
tokenizer = tokenization.FullTokenizer(vocabulary, do_lower_case=lower, strip_accents=strip)
tokens = [tokenizer.tokenize(text) for text in texts]
words = [tokenizer.basic_tokenizer.tokenize(text) for text in others]
ids = records.TokenIds(tokenizer)  # what the patched script uses
for text, expected in [
    *zip(texts, tokens, strict=True),
    *((t, tokenizer.tokenize(t)) for t in others),
]:
    assert ids(text) == tokenizer.convert_tokens_to_ids(expected), text
special = [tokenizer.vocab[f"[{name}]"] for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
print(
    json.dumps({"tokens": tokens, "words": words, "ids": list(map(ids, texts)), "special": special})
)
