"""Live comparison with transformers' LlamaForCausalLM in PyTorch; also writes the goldens.

Run: make test-parity. To write the goldens anew: LLAMA_JAX_WRITE_GOLDENS=1 make test-parity.
"""

import functools
import os
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.convert import huggingface, huggingface_config
from llama_jax.model.config import RopeScaling
from llama_jax.model.rope import frequencies
from tests.convert import written
from tests.parity import ours
from tests.parity.cases import (
    CASES,
    TOLERANCE,
    digest,
    golden_path,
    read_golden,
    token_ids,
    weights,
)

pytestmark = pytest.mark.parity


@functools.cache
def theirs(name):
    """The peer's logits, loss and gradients, numpy."""
    import torch
    from transformers import LlamaForCausalLM

    config = CASES[name]
    model = LlamaForCausalLM(_peer_config(config)).eval()
    # Strict: every name and shape is what the peer expects, nothing keeps its random values.
    tensors = {name: torch.tensor(value) for name, value in weights(config, seed=0).items()}
    if config.tied:
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    model.load_state_dict(tensors, strict=True)
    ids = torch.tensor(token_ids(config), dtype=torch.long)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return out.logits.detach().numpy(), out.loss.item(), gradients


def _peer_config(config):
    from transformers import LlamaConfig

    settings = huggingface_config.config_to_huggingface(config)
    return LlamaConfig(**settings, attn_implementation='eager')


@pytest.mark.parametrize('name', CASES)
def test_logits_loss_and_gradients_equal_transformers(name):
    config = CASES[name]
    logits_BTV, loss, gradients = ours.results(config, weights(config, seed=0), token_ids(config))
    their_logits_BTV, their_loss, their_gradients = theirs(name)
    np.testing.assert_allclose(logits_BTV, their_logits_BTV, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(loss, their_loss, rtol=0, atol=TOLERANCE)
    assert gradients.keys() == their_gradients.keys()
    for tensor, gradient in gradients.items():
        expected = their_gradients[tensor]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=TOLERANCE, err_msg=tensor)
        # Entries of a mean's gradient are small: the whole tensor must agree as well.
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE, (tensor, error)


@pytest.mark.parametrize('name', ['llama3_1', 'llama3_2'])
def test_rope_scaling_shows_within_300_tokens(name):
    # Were it too weak to see, the comparison above would prove nothing about it.
    config = replace(CASES[name], rope_scaling=None)
    logits_BTV, _, _ = ours.results(config, weights(config, seed=0), token_ids(config))
    assert np.abs(logits_BTV - theirs(name)[0]).max() > 100 * TOLERANCE


@pytest.mark.parametrize('name', CASES)
def test_goldens_are_up_to_date(name):
    import torch
    import transformers

    fresh = digest(*theirs(name))
    if os.environ.get('LLAMA_JAX_WRITE_GOLDENS'):
        versions = f'torch {torch.__version__}, transformers {transformers.__version__}'
        golden_path(name).parent.mkdir(exist_ok=True)
        np.savez_compressed(golden_path(name), **fresh, made_by=versions)
    golden = read_golden(name)
    made_by = str(golden.pop('made_by'))
    assert golden.keys() == fresh.keys()
    for key, value in fresh.items():
        # A tenth of the tolerance of our own model: only another machine's rounding may differ.
        message = f'{key} of {golden_path(name).name}, made by {made_by}; write it anew?'
        np.testing.assert_allclose(
            golden[key], value, rtol=1e-5, atol=TOLERANCE / 10, err_msg=message
        )
    assert golden_path(name).stat().st_size < 200_000


@pytest.mark.parametrize(
    ('head_dim', 'factor'), [(128, 8.0), (64, 32.0), (128, 32.0)], ids=['3.1', '3.2_1b', '3.2_3b']
)
def test_frequencies_of_released_models_equal_transformers(head_dim, factor):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(factor=factor)  # low 1, high 4, original context 8192: as released
    config = replace(CASES['llama3_1'], head_dim=head_dim, context=131072, rope_scaling=scaling)
    expected, attention_scale = ROPE_INIT_FUNCTIONS['llama3'](_peer_config(config), device='cpu')
    assert attention_scale == 1
    found = frequencies(head_dim, theta=5e5, scaling=scaling)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_safetensors_files_both_ways(tmp_path):
    """Files that transformers writes are read, and files that we write are read by it."""
    import torch
    from transformers import LlamaForCausalLM

    config = replace(CASES['llama3_2'], layers=2)
    tensors = weights(config, seed=1)
    params = huggingface.params_from_huggingface(tensors, config)
    written.weights(tmp_path / 'ours', config, params)
    model = LlamaForCausalLM.from_pretrained(tmp_path / 'ours', dtype=torch.float32)
    for name, value in tensors.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)

    model.to(torch.bfloat16).save_pretrained(tmp_path / 'theirs', max_shard_size='100kB')
    assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
    read_config, read_params = huggingface.load(tmp_path / 'theirs')
    assert read_config == config
    for name, value in huggingface.params_to_huggingface(read_params, config).items():
        rounded = torch.tensor(tensors[name]).bfloat16().float().numpy()
        np.testing.assert_array_equal(value, rounded)
