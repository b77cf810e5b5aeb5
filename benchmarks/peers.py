"""Peers of benchmarks/generate.py: the same shape and weights in other programs."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llama_jax.convert.gguf import GGUF
from llama_jax.convert.renamed import from_params
from llama_jax.model.config import ModelConfig
from llama_jax.model.layers import Params

Complete = Callable[[np.ndarray, int], None]
"""Continues prompts [B, T] by so many tokens; the tokens are on the host when it returns."""


def transformers(model: ModelConfig) -> Complete | None:
    """Hugging Face transformers, eager, with random weights; None where it is not installed."""
    if not (importlib.util.find_spec('transformers') and importlib.util.find_spec('torch')):
        print("transformers is absent: pip install '.[parity]' to compare")
        return None
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=model.vocab,
        hidden_size=model.dim,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.ffn,
        max_position_embeddings=model.context,
        tie_word_embeddings=model.tied,
    )
    peer = LlamaForCausalLM(shape).eval()

    def complete(prompts: np.ndarray, n: int) -> None:
        ids = torch.from_numpy(prompts).long()
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == prompts.shape[1] + n

    return complete


def llama_cpp(model: ModelConfig, params: Params, *, n_threads: int) -> Complete | None:
    """llama.cpp on a float32 GGUF file of `params`; one row only. None where it is absent."""
    if not (importlib.util.find_spec('cyllama') and importlib.util.find_spec('gguf')):
        print('llama.cpp is absent: pip install cyllama gguf to compare')
        return None
    import cyllama.llama.llama_cpp as cpp

    cpp.disable_logging()
    cpp.ggml_backend_load_all()
    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name) / 'model.gguf'
    write_gguf(path, model, params)
    settings = cpp.LlamaModelParams()
    peer = cpp.LlamaModel(str(path), settings)
    directory.cleanup()  # mapped: the file lives as long as the model
    context_settings = cpp.LlamaContextParams()
    context_settings.n_ctx = min(model.context, 2048)
    context_settings.n_batch = context_settings.n_ubatch = 512
    context_settings.n_threads = context_settings.n_threads_batch = n_threads
    context = cpp.LlamaContext(peer, context_settings)
    sampler = cpp.LlamaSampler(cpp.LlamaSamplerChainParams())
    sampler.add_greedy()

    def complete(prompts: np.ndarray, n: int) -> None:
        assert len(prompts) == 1, 'llama.cpp is measured with one row'
        context.kv_cache_clear()
        tokens, at = prompts[0].tolist(), 0
        for _ in range(n):
            context.decode(cpp.llama_batch_get_one(tokens, at))
            at += len(tokens)
            tokens = [sampler.sample(context, -1)]

    return complete


def write_gguf(path: Path, model: ModelConfig, params: Params) -> None:
    """A float32 GGUF file without a vocabulary."""
    import gguf

    file = gguf.GGUFWriter(path, 'llama')
    file.add_vocab_size(model.vocab)
    file.add_context_length(model.context)
    file.add_embedding_length(model.dim)
    file.add_block_count(model.layers)
    file.add_feed_forward_length(model.ffn)
    file.add_head_count(model.heads)
    file.add_head_count_kv(model.kv_heads)
    file.add_key_length(model.head_dim)
    file.add_value_length(model.head_dim)
    file.add_rope_dimension_count(model.head_dim)
    file.add_layer_norm_rms_eps(model.norm_eps)
    file.add_rope_freq_base(model.rope_theta)
    file.add_tokenizer_model('none')
    for name, tensor in from_params(GGUF, jax.device_get(params), model).items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
