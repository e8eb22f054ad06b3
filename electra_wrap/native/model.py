"""Both networks in one module, and the training objective.

The networks are transformers' Electra classes, combined as upstream's graph combines them: the
generator sees the masked batch, and the tokens that it samples for the masked positions go into the
discriminator's batch. Sums over a batch are divided by totals of the whole batch, of which this
process may see a part, so that the losses of all processes and micro-batches add up to upstream's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_wrap.native.encoder import compute_type, encode
from electra_wrap.profile import Network, Train

GENERATOR_WEIGHT, DISCRIMINATOR_WEIGHT = 1.0, 50.0

#: Most logits in memory at once: 128 to 256 MB on a CPU. On a GPU, one large product is faster.
MAX_LOGITS = {"cpu": 2**26, "cuda": 2**30}

#: Logits whose softmax is computed at once. On a CPU they fit into its cache.
MAX_CACHED = {"cpu": 2**22, "cuda": 2**30}

#: The vocabulary is padded to a multiple of this, because products with odd sizes are slow.
ALIGNMENT = 64

#: Tokens whose probabilities are added up together on the way to a sample.
BLOCK = 512


class Electra(nn.Module):
    """Generator and discriminator, which share the embeddings (token, position, type, LayerNorm).

    `configs` are the networks' config.json contents, as the profile gives them.
    """

    def __init__(self, configs: Mapping[Network, dict[str, Any]]) -> None:
        super().__init__()
        # The embedding of `pad_token_id` would get no gradient, but the generator may sample it.
        discriminator, generator = (
            ElectraConfig(**(configs[name] | {"pad_token_id": None}), attn_implementation="sdpa")
            for name in ("discriminator", "generator")
        )
        self.discriminator = ElectraForPreTraining(discriminator)
        self.generator = ElectraForMaskedLM(generator)
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
        self.generator.generator_lm_head.weight = self.token_embeddings
        self._initialize()

    @property
    def token_embeddings(self) -> Tensor:
        """The token embeddings, [vocab_size, embedding_size]."""
        return self.discriminator.electra.embeddings.word_embeddings.weight

    @torch.no_grad()
    def _initialize(self) -> None:
        """Set TensorFlow's initial values.

        They are normal, truncated at two standard deviations; Glorot where upstream names no
        initializer.
        """
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
        """Return the losses of a part of a batch, and what `metrics.Tally` counts.

        `batch` holds the arrays of `Batches` as tensors. `loss` is the weighted sum of `generator`
        and `discriminator`. [n, max_predictions]: `correct` and `sampled_correct`, whether the most
        likely and the sampled token are the original one, and `masked_losses`. [n, length]:
        `logits` of the discriminator, and `replaced`, where its tokens are not the original ones.
        """
        ids, positions = batch["ids"], batch["positions"]
        columns = torch.arange(ids.shape[1], device=ids.device)
        inside = columns < batch["sizes"][:, None]
        segments = (inside & (columns >= batch["first_segment_lengths"][:, None])).long()

        hidden = encode(self.generator.electra, batch["masked"], segments, inside)
        chosen = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))
        labels = ids.gather(1, positions)
        generator_loss, sampled, masked_losses, correct = masked_lm(
            self.generator.generator_predictions(chosen.flatten(0, 1)),
            self.token_embeddings,
            self.generator.generator_lm_head.bias,
            labels.flatten(),
            batch["weights"].flatten() / (batch["chosen"] + 1e-6),
            batch["draws"].flatten(),
        )
        sampled = sampled.view_as(positions)

        corrupted, replaced = corrupt(ids, positions, sampled)
        hidden = encode(self.discriminator.electra, corrupted, segments, inside)
        logits = self.discriminator.discriminator_predictions(hidden).float()
        losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        discriminator_loss = (losses * inside).sum() / (batch["tokens"] + 1e-6)
        return {
            "loss": GENERATOR_WEIGHT * generator_loss + DISCRIMINATOR_WEIGHT * discriminator_loss,
            "generator": generator_loss.detach(),
            "discriminator": discriminator_loss.detach(),
            "correct": correct.view_as(positions),
            "sampled_correct": sampled == labels,
            "masked_losses": masked_losses.view_as(positions),
            "logits": logits.detach(),
            "replaced": replaced,
        }


def corrupt(ids: Tensor, positions: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Put the sampled ids at their positions.

    Return the new ids and where they differ from `ids`, both [n, length]. As upstream's
    scatter_update: position 0 does not change, and a position that was chosen several times gets
    the mean of its samples' ids, rounded down.
    """
    counts = torch.zeros_like(ids).scatter_add_(1, positions, torch.ones_like(positions))
    sums = torch.zeros_like(ids).scatter_add_(1, positions, sampled)
    counts[:, 0] = 0
    corrupted = torch.where(counts > 0, sums // counts.clamp(min=1), ids)
    return corrupted, corrupted != ids


def masked_lm(
    hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor, weights: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the generator's loss and a sample of each row.

    hidden [n, embedding_size], embeddings [vocab_size, embedding_size], bias [vocab_size]; labels,
    weights and draws [n]. Returns the sum of the cross entropies of softmax(hidden @ embeddings.T +
    bias), multiplied by `weights`; the samples [n]; the cross entropies [n]; and whether the label
    is the most likely token [n].

    A sample is the inverse of the cumulative distribution at the draw, which is uniform in [0, 1).
    Upstream adds Gumbel noise and takes the largest: the same distribution, with a random number
    for each token of the vocabulary instead of one. Products have autocast's type, the rest is
    float32.
    """
    compute = compute_type(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _MaskedLM.apply(
            hidden.float(), embeddings, bias, labels, weights, draws, compute
        )
    return outputs


class _MaskedLM(torch.autograd.Function):
    """`masked_lm` with its gradients, which are computed in the forward pass.

    So the logits are needed only once, a chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        embeddings: Tensor,
        bias: Tensor,
        labels: Tensor,
        weights: Tensor,
        draws: Tensor,
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        vocab_size = len(embeddings)
        padding = -vocab_size % ALIGNMENT
        table = F.pad(embeddings.to(compute), (0, 0, 0, padding))
        bias = F.pad(bias, (0, padding), value=-torch.inf)
        d_hidden, d_table = torch.empty_like(hidden), torch.zeros_like(table)
        d_bias = torch.zeros_like(bias)
        loss, losses = hidden.new_zeros(()), torch.empty_like(weights)
        sampled, correct = torch.empty_like(labels), torch.empty_like(labels, dtype=torch.bool)
        kind = hidden.device.type
        rows = min(len(hidden), max(1, MAX_LOGITS[kind] // len(table)))
        cached_rows = max(1, MAX_CACHED[kind] // len(table))
        products = table.new_empty(rows, len(table))
        for i in range(0, len(hidden), rows):
            inputs = hidden[i : i + rows].to(compute)
            gradients = torch.mm(inputs, table.T, out=products[: len(inputs)])
            for j in range(0, len(inputs), cached_rows):
                chunk = slice(i + j, min(i + j + cached_rows, i + len(inputs)))
                within = slice(j, j + cached_rows)
                label, weight = labels[chunk, None], weights[chunk, None]
                logits = gradients[within].float().add_(bias)
                top = logits.amax(1, keepdim=True)
                label_logits = logits.gather(1, label)
                powers = logits.sub_(top).exp_()
                total, sampled[chunk] = _sum_and_sample(powers[:, :vocab_size], draws[chunk, None])
                cross_entropies = total.log() + top - label_logits
                loss += (weight * cross_entropies).sum()
                losses[chunk] = cross_entropies.squeeze(1)
                correct[chunk] = (label_logits == top).squeeze(1)
                if torch.compiler.is_compiling():  # a scatter would write a float32 matrix first
                    is_label = torch.arange(len(table), device=table.device) == label
                    gradient = powers * (weight / total) - torch.where(is_label, weight, 0.0)
                else:
                    gradient = powers.mul_(weight / total).scatter_add_(1, label, -weight)
                d_bias += gradient.sum(0)
                gradients[within] = gradient
            d_hidden[i : i + rows] = gradients @ table
            d_table.addmm_(gradients.T, inputs)
        d_table, d_bias = d_table[:vocab_size], d_bias[:vocab_size]
        ctx.save_for_backward(d_hidden, d_table, d_bias)
        ctx.mark_non_differentiable(sampled, losses, correct)
        return loss, sampled, losses, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_table, d_bias = ctx.saved_tensors
        return d_loss * d_hidden, d_loss * d_table.float(), d_loss * d_bias, None, None, None, None


def _sum_and_sample(powers: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of each row [n, 1], and a column of each, drawn in proportion to `powers` [n].

    Blocks of columns are added up first. Only the block that the draw falls into is read again.
    """
    columns = powers.shape[1]
    full = columns // BLOCK
    sums = powers[:, : full * BLOCK].unflatten(1, (full, BLOCK)).sum(2)
    sums = torch.cat([sums, powers[:, full * BLOCK :].sum(1, keepdim=True)], 1)
    cumulative = sums.cumsum(1)
    total = cumulative[:, -1:]
    block, rest = _search(cumulative, draws * total)
    candidates = block * BLOCK + torch.arange(BLOCK, device=powers.device)
    within = powers.gather(1, candidates.clamp(max=columns - 1)) * (candidates < columns)
    column, _ = _search(within.cumsum(1), rest)
    # Only NaN leads beyond the last column. Then the loss is reported, instead of a bad index.
    return total, (block * BLOCK + column).clamp(max=columns - 1).squeeze(1)


def _search(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column whose cumulative value is above `target`, and the remainder.

    The remainder is the distance of `target` from the column before. Rounding may put the target at
    the end or beyond; it then moves just before the end, so that a column of zero is never drawn.
    """
    end = cumulative[:, -1:]
    target = torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
    column = torch.searchsorted(cumulative, target, right=True)
    before = cumulative.gather(1, (column - 1).clamp(min=0))
    return column, target - torch.where(column > 0, before, torch.zeros_like(before))


def learning_rate(step: int, settings: Train) -> float:
    """Return the learning rate of a step, counted from 0, as model/optimization.py of the pin.

    Linear decay to zero, times linear warm-up.
    """
    decay = max(0.0, 1 - step / settings.steps)
    warmup = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * decay * warmup


def optimizer(network: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Return upstream's AdamWeightDecayOptimizer: Adam without bias correction, decoupled decay.

    Norms and biases do not decay. PyTorch's AdamW corrects by 1 - beta**step; after 100,000 steps
    that is exactly 1.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (others if "LayerNorm" in name or "bias" in name else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, fused=True)
    for parameter in network.parameters():
        adam.state[parameter] = {
            "step": torch.tensor(1e5, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam
