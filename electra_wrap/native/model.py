"""Both networks in one module, and the objective: transformers' Electra classes put together as upstream's graph is.

The generator sees the masked batch, and what it proposes for the masked tokens goes into the discriminator's batch.
Sums over a batch are divided by totals of the whole batch, of which this process may see a part: what the processes
and micro-batches give adds up to upstream's loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_wrap.profile import NETWORKS, Network

GENERATOR_WEIGHT, DISCRIMINATOR_WEIGHT = 1.0, 50.0

#: Most logits that are in memory at once: 2**25 (128 MB) on a CPU, 2**30 on a GPU, where one large product is faster.
MOST_LOGITS = {"cpu": 2**25, "cuda": 2**30}

#: Words that are summed together on the way to a sample.
BLOCK = 512


class Electra(nn.Module):
    """Generator and discriminator with the embeddings (word, position, type, their norm) in common.

    `configs` are transformers' config.json contents, as the profile gives them.
    """

    def __init__(self, configs: Mapping[Network, dict[str, Any]]) -> None:
        super().__init__()
        # Without `pad_token_id`, whose embedding would have no gradient: the generator may well propose [PAD].
        shapes = {
            n: ElectraConfig(**{**configs[n], "pad_token_id": None}, attn_implementation="sdpa") for n in NETWORKS
        }
        self.discriminator = ElectraForPreTraining(shapes["discriminator"])
        self.generator = ElectraForMaskedLM(shapes["generator"])
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.generator_lm_head.weight = self.words
        self._initialise()

    @property
    def words(self) -> Tensor:
        """The word embeddings, [vocab_size, embedding_size]."""
        return self.discriminator.electra.embeddings.word_embeddings.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        """TensorFlow's initial values: normal, cut at two deviations; Glorot where upstream names no initializer."""
        for name, parameter in self.named_parameters():
            if "LayerNorm.weight" in name:
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("embeddings_project.weight", "dense_prediction.weight")):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this part's losses, `loss` (their weighted sum), `generator` and `discriminator`, for a batch.

        `batch` is what `Batches` gives, as tensors. What `metrics.Tally` wants of both networks comes with them,
        under its names.
        """
        ids = batch["ids"]
        places = torch.arange(ids.shape[1], device=ids.device)
        inside = places < batch["sizes"][:, None]
        segments = (inside & (places >= batch["firsts"][:, None])).long()
        attended = inside[:, None, None, :].expand(-1, 1, ids.shape[1], -1)

        hidden = self.generator.electra(batch["masked"], attended, segments).last_hidden_state
        chosen = hidden.gather(1, batch["positions"][:, :, None].expand(-1, -1, hidden.shape[2])).flatten(0, 1)
        head = self.generator.generator_predictions(chosen)
        weights = batch["weights"].flatten() / (batch["chosen"] + 1e-6)
        labels = ids.gather(1, batch["positions"]).flatten()
        bias = self.generator.generator_lm_head.bias
        generator, *of_each = masked_lm(head, self.words, bias, labels, weights, batch["draws"].flatten())
        sampled, masked_losses, right = (value.view_as(batch["positions"]) for value in of_each)

        corrupted, replaced = corrupt(ids, batch["positions"], sampled)
        hidden = self.discriminator.electra(corrupted, attended, segments).last_hidden_state
        logits = self.discriminator.discriminator_predictions(hidden).float()
        losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        discriminator = (losses * inside).sum() / (batch["tokens"] + 1e-6)
        return {
            "loss": GENERATOR_WEIGHT * generator + DISCRIMINATOR_WEIGHT * discriminator,
            "generator": generator.detach(),
            "discriminator": discriminator.detach(),
            "right": right,
            "sampled": sampled == ids.gather(1, batch["positions"]),
            "masked_losses": masked_losses,
            "logits": logits.detach(),
            "replaced": replaced,
        }


def corrupt(ids: Tensor, positions: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Put the sampled ids at their positions; return the new ids and where they differ from `ids`, [n, length] both.

    As upstream's scatter_update: position 0 is left alone, and a position that was chosen several times gets the
    mean of its samples' ids, rounded down.
    """
    times = torch.zeros_like(ids).scatter_add_(1, positions, torch.ones_like(positions))
    sums = torch.zeros_like(ids).scatter_add_(1, positions, sampled)
    times[:, 0] = 0
    corrupted = torch.where(times > 0, sums // times.clamp(min=1), ids)
    return corrupted, corrupted != ids


def masked_lm(
    hidden: Tensor, words: Tensor, bias: Tensor, labels: Tensor, weights: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weighted sum of the cross entropies of softmax(hidden @ words.T + bias), and of each row a sample.

    hidden [n, embedding_size], words [vocab_size, embedding_size], bias [vocab_size]; labels, weights and draws [n].
    The samples, [n], are the inverse of the distribution function at `draws`, which are uniform in [0, 1). Upstream
    adds Gumbel noise and takes the largest: the same distribution, for a random number per word and row instead of
    one per row. With each row's sample come its cross entropy and whether its label is the likeliest word. Products
    are in autocast's type; the rest is in float32.
    """
    kind = hidden.device.type
    compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = _MaskedLM.apply(hidden.float(), words, bias, labels, weights, draws, compute)
    return found


class _MaskedLM(torch.autograd.Function):
    """`masked_lm` with its gradients computed on the way: a chunk of logits exists once, and is then overwritten."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        words: Tensor,
        bias: Tensor,
        labels: Tensor,
        weights: Tensor,
        draws: Tensor,
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = words.to(compute)
        d_hidden, d_words, d_bias = torch.empty_like(hidden), torch.zeros_like(table), torch.zeros_like(bias)
        loss, sampled = hidden.new_zeros(()), torch.empty_like(labels)
        losses, right = torch.empty_like(weights), torch.empty_like(labels, dtype=torch.bool)
        rows = min(len(hidden), max(1, MOST_LOGITS[hidden.device.type] // len(words)))
        products = table.new_empty(rows, len(words))
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            inputs, label, weight = hidden[part].to(compute), labels[part, None], weights[part, None]
            logits = torch.mm(inputs, table.T, out=products[: len(inputs)]).float().add_(bias)
            top = logits.amax(1, keepdim=True)
            of_label = logits.gather(1, label)
            powers = logits.sub_(top).exp_()
            total, sampled[part] = _total_and_sample(powers, draws[part, None])
            loss_of_each = total.log() + top - of_label
            loss += (weight * loss_of_each).sum()
            losses[part], right[part] = loss_of_each.squeeze(1), (of_label == top).squeeze(1)
            if torch.compiler.is_compiling():  # one pass; a scatter would write the whole matrix in float32 first
                of_words = torch.arange(len(words), device=words.device) == label
                gradient = powers * (weight / total) - torch.where(of_words, weight, 0.0)
            else:
                gradient = powers.mul_(weight / total).scatter_add_(1, label, -weight)
            d_bias += gradient.sum(0)
            gradient = gradient.to(compute)
            d_hidden[part] = gradient @ table
            d_words.addmm_(gradient.T, inputs)
        ctx.save_for_backward(d_hidden, d_words, d_bias)
        ctx.mark_non_differentiable(sampled, losses, right)
        return loss, sampled, losses, right

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_words, d_bias = ctx.saved_tensors
        return upstream * d_hidden, upstream * d_words.float(), upstream * d_bias, None, None, None, None


def _total_and_sample(powers: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of each row of `powers`, [n, 1], and a column of each drawn in proportion to them, [n].

    Blocks of columns are summed first, and only the block in which the draw falls is looked at again.
    """
    whole = powers.shape[1] // BLOCK
    blocks = powers[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(2)
    blocks = torch.cat([blocks, powers[:, whole * BLOCK :].sum(1, keepdim=True)], 1)
    cumulated = blocks.cumsum(1)
    total = cumulated[:, -1:]
    block, rest = _place(cumulated, draws * total)
    columns = block * BLOCK + torch.arange(BLOCK, device=powers.device)
    within = powers.gather(1, columns.clamp(max=powers.shape[1] - 1)) * (columns < powers.shape[1])
    within = within.cumsum(1)
    place, _ = _place(within, rest)
    # Only NaN leads beyond the last column; the loss will say so, where an index would only fail.
    return total, (block * BLOCK + place).clamp(max=powers.shape[1] - 1).squeeze(1)


def _place(cumulated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column whose cumulated value is above `target`, and how far `target` is above the one before.

    Rounding may put the target at the end or beyond; it is then just before it, so that a column of zero never wins.
    """
    end = cumulated[:, -1:]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    place = torch.searchsorted(cumulated, target, right=True)
    before = cumulated.gather(1, (place - 1).clamp(min=0))
    return place, target - torch.where(place > 0, before, torch.zeros_like(before))


def learning_rate(step: int, rate: float, steps: int, warmup: int) -> float:
    """The rate of a step, from 0: linear decay to zero times linear warm-up, as model/optimization.py of the pin."""
    return rate * max(0.0, 1 - step / steps) * (min(1.0, step / warmup) if warmup else 1.0)


def optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Upstream's AdamWeightDecayOptimizer: Adam without bias correction, decoupled decay but for norms and biases.

    PyTorch's AdamW corrects by 1 - beta**step; a step of 100,000 from the start makes that exactly 1.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if "LayerNorm" in name or "bias" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)
    for parameter in model.parameters():
        adam.state[parameter] = {
            "step": torch.tensor(1e5, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam
