"""Every kind of configuration that loads, through a directory that transformers saves: logits of
500 tokens, beyond the original context where positions are scaled, and greedy text.

Run: make test-parity.
"""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.convert import gguf, gguf_rope, huggingface, huggingface_config
from llama_jax.generate.generator import Generator
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, by_length
from llama_jax.model.patterns import Dense
from tests.convert import written
from tests.parity.cases import TOLERANCE, weights

pytestmark = pytest.mark.parity

T, N = 500, 12
"""Tokens of the forward pass, and tokens written."""
SIZES = {
    **{'vocab_size': 256, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2},
    **{'num_attention_heads': 4, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 2048},
}
SHORT = [1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.6, 1.9]
LONG = [1.0, 1.1, 1.5, 2.5, 5.0, 8.0, 8.0, 16.0]
LONG_ROPE = {'rope_type': 'longrope', 'short_factor': SHORT, 'long_factor': LONG}
LLAMA3 = {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
ORIGINAL = 'original_max_position_embeddings'


def llama(scaling=None, **settings):
    return {**SIZES, 'model_type': 'llama', 'rope_scaling': scaling, **settings}


def yarn(**more):
    return llama({'rope_type': 'yarn', 'factor': 32.0, ORIGINAL: 64, **more})


KINDS = {
    'llama 1': llama(rms_norm_eps=1e-6),
    'llama 2': llama(num_key_value_heads=2),
    'llama 3': llama(num_key_value_heads=2, rope_theta=5e5),
    'llama 3.1': llama({**LLAMA3, 'factor': 8.0, ORIGINAL: 64}, rope_theta=5e5),
    'llama 3.2': llama(
        {**LLAMA3, 'factor': 32.0, ORIGINAL: 64}, tie_word_embeddings=True, head_dim=24
    ),
    'linear': llama({'type': 'linear', 'factor': 4.0}),
    'dynamic, within': llama({'type': 'dynamic', 'factor': 4.0}, max_position_embeddings=512),
    'dynamic, beyond': llama({'type': 'dynamic', 'factor': 4.0}, max_position_embeddings=128),
    'yarn': yarn(),
    'yarn, its own attention': yarn(attention_factor=0.8),
    'yarn, mscale': yarn(
        **{'mscale': 1.0, 'mscale_all_dim': 0.5, 'truncate': False},
        **{'beta_fast': 8.0, 'beta_slow': 2.0},
    ),
    'longrope, within': llama({**LONG_ROPE, 'factor': 4.0, ORIGINAL: 512}),
    'longrope, beyond': llama({**LONG_ROPE, ORIGINAL: 128}),
    'mistral 0.1': llama(model_type='mistral', sliding_window=48, num_key_value_heads=2),
    'mistral 0.3': llama(model_type='mistral', sliding_window=None, num_key_value_heads=2),
    'mistral and yarn': {**yarn(), 'model_type': 'mistral', 'sliding_window': 100}
    | {'num_key_value_heads': 4},
}
# Greedy text where transformers' own cache means what its forward pass means: not where dynamic
# positions go on changing. (prompt, name)
WRITTEN = [
    ('llama 3.2', 30),
    ('yarn', 100),
    ('dynamic, within', 300),
    ('longrope, within', 300),
    ('longrope, beyond', 200),
    ('mistral 0.1', 130),
]


def tokens(n=T):
    return np.random.default_rng(0).integers(1, 256, n)


@functools.cache
def directory(name):
    """As transformers saves the model, and its logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(KINDS[name])
    config = AutoConfig.for_model(settings.pop('model_type'), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    ours = huggingface_config.config_from_huggingface(KINDS[name])
    tensors = {name: torch.tensor(value) for name, value in weights(ours, seed=0).items()}
    if ours.tied:
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    model.load_state_dict(tensors, strict=True)
    path = Path(tempfile.mkdtemp(prefix='kinds-'))
    model.save_pretrained(path)
    with torch.no_grad():
        logits_TV = model(torch.tensor(tokens())[None]).logits[0].numpy()
    return path, model, logits_TV


@functools.cache
def loaded(name):
    return huggingface.load(directory(name)[0])


def forward(config, params, row, length=None):
    """Logits without a cache [T, V]."""
    one = make(MeshConfig(), jax.devices()[:1])
    compute = Compute(attention='reference', unroll=1)

    def run(params, token_BT):
        length_B = None if length is None else np.full(1, length, np.int32)
        return layers.bind(config, params)(token_BT, length_B=length_B, compute=compute)[0]

    with jax.set_mesh(one):
        return np.asarray(jax.jit(run)(params, np.asarray(row)[None]))[0]


@functools.cache
def generator(name):
    return Generator(
        *loaded(name),
        mesh=make(MeshConfig(), jax.devices()[:1]),
        compute=Compute(),
        eos_ids=(),
        pad_id=0,
        prefill_chunk=64,
    )


@pytest.mark.parametrize('name', KINDS)
def test_logits_equal_transformers(name):
    config, params = loaded(name)
    assert config == huggingface_config.config_from_huggingface(KINDS[name])
    logits_TV = forward(config, params, tokens())
    np.testing.assert_allclose(logits_TV, directory(name)[2], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('name', ['llama 3.1', 'linear', 'yarn', 'longrope, beyond', 'mistral 0.1'])
def test_scaling_and_window_show(name):
    # Were they too weak to see, the comparison above would prove nothing about them.
    config, params = loaded(name)
    plain = replace(config, rope_scaling=None, pattern=Dense())
    assert np.abs(forward(plain, params, tokens()) - directory(name)[2]).max() > 100 * TOLERANCE


@pytest.mark.parametrize(('name', 'n'), WRITTEN, ids=[name for name, _ in WRITTEN])
def test_greedy_text_equals_transformers(name, n):
    import torch

    config, params = loaded(name)
    prompts = [tokens(n).tolist(), tokens(n)[: n - 7][::-1].tolist()]
    for prompt, one in zip(prompts, generator(name)(prompts, max_tokens=N), strict=True):
        with torch.no_grad():
            ids = directory(name)[1].generate(
                torch.tensor([prompt]), max_new_tokens=N, do_sample=False, pad_token_id=0
            )
        assert one.tokens == ids[0, len(prompt) :].tolist()
        length = len(prompt) + N if by_length(config.rope_scaling) else None
        logits_TV = forward(config, params, [*prompt, *one.tokens], length)
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == one.tokens


@pytest.mark.parametrize('name', ['longrope, beyond', 'dynamic, beyond'])
def test_text_that_grows_beyond_the_original_context_is_one_forward_pass(name):
    """Where transformers turns new keys otherwise than those in its cache, ours is read throughout
    as the text that it may become."""
    config, params = loaded(name)
    prompts = [tokens(124).tolist(), tokens(20).tolist()]
    for prompt, one in zip(prompts, generator(name)(prompts, max_tokens=N), strict=True):
        logits_TV = forward(config, params, [*prompt, *one.tokens], len(prompt) + N)
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == one.tokens


def in_llama_cpp(path, prompt, n):
    """Greedy text of a GGUF file, in a context of 512 tokens."""
    import cyllama.llama.llama_cpp as cpp

    cpp.disable_logging()
    cpp.ggml_backend_load_all()
    settings = cpp.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    context = cpp.LlamaContext(cpp.LlamaModel(str(path), cpp.LlamaModelParams()), settings)
    sampler = cpp.LlamaSampler(cpp.LlamaSamplerChainParams())
    sampler.add_greedy()
    new, text = prompt, []
    while len(text) < n:
        context.decode(cpp.llama_batch_get_one(new, len(prompt) + len(text) - len(new)))
        new = [sampler.sample(context, -1)]
        text += new
    return text


@pytest.mark.parametrize(
    'name',
    [
        *('llama 2', 'llama 3.1', 'linear', 'yarn', 'yarn, its own attention'),
        *('longrope, within', 'longrope, beyond'),
    ],
)
def test_greedy_text_equals_llama_cpp(name, tmp_path):
    config, _ = loaded(name)
    positions, factors = gguf_rope.to_gguf(config)
    settings = written.architecture(config) | {'tokenizer.ggml.model': 'none'}
    settings |= {f'llama.{setting}': value for setting, value in positions.items()}
    tensors = written.tensors_of(weights(config, seed=0), config) | factors
    path = written.write(tmp_path / 'model.gguf', tensors, settings)
    read = gguf.load(path)[0]  # factors are float32 in the file
    assert replace(read, rope_scaling=None) == replace(config, rope_scaling=None)
    assert type(read.rope_scaling) is type(config.rope_scaling)
    prompt = tokens(300).tolist()
    (ours,) = generator(name)([prompt], max_tokens=2 * N)
    assert in_llama_cpp(path, prompt, 2 * N) == ours.tokens
