"""Model FLOPs, the numerator of model FLOPs utilisation (Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

from llama_jax.model.config import ModelConfig


def decoder_flops(model: ModelConfig, seq_len: int, *, causal: bool) -> float:
    """FLOPs of forward and backward per position of a row of `seq_len`.

    A multiply-add counts as two, the backward pass as two forward passes. All matrix products are
    counted, the head's included; the embedding's look-up, norms and recomputation are not. Causal
    attention is counted once: a query meets (seq_len + 1) / 2 keys on average. Packed documents
    are shorter than that, so the count is that of an unpacked row.
    """
    D, N, K, H = model.dim, model.heads, model.kv_heads, model.head_dim
    weights = model.layers * (2 * D * N * H + 2 * D * K * H + 3 * D * model.ffn) + model.vocab * D
    keys = (seq_len + 1) / 2 if causal else seq_len
    scores = model.layers * 2 * N * H * keys  # q k^T and weights v
    return 3 * 2 * (weights + scores)
