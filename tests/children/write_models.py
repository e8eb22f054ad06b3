"""Write a discriminator and a generator with random weights, for the vocabulary on stdin.

`other` gets the same discriminator and a generator whose vocabulary has one more token.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_wrap.data import tokenization

directory, length = Path(sys.argv[1]), int(sys.argv[2])
vocabulary = sys.stdin.read().split()
torch.manual_seed(0)
for name, model_class, tokens in (
    ("discriminator", ElectraForPreTraining, vocabulary),
    ("generator", ElectraForMaskedLM, vocabulary),
    ("other/generator", ElectraForMaskedLM, [*vocabulary, "more"]),
):
    shape = {"embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 64}
    config = ElectraConfig(vocab_size=len(tokens), max_position_embeddings=length, **shape)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that small and large probabilities occur
            torch.nn.init.normal_(parameter, std=0.3)
    if name == "discriminator":  # about half of its predictions are "replaced"
        with torch.no_grad():
            median = model.eval()(torch.randint(len(tokens), (8, length))).logits.median()
            model.discriminator_predictions.dense_prediction.bias -= median
    model.save_pretrained(directory / name)
    keys = {"lowercase": False, "strip_accents": False, "max_length": length}
    tokenization.write_tokenizer(directory / name, tokens, **keys)
shutil.copytree(directory / "discriminator", directory / "other" / "discriminator")
