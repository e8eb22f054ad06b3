"""ELECTRA's two networks in NumPy, from the variables of a TensorFlow checkpoint.

An independent implementation after the papers (Vaswani et al. 2017, Devlin et al. 2019, Clark et
al. 2020), against which conversions are checked.
"""

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
    centered = x - x.mean(-1, keepdims=True)
    normalized = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12)
    return normalized * w[f"{name}/gamma"] + w[f"{name}/beta"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def encoder(
    w: Weights, scope: str, ids: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return hidden states [batch, length, hidden] and keys [layers, batch, length, hidden].

    `ids`, `mask` (1 = token) and `types` (segment ids) are [batch, length]. A key's bias adds the
    same to all scores of a query, so softmax hides it: only the keys show whether it is right.
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
        parts = ("query", "key", "value")
        projected = [dense(w, f"{name}/attention/self/{part}", x) for part in parts]
        keys.append(projected[1])
        q, k, v = (p.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3) for p in projected)
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(hidden // heads)
        scores -= 10_000.0 * (1 - mask[:, None, None, :])
        context = (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, length, hidden)
        attention = dense(w, f"{name}/attention/output/dense", context)
        x = norm(w, f"{name}/attention/output/LayerNorm", x + attention)
        inner = gelu(dense(w, f"{name}/intermediate/dense", x))
        x = norm(w, f"{name}/output/LayerNorm", x + dense(w, f"{name}/output/dense", inner))
        layer += 1
    return x, np.stack(keys)


def discriminator(
    w: Weights, ids: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [batch, length] that each token was replaced, and keys as `encoder` does."""
    hidden, keys = encoder(w, "electra", ids, mask, types)
    hidden = gelu(dense(w, "discriminator_predictions/dense", hidden))
    return dense(w, "discriminator_predictions/dense_1", hidden)[..., 0], keys


def generator(
    w: Weights, ids: np.ndarray, mask: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [batch, length, vocabulary] of the tokens, and keys as `encoder` does."""
    hidden, keys = encoder(w, "generator", ids, mask, types)
    hidden = gelu(dense(w, "generator_predictions/dense", hidden))
    hidden = norm(w, "generator_predictions/LayerNorm", hidden)
    scope = "generator" if "generator/embeddings/word_embeddings" in w else "electra"
    logits = hidden @ w[f"{scope}/embeddings/word_embeddings"].T
    return logits + w["generator_predictions/output_bias"], keys
