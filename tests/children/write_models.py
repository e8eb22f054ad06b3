"""Write a discriminator and a generator with random weights to a directory, for the vocabulary on stdin.

With another pair beside it, in `other`, whose generator has a word more.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_wrap import vocab

directory, length = Path(sys.argv[1]), int(sys.argv[2])
tokens = sys.stdin.read().split()
torch.manual_seed(0)
for name, model_class, words in (
    ("discriminator", ElectraForPreTraining, tokens),
    ("generator", ElectraForMaskedLM, tokens),
    ("other/generator", ElectraForMaskedLM, [*tokens, "more"]),
):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ElectraConfig(vocab_size=len(words), embedding_size=32, max_position_embeddings=length, **shape)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # such that probabilities are of all sizes
            torch.nn.init.normal_(parameter, std=0.3)
    if name == "discriminator":  # which finds half of the tokens replaced
        with torch.no_grad():
            typical = model.eval()(torch.randint(len(words), (8, length))).logits.median()
            model.discriminator_predictions.dense_prediction.bias -= typical
    model.save_pretrained(directory / name)
    vocab.write_tokenizer(directory / name, words, lowercase=False, strip_accents=False, max_length=length)
shutil.copytree(directory / "discriminator", directory / "other" / "discriminator")
