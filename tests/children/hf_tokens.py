"""Tokenize with AutoTokenizer and ElectraTokenizerFast: DIRECTORY [TEXT]…, or JSON on stdin."""

import json
import sys

from transformers import AutoTokenizer, ElectraTokenizerFast

texts = sys.argv[2:] or json.load(sys.stdin)
auto = AutoTokenizer.from_pretrained(sys.argv[1])
fast = ElectraTokenizerFast.from_pretrained(sys.argv[1])
answer = {"auto": [auto.tokenize(t) for t in texts], "fast": [fast.tokenize(t) for t in texts]}
print(json.dumps({**answer, "max_length": auto.model_max_length}))
