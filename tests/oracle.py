"""ELECTRA's two networks in NumPy, from the variables of a TensorFlow checkpoint: an independent reading of the paper
and of BERT's architecture (Vaswani et al. 2017, Devlin et al. 2019), against which conversions are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def dense(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def norm(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * w[f"{name}/gamma"] + w[f"{name}/beta"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def encoder(
    w: Weights, scope: str, ids: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [batch, length, hidden] of token ids, mask (1 = token) and segment ids, all [batch, length].

    And each layer's attention keys [layers, batch, length, hidden]: a key's bias adds the same to all scores of a
    query, so softmax hides it; only the keys themselves show whether it is right.
    """
    emb = f"{scope if f'{scope}/embeddings/word_embeddings' in w else 'electra'}/embeddings"
    x = w[f"{emb}/word_embeddings"][ids] + w[f"{emb}/token_type_embeddings"][types]
    x = norm(w, f"{emb}/LayerNorm", x + w[f"{emb}/position_embeddings"][: ids.shape[1]])
    if f"{scope}/embeddings_project/kernel" in w:
        x = dense(w, f"{scope}/embeddings_project", x)
    batch, length, hidden = x.shape
    heads = max(1, hidden // 64)
    layer, keys = 0, []
    while f"{scope}/encoder/layer_{layer}/output/dense/kernel" in w:
        name = f"{scope}/encoder/layer_{layer}"
        projected = [dense(w, f"{name}/attention/self/{part}", x) for part in ("query", "key", "value")]
        keys.append(projected[1])
        q, k, v = (p.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3) for p in projected)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(hidden // heads) - 10_000.0 * (1 - mask[:, None, None, :])
        context = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, hidden)
        x = norm(w, f"{name}/attention/output/LayerNorm", x + dense(w, f"{name}/attention/output/dense", context))
        inner = gelu(dense(w, f"{name}/intermediate/dense", x))
        x = norm(w, f"{name}/output/LayerNorm", x + dense(w, f"{name}/output/dense", inner))
        layer += 1
    return x, np.stack(keys)


def discriminator(w: Weights, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [batch, length] that each token was replaced; keys as `encoder`."""
    hidden, keys = encoder(w, "electra", ids, mask, types)
    hidden = gelu(dense(w, "discriminator_predictions/dense", hidden))
    return dense(w, "discriminator_predictions/dense_1", hidden)[..., 0], keys


def generator(w: Weights, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [batch, length, vocabulary] of the masked language model; keys as `encoder`."""
    hidden, keys = encoder(w, "generator", ids, mask, types)
    hidden = gelu(dense(w, "generator_predictions/dense", hidden))
    hidden = norm(w, "generator_predictions/LayerNorm", hidden)
    scope = "generator" if "generator/embeddings/word_embeddings" in w else "electra"
    return hidden @ w[f"{scope}/embeddings/word_embeddings"].T + w["generator_predictions/output_bias"], keys
