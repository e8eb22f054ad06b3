"""Tokenize with upstream's tokenizer.

Reads lines of JSON [do_lower_case, strip_accents, texts, words only]; prints the tokens of each.
"""

import json
import sys

directory, vocabulary = sys.argv[1:]
sys.path.insert(0, directory)

from model import tokenization  # noqa: E402

from electra_wrap.upstream import records  # noqa: E402

for line in sys.stdin:
    lower, strip, texts, words = json.loads(line)
    tokenizer = tokenization.FullTokenizer(vocabulary, do_lower_case=lower, strip_accents=strip)
    tokenize = tokenizer.basic_tokenizer.tokenize if words else tokenizer.tokenize
    ids = records.TokenIds(tokenizer)  # what the patched script uses
    for text in texts:
        assert ids(text) == tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), text
    print(json.dumps([tokenize(text) for text in texts]), flush=True)
