"""Pieces of the native model by themselves, as JSON: initial values, samples, learning rates."""

import json
import sys

import torch
from torch.nn import functional as F

from electra_wrap.native import model
from electra_wrap.profile import NETWORKS, Profile

profile = Profile.load("spanish-tiny")
torch.manual_seed(0)
network = model.Electra({name: profile.hf_config(name, 4000) for name in NETWORKS})
initial = {
    f"{name}.{key}": [p.std(correction=0).item(), p.abs().max().item(), list(p.shape)]
    for name in NETWORKS
    for key, p in getattr(network, name).named_parameters()
}

# Twenty thousand samples of one distribution over 1,300 words, which is two blocks and a part.
n, words = 20_000, 1300
table, hidden = torch.randn(words, 8), torch.randn(1, 8)
bias = torch.randn(words)
bias[[0, 7, -1]] = -200.0  # words that never come
labels = torch.randint(words, (n,))
weights = torch.rand(n)
draws = (torch.arange(n) + 0.5) / n
rows = hidden.repeat(n, 1).requires_grad_()
table.requires_grad_()
bias.requires_grad_()
loss, sampled, of_each, right = model.masked_lm(rows, table, bias, labels, weights, draws)
ours = torch.autograd.grad(2.5 * loss, (rows, table, bias))
logits = rows @ table.T + bias
plain = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
theirs = torch.autograd.grad(2.5 * plain, (rows, table, bias))
expected = n * logits[0].softmax(0)
ends = torch.tensor([0.0, 1e-7, 0.5, 1.0])  # in float32, a number below 1 may be 1
_, at_the_ends, *_ = model.masked_lm(rows[:4], table, bias, labels[:4], weights[:4], ends)
print(
    json.dumps(
        {
            "initial": initial,
            "times": torch.bincount(sampled, minlength=words).tolist(),
            "expected": expected.tolist(),
            "ends": at_the_ends.tolist(),
            "loss": [loss.item(), plain.item()],
            "gradients": [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)],
            "rates": [model.learning_rate(step, *map(float, sys.argv[1:3]), int(sys.argv[3])) for step in range(11)],
        }
    )
)
