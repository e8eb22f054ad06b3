"""Evaluate a checkpoint with run_pretraining.py's `do_eval` on given batches, masks and samples.

Arguments: CHECKOUT DATA_DIR MODEL_NAME HPARAMS BATCHES [CHECKPOINT]; prints JSON. Only upstream's
random functions and its reader of records are replaced, so it also runs with the unpatched pin on
TensorFlow 1.15.
"""

import json
import os
import sys
from pathlib import Path

import given  # isort: split

import configure_pretraining
import numpy as np
import run_pretraining

data_dir, model_name, hparams, batches = sys.argv[1:5]
os.environ["ELECTRA_WRAP_RUNTIME"] = json.dumps({"seed": 0, "checkpoint": "".join(sys.argv[5:])})
arrays = given.install(given.features(dict(np.load(batches))))
steps, size, _ = arrays["input_ids"].shape
values = json.loads(Path(hparams).read_text())
values.update(do_train=False, do_eval=True, eval_batch_size=size, num_eval_steps=steps)
config = configure_pretraining.PretrainingConfig(model_name, data_dir, **values)
results = run_pretraining.train_or_eval(config)
print(json.dumps({name: float(value) for name, value in results.items()}))
