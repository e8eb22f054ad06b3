"""Write a discriminator of one layer with random weights: DIRECTORY VOCAB_SIZE."""

import sys

import torch
from transformers import ElectraConfig, ElectraForPreTraining

directory, vocab_size = sys.argv[1], int(sys.argv[2])
torch.manual_seed(5)
config = ElectraConfig(
    vocab_size=vocab_size,
    embedding_size=16,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
model = ElectraForPreTraining(config)
with torch.no_grad():
    for value in model.parameters():
        value.add_(torch.randn_like(value) / 20)  # biases and norms are not at their initial values
model.save_pretrained(directory)
