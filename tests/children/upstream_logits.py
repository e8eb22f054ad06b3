"""Write logits of both networks, by upstream's own graph, from a checkpoint for given inputs."""

import json
import os
import sys
import types

checkout, directory, source, target, hparams = sys.argv[1:]
sys.path.insert(0, checkout)
os.environ["ELECTRA_WRAP_RUNTIME"] = '{"seed": 0}'

import configure_pretraining  # noqa: E402
import numpy as np  # noqa: E402
import run_pretraining  # noqa: E402
from model import modeling  # noqa: E402, F401
from pretrain import pretrain_data  # noqa: E402
from util import training_utils  # noqa: E402

tf = run_pretraining.tf
config = configure_pretraining.PretrainingConfig("m", directory, **json.loads(hparams))
shape = training_utils.get_bert_config(config)
generator_shape = run_pretraining.get_generator_config(config, shape)
ids, mask, types_ = (tf.constant(value, tf.int32) for value in np.load(source).values())
inputs = pretrain_data.Inputs(ids, mask, types_, None, None, None)

untied = config.untied_generator_embeddings
generator = run_pretraining.build_transformer(
    config,
    inputs,
    False,
    generator_shape,
    embedding_size=None if untied else config.embedding_size,
    untied_embeddings=untied,
    scope="generator",
)
with tf.variable_scope("generator_predictions"):
    generator_logits = run_pretraining.get_token_logits(
        generator.get_sequence_output(), generator.get_embedding_table(), shape
    )
discriminator = run_pretraining.build_transformer(
    config, inputs, False, shape, embedding_size=config.embedding_size
)
model = types.SimpleNamespace(_config=config, _bert_config=shape)
output = run_pretraining.PretrainingModel._get_discriminator_output(
    model, inputs, discriminator, tf.zeros_like(ids)
)

with tf.Session() as session:
    tf.train.Saver().restore(session, f"{directory}/model.ckpt-3")
    # The head returns probabilities. The logits are the input of their sigmoid.
    discriminator_logits = output.probs.op.inputs[0]
    logits = session.run({"discriminator": discriminator_logits, "generator": generator_logits})
np.savez(target, **logits)
