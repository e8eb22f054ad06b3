"""Tokenize with AutoTokenizer and ElectraTokenizerFast: DIRECTORY [TEXT]…, or JSON on stdin.

`saved` is of the tokenizer that AutoTokenizer saved, and `saved_class` its class.
"""

import json
import sys
import tempfile

from transformers import AutoTokenizer, ElectraTokenizerFast

texts = sys.argv[2:] or json.load(sys.stdin)
auto = AutoTokenizer.from_pretrained(sys.argv[1])
with tempfile.TemporaryDirectory() as directory:
    auto.save_pretrained(directory)
    saved = AutoTokenizer.from_pretrained(directory)
    with open(f"{directory}/tokenizer_config.json", encoding="utf-8") as file:  # noqa: PTH123
        saved_class = json.load(file)["tokenizer_class"]
fast = ElectraTokenizerFast.from_pretrained(sys.argv[1])
tokenizers = {"auto": auto, "saved": saved, "fast": fast}
answer = {name: [t.tokenize(text) for text in texts] for name, t in tokenizers.items()}
print(json.dumps({**answer, "saved_class": saved_class, "max_length": auto.model_max_length}))
