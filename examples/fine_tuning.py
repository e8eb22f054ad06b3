"""Fine-tune an ELECTRA model for classification or tagging, with transformers' Trainer.

    python examples/fine_tuning.py MODEL TASK

MODEL is a directory or a name on a hub. TASK is a directory with `train.tsv`, `dev.tsv` and
`test.tsv`. A line of a classification task is a text, a tab and its label. A line of a tagging task
is a word, a tab and its tag, and a blank line ends a sentence.

The recipe is that of google-research/electra (`configure_finetuning.py`, and appendix B of the
paper, arXiv:2003.10555): batches of 32; a learning rate of 3e-4 for small models, 1e-4 for base and
5e-5 for large ones, with warm-up over a tenth of the steps and linear decay after it; and for each
layer 0.8 of the rate of the layer above (large: 0.9). Upstream trains 3 epochs, and 10 on small
tasks. Here it is 3 epochs, but at least 1,000 steps. Upstream tags the first token of a word; here
it is the last one, because in many languages the ending of a word says more.

The scores need scikit-learn: `pip install scikit-learn`.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.metrics
import torch
import transformers

#: Pairs of a text and its label, or of a list of words and their tags.
Examples = list[tuple[Any, Any]]


def read(path: Path) -> Examples:
    text = path.read_text("utf-8").strip("\n")
    if "\n\n" not in text:
        return [tuple(line.rsplit("\t", 1)) for line in text.split("\n")]
    sentences = [[line.split("\t") for line in block.split("\n")] for block in text.split("\n\n")]
    return [tuple(map(list, zip(*sentence, strict=True))) for sentence in sentences]


def encode(examples: Examples, tokenizer: Any, label_ids: dict[str, int]) -> list[dict[str, Any]]:
    """Return the inputs of the model. A word's last token has its tag; -100 is ignored."""
    inputs = []
    for text, label in examples:
        tagging = isinstance(text, list)
        encoding = tokenizer(text, is_split_into_words=tagging, truncation=True, max_length=512)
        if tagging:
            words = encoding.word_ids()
            labels = [
                -100 if word is None or word == following else label_ids[label[word]]
                for word, following in zip(words, [*words[1:], None], strict=True)
            ]
        else:
            labels = label_ids[label]
        inputs.append({**encoding, "labels": labels})
    return inputs


def score(predicted: np.ndarray, gold: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Return accuracy and F1 (scikit-learn).

    F1 is macro-averaged for classification, and for tagging micro-averaged over the words that have
    another tag than `-` or `O`, which mark nothing.
    """
    used = gold != -100
    counted = [i for i, label in enumerate(labels) if label not in ("-", "O")]
    f1 = sklearn.metrics.f1_score(
        gold[used], predicted[used], labels=counted, average="macro" if gold.ndim == 1 else "micro"
    )
    return {"accuracy": float((predicted == gold)[used].mean()), "f1": float(f1)}


def optimizer(model: Any, learning_rate: float, layer_decay: float) -> torch.optim.Optimizer:
    """Return AdamW; each layer has `layer_decay` times the learning rate of the one above it."""
    top = model.config.num_hidden_layers + 2
    groups: dict[tuple[int, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        depth = int(layer[1]) + 1 if layer else 0 if "embeddings" in name else top
        weight_decay = 0.0 if parameter.ndim == 1 else 0.01  # not for biases and LayerNorm
        groups.setdefault((depth, weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": learning_rate * layer_decay ** (top - depth),
                "weight_decay": weight_decay,
            }
            for (depth, weight_decay), parameters in groups.items()
        ],
        eps=1e-6,
        fused=True,
    )


def fine_tune(
    name: str,
    task: Path,
    *,
    examples: int | None = None,
    from_scratch: bool = False,
    learning_rate: float | None = None,
    layer_decay: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Train on the first examples; save the model in `out`; return the scores of dev and test."""
    transformers.set_seed(seed)
    parts = {part: read(task / f"{part}.tsv") for part in ("train", "dev", "test")}
    tagging = isinstance(parts["train"][0][0], list)
    used = {
        y for part in parts.values() for _, label in part for y in (label if tagging else [label])
    }
    labels = sorted(used)
    ids = {label: i for i, label in enumerate(labels)}
    parts["train"] = parts["train"][:examples]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    inputs = {part: encode(pairs, tokenizer, ids) for part, pairs in parts.items()}

    kind = "Token" if tagging else "Sequence"
    model_class = getattr(transformers, f"AutoModelFor{kind}Classification")
    collator = getattr(
        transformers, "DataCollatorForTokenClassification" if tagging else "DataCollatorWithPadding"
    )
    config = transformers.AutoConfig.from_pretrained(
        name, label2id=ids, id2label=dict(enumerate(labels))
    )
    if from_scratch:
        model = model_class.from_config(config)
    else:
        model = model_class.from_pretrained(name, config=config)
    width = config.hidden_size
    rate = learning_rate or (3e-4 if width < 768 else 1e-4 if width < 1024 else 5e-5)
    decay = layer_decay or (1.0 if from_scratch else 0.8 if width < 1024 else 0.9)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(out or tempfile.gettempdir()),
            max_steps=steps or max(1000, 3 * len(inputs["train"]) // 32),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",  # less padding
            warmup_steps=0.1,
            max_grad_norm=1.0,
            seed=seed,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not sys.stderr.isatty(),
            report_to="none",
        ),
        collator(tokenizer),
        inputs["train"],
        optimizers=(optimizer(model, rate, decay), None),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )
    trainer.train()
    if out:
        trainer.save_model(out)
        tokenizer.save_pretrained(out)
    scores = {}
    for part in ("dev", "test"):
        predicted, gold, _ = trainer.predict(inputs[part])
        scores[part] = score(predicted, gold, labels)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("task", type=Path)
    parser.add_argument("--examples", type=int, help="train on so many (default: all)")
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--layer-decay", type=float, help="default from scratch: 1, no decay")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="save the model in this directory")
    arguments = vars(parser.parse_args())
    try:
        scores = fine_tune(arguments.pop("model"), arguments.pop("task"), **arguments)
    except OSError as error:  # no such model or task
        sys.exit(f"error: {str(error).splitlines()[0]}")
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
