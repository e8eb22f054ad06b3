"""The tags that a fine-tuned model gives the words of sentences (JSON on stdin): those of each word's first token."""

import json
import sys

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1])
found = []
for words in json.load(sys.stdin):
    batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        tags = [model.config.id2label[number] for number in model(**batch).logits[0].argmax(-1).tolist()]
    firsts = [batch.word_ids().index(number) for number in range(len(words))]
    found.append([tags[first] for first in firsts])
print(json.dumps(found))
