"""The encoder of transformers' ElectraModel, computed fast: hidden states of a batch.

The parameters, their names and the results are transformers'. In training on a CPU, three things
differ: dropout draws its masks 16 bits at a time, one matrix product gives queries, keys and
values, and hidden states between the layers have the type of the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraModel


def encode(electra: ElectraModel, ids: Tensor, segments: Tensor, inside: Tensor) -> Tensor:
    """Return the last hidden states, [n, length, hidden_size], in the type of matrix products.

    ids, segments and inside are [n, length]; `inside` is False for padding, which is not attended.
    """
    dtype = compute_type(ids.device)
    embeddings = electra.embeddings
    hidden = (
        embeddings.word_embeddings(ids)
        + embeddings.position_embeddings.weight[: ids.shape[1]]
        + embeddings.token_type_embeddings(segments)
    )
    hidden = _dropout(embeddings.LayerNorm(hidden).to(dtype), embeddings.dropout)
    if hasattr(electra, "embeddings_project"):  # unless both sizes are the same
        hidden = electra.embeddings_project(hidden)
    padding = torch.zeros(inside.shape, dtype=dtype, device=ids.device)
    padding = padding.masked_fill_(~inside, torch.finfo(dtype).min)[:, None, None, :]
    for layer in electra.encoder.layer:
        attended = _attend(layer.attention.self, hidden, padding)
        hidden = _add_and_normalize(layer.attention.output, attended, hidden)
        hidden = _add_and_normalize(layer.output, layer.intermediate(hidden), hidden)
    return hidden


def compute_type(device: torch.device) -> torch.dtype:
    """Return the type of matrix products: autocast's, if it is enabled."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def _attend(attention: Any, hidden: Tensor, padding: Tensor) -> Tensor:
    """Return the attention of a layer, [n, length, hidden_size].

    `padding` [n, 1, 1, length] is added to the scores.
    """
    n, length, size = hidden.shape
    projections = (attention.query, attention.key, attention.value)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    heads = F.linear(hidden, weight, bias).view(n, length, 3, attention.num_attention_heads, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4).contiguous()
    dropout = attention.dropout
    if dropout.training and _is_slow(hidden):  # PyTorch's attention would draw a mask slowly, too
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        padding = padding.expand(-1, attention.num_attention_heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(
            padding, query, key.transpose(1, 2), alpha=attention.attention_head_size**-0.5
        )
        attended = torch.bmm(_dropout(scores.softmax(2), dropout), value)
        attended = attended.unflatten(0, (n, -1))
    else:
        rate = dropout.p if dropout.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, padding, rate)
    return attended.transpose(1, 2).reshape(n, length, size)


def _add_and_normalize(output: Any, hidden: Tensor, residual: Tensor) -> Tensor:
    """Return a layer's output: projection, dropout, residual connection and LayerNorm."""
    hidden = _dropout(output.dense(hidden), output.dropout, residual)
    return output.LayerNorm(hidden).to(residual.dtype)


def _is_slow(hidden: Tensor) -> bool:
    """Whether PyTorch's own dropout is slow: on a CPU it draws one number after another."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def _dropout(hidden: Tensor, dropout: nn.Dropout, residual: Tensor | None = None) -> Tensor:
    """Return `hidden` after dropout, added to `residual`, if it is given."""
    if dropout.training and _is_slow(hidden):
        return FastDropout.apply(hidden, dropout.p, residual)
    return dropout(hidden) if residual is None else dropout(hidden) + residual


class FastDropout(torch.autograd.Function):
    """Dropout with a mask of 16 random bits a value from PyTorch's generator, added to a residual.

    The rate is a multiple of 2**-16: 0.1 becomes 6554 / 65536.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rate: float, residual: Tensor | None) -> Tensor:
        dropped = round(rate * 2**16)
        words = torch.empty((hidden.numel() + 3) // 4, dtype=torch.int64)
        bits = words.random_(-(2**63), None).view(torch.int16)[: hidden.numel()]
        mask = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        torch.ge(bits.view(hidden.shape), dropped - 2**15, out=mask)
        ctx.save_for_backward(mask)
        ctx.scale = 2**16 / (2**16 - dropped)
        if residual is None:
            residual = hidden.new_zeros(())
        return torch.addcmul(residual, hidden, mask, value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        of_hidden = torch.addcmul(gradient.new_zeros(()), gradient, mask, value=ctx.scale)
        return of_hidden, None, gradient if ctx.needs_input_grad[2] else None
