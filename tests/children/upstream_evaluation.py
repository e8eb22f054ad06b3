"""Evaluate a checkpoint as run_pretraining.py's `do_eval` does, on given batches, masks and samples; print JSON.

CHECKOUT DATA_DIR MODEL_NAME HPARAMS BATCHES [CHECKPOINT]. It runs with the pin as it is on TensorFlow 1.15, too: what
is put in place of upstream's functions is where numbers would be random, and the reader of records.
"""

import json
import os
import sys
from pathlib import Path

checkout, data_dir, model_name, hparams, batches = sys.argv[1:6]
sys.path.insert(0, checkout)
os.environ["ELECTRA_WRAP_RUNTIME"] = json.dumps({"seed": 0, "checkpoint": "".join(sys.argv[6:])})

import configure_pretraining  # noqa: E402
import given  # noqa: E402
import numpy as np  # noqa: E402
import run_pretraining  # noqa: E402
from pretrain import pretrain_data, pretrain_helpers  # noqa: E402

tf = run_pretraining.tf
recorded = dict(np.load(batches))
steps, size, _ = recorded["ids"].shape
arrays = given.features(recorded)
with Path(hparams).open() as file:
    config = configure_pretraining.PretrainingConfig(
        model_name,
        data_dir,
        **dict(json.load(file), do_train=False, do_eval=True, eval_batch_size=size, num_eval_steps=steps),
    )
features = {}
inputs_of = pretrain_data.features_to_inputs


def features_to_inputs(found):
    if "masked" in found:
        features.update(found)
    return inputs_of(found)


pretrain_data.features_to_inputs = features_to_inputs
pretrain_data.get_input_fn = lambda config, is_training: lambda params: tf.data.Dataset.from_tensor_slices(arrays)
pretrain_helpers.mask = lambda config, inputs, *rest: pretrain_data.get_updated_inputs(
    inputs, input_ids=features["masked"]
)
pretrain_helpers.sample_from_softmax = lambda logits, disallow=None: tf.one_hot(
    features["sampled"], config.vocab_size, dtype=tf.float32
)
found = run_pretraining.train_or_eval(config)
print(json.dumps({name: float(value) for name, value in found.items()}))
