"""Write the logits of both networks, by upstream's own graph: CHECKOUT INPUTS.npz.

stdin has a JSON object of directories with a checkpoint and their hparams. Each gets logits.npz.
Both networks get the inputs as they are: every token is "masked" with itself, and its own sample.
"""

import json
import sys

import given  # isort: split

import configure_pretraining
import numpy as np
import run_pretraining

from electra_wrap.upstream import estimator

tf = run_pretraining.tf
ids, mask, segments = np.load(sys.argv[1]).values()
features = {
    "input_ids": ids,
    "input_mask": mask,
    "segment_ids": segments,
    "masked_lm_positions": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
    "masked_lm_ids": ids,
    "masked_lm_weights": np.ones(ids.shape),
    "masked": ids,
    "sampled": ids,
}
arrays = given.install(features)
for directory, hparams in json.load(sys.stdin).items():
    with tf.Graph().as_default(), tf.Session() as session:
        batch = {name: tf.constant(value) for name, value in arrays.items()}
        config = configure_pretraining.PretrainingConfig("m", directory, **hparams)
        model = run_pretraining.PretrainingModel(config, batch, is_training=False)
        # The discriminator's head returns probabilities. The logits are the input of their sigmoid.
        logits = {
            "discriminator": estimator._watched["disc_probs"].op.inputs[0],
            "generator": model.mlm_output.logits,
        }
        tf.train.Saver().restore(session, f"{directory}/model.ckpt-3")
        np.savez(f"{directory}/logits.npz", **session.run(logits))
