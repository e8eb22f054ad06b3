"""Tokens that upstream's FullTokenizer gives texts."""

import json
import sys

directory, vocabulary, keys = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, directory)

from model import tokenization  # noqa: E402

texts = keys.pop("texts")
tokenizer = tokenization.FullTokenizer(vocabulary, **keys)
print(json.dumps([tokenizer.tokenize(text) for text in texts]))
