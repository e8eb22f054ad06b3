"""Tokenize texts with AutoTokenizer and ElectraTokenizerFast."""

import json
import sys

from transformers import AutoTokenizer, ElectraTokenizerFast

directory, *texts = sys.argv[1:]
auto = AutoTokenizer.from_pretrained(directory)
fast = ElectraTokenizerFast.from_pretrained(directory)
answer = {"auto": [auto.tokenize(t) for t in texts], "fast": [fast.tokenize(t) for t in texts]}
print(json.dumps({**answer, "max_length": auto.model_max_length}))
