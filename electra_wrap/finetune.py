"""Fine-tuning: a discriminator learns labels from a text file, and is asked for those of another.

The training runs as a module, because it imports PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from electra_wrap import check, process
from electra_wrap.errors import Interrupted, StageFailed, UsageError
from electra_wrap.progress import Meter, say
from electra_wrap.rundir import partial

#: Lines or sentences of a training step.
BATCH = 16

#: Steps and epochs of a training are as many as this at least, unless it is told: few lines have to be seen often.
STEPS, EPOCHS = 600, 3

#: The learning rate times the hidden size: 3e-4 for small and 1e-4 for base (Clark et al. 2020, appendix B).
RATE_TIMES_HIDDEN = 3e-4 * 256

#: What PyTorch's loss leaves out.
IGNORED = -100


@dataclasses.dataclass
class Item:
    """A line (one text with its label) or a sentence (words with their tags), and where in the file each is."""

    words: list[str]
    labels: list[str]
    lines: list[int]


def finetune(job: Mapping[str, Any]) -> dict[str, Any]:
    """Call `train` in a process of its own and show its progress."""
    descriptor, name = tempfile.mkstemp(prefix="electra_wrap-finetune-", suffix=".log")
    os.close(descriptor)
    result: dict[str, Any] = {}
    meter: Meter | None = None

    def read(line: str) -> None:
        nonlocal meter
        if line.startswith('{"step"'):
            said = json.loads(line)
            if meter is None:  # what came before the first step says nothing of its speed
                meter = stack.enter_context(Meter("finetune", said["of"], "steps", done=said["step"]))
            else:
                meter.update(said["step"], f"loss {said['loss']:.3f}" if said["loss"] else "")
        elif line.startswith('{"result"'):
            result.update(json.loads(line)["result"])

    # Little data needs no second GPU, and the Trainer would give each one a batch.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = process.environment({**check.ENVIRONMENT, "CUDA_VISIBLE_DEVICES": gpu})
    argv = [sys.executable, "-s", "-m", "electra_wrap.finetune", json.dumps(job)]
    try:
        with contextlib.ExitStack() as stack:
            process.run(argv, cwd=Path("/"), env=environment, log=Path(name), on_line=read)
    except StageFailed:  # whose message names the log
        raise
    except BaseException as error:
        Path(name).unlink()
        if isinstance(error, Interrupted):
            raise Interrupted("interrupted; the same command begins again") from None
        raise
    Path(name).unlink()
    if cut := result["cut"]:
        say(f"finetune: {cut:,} words of the test are not scored: beyond the model's length, or not in its tokens")
    if seen := result["seen"]:
        say(f"finetune: {seen:,} of {result['tested']:,} texts of the test are in the training file, too")
    return result


def read(path: Path, task: str) -> list[Item]:
    """Read labelled text: lines `label<TAB>text`, or lines `token<TAB>tag` and an empty line after each sentence.

    UsageError, with the line's number, for what is neither.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a text file") from None
    items = [Item([], [], [])]
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError:
            raise UsageError(f"{path}, line {number}: not UTF-8; convert the file") from None
        if not text.strip():
            items.append(Item([], [], []))
            continue
        left, _, right = (part.strip() for part in text.partition("\t"))
        label, words = (left, right) if task == "classification" else (right, left)
        if not label or not words or (task == "tagging" and "\t" in label):
            form = "label<TAB>text" if task == "classification" else "token<TAB>tag"
            raise UsageError(f"{path}, line {number}: not {form}; correct it, or choose another --task")
        if task == "classification":
            items.append(Item([], [], []))
        items[-1].words.append(words)
        items[-1].labels.append(label)
        items[-1].lines.append(number)
    if items := [item for item in items if item.words]:
        return items
    raise UsageError(f"{path} is empty; give a text file with labels")


def label_numbers(training: Sequence[Item], test: Sequence[Item], files: tuple[str, str]) -> dict[str, int]:
    """Number the training's labels. UsageError if there is but one, or if the test has another."""
    labels = sorted({label for item in training for label in item.labels})
    if len(labels) == 1:
        raise UsageError(f"{files[0]} has one label only, {labels[0]!r}; there is nothing to learn from it")
    for item in test:
        for label, line in zip(item.labels, item.lines, strict=True):
            if label not in labels:
                raise UsageError(f"{files[1]}, line {line}: the label {label!r} is not in {files[0]}; correct one")
    return {label: number for number, label in enumerate(labels)}


def encode(tokenizer: Any, items: Sequence[Item], numbers: Mapping[str, int], length: int, task: str) -> list[Any]:
    """Return the model's inputs for each item: at most `length` ids, and a label, or one at a word's first token."""
    encoded = []
    for item in items:
        one = tokenizer(item.words, is_split_into_words=True, truncation=True, max_length=length)
        labels = [numbers[label] for label in item.labels]
        if task == "classification":
            encoded.append({**one, "labels": labels[0]})
            continue
        pairs = itertools.pairwise([None, *one.word_ids()])
        firsts = [IGNORED if word is None or word == before else labels[word] for before, word in pairs]
        encoded.append({**one, "labels": firsts})
    return encoded


def scores(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return accuracy, and F1 as the mean over the labels that are in either."""
    shares = [
        2 * ((truth == label) & (found == label)).sum() / ((truth == label).sum() + (found == label).sum())
        for label in np.union1d(truth, found)
    ]
    return {"accuracy": float((truth == found).mean()), "macro_f1": float(np.mean(shares))}


def train(
    task: str,
    model: str,
    training: str,
    test: str,
    *,
    epochs: int | None,
    learning_rate: float | None,
    seed: int,
    from_scratch: bool,
    out: str | None,
) -> dict[str, Any]:
    """Fine-tune the discriminator in `model` on the file `training`, score it on `test`, save it as `out`.

    `from_scratch`: its shape and tokenizer, with random weights. UsageError for wrong files, weights that do not fit
    and an `out` that exists; then nothing is trained. StageFailed if the training diverged; then nothing is saved.
    """
    if out and Path(out).exists():
        raise UsageError(f"{out} exists; choose another --out")
    items, tested = read(Path(training), task), read(Path(test), task)
    numbers = label_numbers(items, tested, (training, test))

    import transformers  # after what can fail without it

    class Progress(transformers.TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **keys: Any) -> None:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            print(json.dumps({"step": state.global_step, "of": state.max_steps, "loss": loss}), flush=True)

    transformers.set_seed(seed)
    tokenizer = check.read(transformers.AutoTokenizer, model)
    network = _network(transformers, task, model, numbers, from_scratch)
    length = min(tokenizer.model_max_length, network.config.max_position_embeddings)
    learning_rate = learning_rate or RATE_TIMES_HIDDEN / network.config.hidden_size
    epochs = epochs or max(EPOCHS, math.ceil(STEPS / math.ceil(len(items) / BATCH)))
    sets = [encode(tokenizer, some, numbers, length, task) for some in (items, tested)]
    collator = {
        "classification": transformers.DataCollatorWithPadding,
        "tagging": transformers.DataCollatorForTokenClassification,
    }[task](tokenizer)
    with contextlib.ExitStack() as stack:
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(partial(Path(out)))
            directory.mkdir()
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = transformers.TrainingArguments(
            output_dir=str(directory),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            warmup_steps=0.1,  # a share
            weight_decay=0.01,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            seed=seed,
            logging_steps=10,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        )
        trainer = transformers.Trainer(
            network, arguments, data_collator=collator, train_dataset=sets[0], callbacks=[Progress()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        logits, truth, _ = trainer.predict(sets[1])
        scored = truth != IGNORED
        if not np.isfinite(logits[scored]).all():
            raise StageFailed("the model gives values that are not finite; choose a lower --learning-rate")
        if out:
            network.save_pretrained(directory)
            check.read(transformers.AutoTokenizer, model).save_pretrained(directory)  # one that was not told to cut
    often = Counter(label for item in items for label in item.labels).most_common(1)[0][0]
    texts = {tuple(item.words) for item in items}
    return {
        **scores(truth[scored], logits.argmax(-1)[scored]),
        "most_frequent": often,
        "most_frequent_accuracy": float((truth[scored] == numbers[often]).mean()),
        "labels": list(numbers),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "trained": len(items),
        "tested": len(tested),
        "scored": int(scored.sum()),
        "cut": sum(len(item.labels) for item in tested) - int(scored.sum()),
        "seen": sum(tuple(item.words) in texts for item in tested),
    }


def _network(transformers: Any, task: str, model: str, numbers: Mapping[str, int], from_scratch: bool) -> Any:
    """A network for the task: the body of the discriminator, or one like it with random weights, and a new head."""
    model_class = {
        "classification": transformers.ElectraForSequenceClassification,
        "tagging": transformers.ElectraForTokenClassification,
    }[task]
    names = {"label2id": dict(numbers), "id2label": {number: label for label, number in numbers.items()}}
    if from_scratch:
        return model_class(check.read(transformers.ElectraConfig, model, **names))
    network, report = check.read(
        model_class, model, **names, dtype="float32", use_safetensors=True, output_loading_info=True
    )
    heads = ("classifier.", "discriminator_predictions.")
    if wrong := sorted(str(name) for found in report.values() for name in found if not str(name).startswith(heads)):
        raise UsageError(f"{model} does not fit {model_class.__name__}: {', '.join(wrong[:3])}; convert it again")
    return network


if __name__ == "__main__":
    with process.telling():
        print(json.dumps({"result": train(**json.loads(sys.argv[1]))}), flush=True)
