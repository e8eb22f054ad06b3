"""Parts of the native model by themselves, as JSON: initial values, samples, learning rates."""

import json

import torch
from torch.nn import functional as F

from electra_wrap import profiles
from electra_wrap.native import encoder, model
from electra_wrap.profile import NETWORKS, Train

profile = profiles.load("spanish-tiny")
torch.manual_seed(0)
electra = model.Electra({name: profile.hf_config(name, 4000) for name in NETWORKS})
initial = {
    f"{name}.{key}": [p.std(correction=0).item(), p.abs().max().item(), list(p.shape)]
    for name in NETWORKS
    for key, p in getattr(electra, name).named_parameters()
}

# 20,000 samples of one distribution over 1,300 words, which take two blocks and a part of one.
n, words = 20_000, 1300
embeddings, hidden, bias = torch.randn(words, 8), torch.randn(1, 8), torch.randn(words)
bias[[0, 7, -1]] = -200.0  # words with a probability of zero
labels, weights = torch.randint(words, (n,)), torch.rand(n)
draws = (torch.arange(n) + 0.5) / n
rows = hidden.repeat(n, 1)
for tensor in (rows, embeddings, bias):
    tensor.requires_grad_()
loss, sampled, _, _ = model.masked_lm(rows, embeddings, bias, labels, weights, draws)
gradients = torch.autograd.grad(2.5 * loss, (rows, embeddings, bias))
logits = rows @ embeddings.T + bias
plain_loss = (weights * F.cross_entropy(logits, labels, reduction="none")).sum()
plain_gradients = torch.autograd.grad(2.5 * plain_loss, (rows, embeddings, bias))
expected = n * logits[0].softmax(0)
ends = torch.tensor([0.0, 1e-7, 0.5, 1.0])  # rounded to float32, a number below 1 may be 1
_, at_ends, _, _ = model.masked_lm(rows[:4], embeddings, bias, labels[:4], weights[:4], ends)

# Four dropouts of ones.
size = 2**20 + 3
dropped = []
for _ in range(4):
    ones = torch.ones(size, requires_grad=True)
    output = encoder.FastDropout.apply(ones, 0.1, None)
    output.sum().backward()
    assert ones.grad is not None and torch.equal(ones.grad, output.detach())
    dropped.append(output.detach() == 0)
rounded = encoder.FastDropout.apply(torch.ones(size, dtype=torch.bfloat16), 0.1, None)
masks = torch.stack(dropped).double()
state = torch.get_rng_state()
first = encoder.FastDropout.apply(torch.ones(99), 0.1, None)
torch.set_rng_state(state)

settings = Train(learning_rate=1.0, steps=10, warmup_steps=4)
answer = {
    "initial": initial,
    "times": torch.bincount(sampled, minlength=words).tolist(),
    "expected": expected.tolist(),
    "ends": at_ends.tolist(),
    "loss": [loss.item(), plain_loss.item()],
    "gradients": [
        ((ours - plain).abs().max() / plain.abs().max()).item()
        for ours, plain in zip(gradients, plain_gradients, strict=True)
    ],
    "dropout": {
        "rates": masks.mean(1).tolist(),
        "kept": sorted(set(output.tolist())),
        "bfloat16": [(rounded == 0).double().mean().item(), rounded.max().item()],
        # Of masks, of neighbours, and of the four values from one 64-bit number.
        "correlations": torch.corrcoef(masks).fill_diagonal_(0).flatten().tolist()
        + [
            torch.corrcoef(torch.stack([m[:-i], m[i:]]))[0, 1].item()
            for m in masks
            for i in (1, 2, 3, 4)
        ],
        "restored": torch.equal(first, encoder.FastDropout.apply(torch.ones(99), 0.1, None)),
    },
    "rates": [model.learning_rate(step, settings) for step in range(11)],
}
print(json.dumps(answer))
