"""Model FLOPs, the numerator of model FLOPs utilisation (Chowdhery et al. 2022, appendix B).

A multiply-add counts as two, the backward pass as two forward passes. All matrix products are
counted, the head's where there is loss included (objectives/softmax.py computes it nowhere else;
nor is the last layer where `TokenPrediction.skipped_flops` says so);
the embedding's look-up, norms and recomputation are not. Every row is taken to be unpacked: a query
meets (T + 1) / 2 keys on average under a causal mask, T under a full one. A sparse pattern is
counted by the keys that it lets through.
"""

from __future__ import annotations

import numpy as np

from llama_jax.model.config import ModelConfig
from llama_jax.model.patterns import Dense

TRAINING = 3 * 2
"""FLOPs of forward and backward per multiply-add of the forward pass."""
_SAMPLED = 1024
"""Queries of a row at most whose keys under a sparse pattern are counted."""


def decoder_flops(
    model: ModelConfig, seq_len: int, *, causal: bool, predicted: float | None = None
) -> float:
    """FLOPs of forward and backward per position of a row of `seq_len`, with the head of the
    `predicted` ones; None: of all."""
    keys = mean_keys(model, seq_len, causal=causal)
    return TRAINING * (model.layers * layer(model, keys) + _heads(model, seq_len, predicted))


def prefix_flops(
    model: ModelConfig, seq_len: int, *, prefix: int, predicted: float | None = None
) -> float:
    """The same where all queries see the first `prefix` keys, and those before them."""
    keys = mean_keys(model, seq_len, causal=True)
    if prefix:
        within = [mean_keys(model, prefix, causal=causal) for causal in (False, True)]
        keys += (within[0] - within[1]) * prefix / seq_len
    return TRAINING * (model.layers * layer(model, keys) + _heads(model, seq_len, predicted))


def features_flops(model: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """The same without the head."""
    return TRAINING * model.layers * layer(model, mean_keys(model, seq_len, causal=causal))


def encoder_decoder_flops(model: ModelConfig, encoder_len: int, decoder_len: int) -> float:
    """FLOPs of forward and backward per position, of the encoder's and the decoder's together.

    Each position passes through one of the two stacks, so that at equal parameters a position costs
    half of a decoder's (Raffel et al. 2020, section 3.2.2). The head serves the decoder's.
    """
    encoder = model.encoder_layers * (
        layer(model, mean_keys(model, encoder_len, causal=False)) if encoder_len else 0
    )
    memory = model.layers * 2 * model.dim * model.kv_heads * model.head_dim  # its keys and values
    decoder = model.layers * (
        layer(model, mean_keys(model, decoder_len, causal=True))
        + cross_attention(model, encoder_len)
    )
    total = encoder_len * (encoder + memory) + decoder_len * (decoder + head(model))
    return TRAINING * total / (encoder_len + decoder_len)


def mean_keys(model: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """Keys that a query meets on average, in self-attention."""
    if model.pattern == Dense():
        return (seq_len + 1) / 2 if causal else seq_len
    query_T = np.unique(np.linspace(0, seq_len - 1, _SAMPLED).round().astype(int))
    key_S = np.arange(seq_len)
    seen_TS = np.asarray(model.pattern.allows(query_T[:, None], key_S))
    if causal:
        seen_TS = seen_TS & (query_T[:, None] >= key_S)
    return float(seen_TS.sum(axis=1).mean())


def layer(model: ModelConfig, keys: float) -> float:
    """Multiply-adds of one position in one layer, of which each query meets `keys`."""
    return 2 * model.dim * model.kv_heads * model.head_dim + query(model, keys)


def query(model: ModelConfig, keys: float) -> float:
    """The same but for the position's own key and value."""
    D, N, H = model.dim, model.heads, model.head_dim
    matrices = 3 if model.mlp == 'swiglu' else 2
    weights = 2 * D * N * H + matrices * D * model.ffn
    return weights + 2 * N * H * keys  # q k^T and weights v


def cross_attention(model: ModelConfig, keys: float) -> float:
    """Multiply-adds of one decoder position that looks at `keys` positions of the encoder."""
    D, N, H = model.dim, model.heads, model.head_dim
    return 2 * D * N * H + 2 * N * H * keys


def head(model: ModelConfig) -> float:
    """Multiply-adds of the output head for one position."""
    return model.vocab * model.dim


def _heads(model: ModelConfig, seq_len: int, predicted: float | None) -> float:
    """Multiply-adds of the head for so many positions of a row, per position of it."""
    return head(model) * (1 if predicted is None else predicted / seq_len)
