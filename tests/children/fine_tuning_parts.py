"""Print what parts of fine_tuning.py and compare.py return, for tests/test_examples.py."""

import json
import sys
from pathlib import Path

import numpy as np
import transformers

examples, out = map(Path, sys.argv[1:])
sys.path.insert(0, str(examples))
import compare  # noqa: E402
import fine_tuning  # noqa: E402

# Words with tags: two of three are right, and four are predicted.
gold = np.array([[0, 1, 2, -100], [1, 0, -100, -100]])
predicted = np.array([[0, 1, 1, 2], [1, 1, 0, 0]])
tagging = fine_tuning.score(predicted, gold, ["-", "1´", "2´"])
classification = fine_tuning.score(np.array([0, 1, 1]), np.array([0, 1, 0]), ["a", "b"])

words = ["el", "la", "perro", "gato", "casa", "come", "duerme", "ladra", "grande", "negro"]
vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "##s"]
(out / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
tokenizer = transformers.ElectraTokenizerFast.from_pretrained(out, do_lower_case=False)
config = transformers.ElectraConfig(
    vocab_size=len(vocab),
    embedding_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
)
model = transformers.ElectraForPreTraining(config)
model.save_pretrained(out / "model")
tokenizer.save_pretrained(out / "model")
rates = {
    round(group["lr"], 6): len(group["params"])
    for group in fine_tuning.optimizer(model, 1.0, 0.5).param_groups
}

# The last token of a word has its tag.
inputs = fine_tuning.encode([(["perros", "come"], ["n", "v"])], tokenizer, {"n": 7, "v": 8})

# Sentences with "perro" against those without; the tag of a word is its first letter.
rows = [f"{a} {b} {c}" for a in words for b in words for c in words]
text, tags = out / "text", out / "tags"
for task in (text, tags):
    task.mkdir()
for number, part in enumerate(("train", "dev", "test")):
    chosen = rows[number::3]
    lines = [f"{row}\t{'yes' if 'perro' in row else 'no'}\n" for row in chosen]
    (text / f"{part}.tsv").write_text("".join(lines), encoding="utf-8")
    lines = ["".join(f"{word}\t{word[0]}\n" for word in row.split()) + "\n" for row in chosen]
    (tags / f"{part}.tsv").write_text("".join(lines), encoding="utf-8")
scores = {
    task.name: fine_tuning.fine_tune(
        str(out / "model"),
        task,
        from_scratch=scratch,
        learning_rate=3e-3,
        steps=300,
        out=out / "tuned",
    )
    for task, scratch in ((text, False), (tags, True))
}
tuned = transformers.pipeline("token-classification", str(out / "tuned"), ignore_labels=[])
compared = {
    ("tags", "F1", "mine", 100): [50.0, 54.0],
    ("tags", "accuracy", "mine", 100): [97.0],
    ("tags", "F1", "mine", 1000): [90.0],
    ("tags", "F1", "random", 1000): [40.04],
}
compare.plot(compared, out / "plot.png")
print(
    json.dumps(
        {
            "tagging": tagging,
            "classification": classification,
            "rates": rates,
            "labels": inputs[0]["labels"],
            "scores": scores,
            "table": compare.table(compared),
            "entities": [token["entity"] for token in tuned("la casa grande")],
        }
    )
)
