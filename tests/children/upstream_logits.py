"""Write logits of both networks, by upstream's own graph, from a checkpoint for given inputs.

Arguments: CHECKOUT DIRECTORY INPUTS.npz OUTPUTS.npz HPARAMS. Both networks get the inputs as they
are, because every token is "masked" with itself, and its own sample.
"""

import json
import sys

import given  # isort: split

import configure_pretraining
import numpy as np
import run_pretraining

from electra_wrap.upstream import estimator

directory, source, target, hparams = sys.argv[1:]
tf = run_pretraining.tf
ids, mask, segments = np.load(source).values()
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
batch = {name: tf.constant(value) for name, value in given.install(features).items()}
config = configure_pretraining.PretrainingConfig("m", directory, **json.loads(hparams))
model = run_pretraining.PretrainingModel(config, batch, is_training=False)
# The discriminator's head returns probabilities. The logits are the input of their sigmoid.
logits = {
    "discriminator": estimator._watched["disc_probs"].op.inputs[0],
    "generator": model.mlm_output.logits,
}
with tf.Session() as session:
    tf.train.Saver().restore(session, f"{directory}/model.ckpt-3")
    np.savez(target, **session.run(logits))
