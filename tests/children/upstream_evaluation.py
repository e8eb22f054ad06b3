"""Evaluate a checkpoint with run_pretraining.py's `do_eval` on given batches, masks and samples.

Arguments: CHECKOUT DATA_DIR MODEL_NAME HPARAMS BATCHES [CHECKPOINT]; prints JSON. Only upstream's
random functions and its reader of records are replaced, so it also runs with the unpatched pin on
TensorFlow 1.15.
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
        **dict(
            json.load(file),
            do_train=False,
            do_eval=True,
            eval_batch_size=size,
            num_eval_steps=steps,
        ),
    )
features = {}
inputs_of = pretrain_data.features_to_inputs


def features_to_inputs(batch):
    if "masked" in batch:
        features.update(batch)
    return inputs_of(batch)


def read_arrays(params):
    return tf.data.Dataset.from_tensor_slices(arrays)


pretrain_data.features_to_inputs = features_to_inputs
pretrain_data.get_input_fn = lambda config, is_training: read_arrays
pretrain_helpers.mask = lambda config, inputs, *rest: pretrain_data.get_updated_inputs(
    inputs, input_ids=features["masked"]
)
pretrain_helpers.sample_from_softmax = lambda logits, disallow=None: tf.one_hot(
    features["sampled"], config.vocab_size, dtype=tf.float32
)
results = run_pretraining.train_or_eval(config)
print(json.dumps({name: float(value) for name, value in results.items()}))
