"""Adapters of the library PEFT: its logits and its gradients, and its files both ways.

Run: make test-parity.
"""

import jax
import numpy as np
import optax
import pytest

from llama_jax import trees
from llama_jax.convert import peft as files
from llama_jax.convert import pretrained
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute
from llama_jax.model.tune import INPUTS, LoRA, combined, trained

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing. is deprecated:FutureWarning'),
]

TUNE = LoRA(rank=3, alpha=12.0)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.convert import written

    torch.manual_seed(0)
    sizes = {'vocab_size': 512, 'hidden_size': 32, 'intermediate_size': 48, 'head_dim': 8}
    sizes |= {'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2}
    path = tmp_path_factory.mktemp('base')
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).save_pretrained(path)
    written.trained().save(str(path / 'tokenizer.json'))
    return path


def theirs(base, adapters):
    """Their model upon the base: a directory, or settings of new adapters."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base, dtype='float32')
    if isinstance(adapters, dict):
        return get_peft_model(model, LoraConfig(init_lora_weights=False, **adapters))
    return PeftModel.from_pretrained(model, adapters, is_trainable=True)


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture
def mesh():
    mesh = make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


def ours(config, params):
    return layers.bind(config, params)(TOKENS, compute=Compute())[0]


def close(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    'settings',
    [
        {'r': 3, 'lora_alpha': 12, 'target_modules': 'all-linear'},
        {'r': 4, 'lora_alpha': 9, 'target_modules': ['v_proj', 'o_proj'], 'use_rslora': True},
        {
            **{'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj', 'down_proj']},
            **{'rank_pattern': {'layers.1.mlp.down_proj': 2}, 'alpha_pattern': {'q_proj': 20}},
        },
        {'r': 2, 'target_modules': ['k_proj'], 'layers_to_transform': [1]},
    ],
)
def test_their_files_upon_a_base(settings, base, mesh, tmp_path):
    model = theirs(base, settings)
    model.save_pretrained(tmp_path)
    found = pretrained.find(str(tmp_path))  # which names the base
    close(ours(found.config, found.params(mesh)), logits_of(model))
    with model.disable_adapter():
        assert np.abs(logits_of(model) - ours(found.config, found.params(mesh))).max() > 0.1


def test_gradients_and_files_they_read(base, mesh, tmp_path):
    import torch

    found = pretrained.find(str(base))
    config, frozen = found.config, found.params(mesh)
    rng = np.random.default_rng(1)
    params = trees.map_named(
        lambda _, x: jax.numpy.asarray(0.1 * rng.standard_normal(x.shape), np.float32),
        jax.eval_shape(lambda: trained(TUNE, {}, config, jax.random.key(0))),
    )
    whole = combined(TUNE, params, frozen)
    on_host = layers.unstack(jax.device_get({'blocks': whole['blocks']}))
    files.write(tmp_path / 'out', on_host, config, TUNE, base=str(base), dtype='float32')
    model = theirs(base, tmp_path / 'out')
    close(ours(config, whole), logits_of(model))

    def loss(params):
        logits_BTV = ours(config, combined(TUNE, params, frozen))
        target_BTV = jax.nn.one_hot(TOKENS[:, 1:], config.vocab)
        return optax.softmax_cross_entropy(logits_BTV[:, :-1], target_BTV).mean()

    gradients = jax.grad(loss)(params)
    tokens = torch.from_numpy(TOKENS)
    model(tokens, labels=tokens).loss.backward()
    wanted = {
        name.replace('.default', ''): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    as_adapters = combined(TUNE, gradients, frozen)
    written = files._Written(
        layers.unstack(jax.device_get({'blocks': as_adapters['blocks']})), config
    )
    assert set(written) == set(wanted) and len(wanted) == 2 * 2 * len(INPUTS)
    for name, gradient in wanted.items():
        close(written[name], gradient)


def test_factors_begin_as_theirs(base):
    """A in the range of theirs, with its variance; B zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=64, target_modules='all-linear')
    )
    config = pretrained.find(str(base)).config
    params = trained(LoRA(rank=64), {}, config, jax.random.key(0))
    for ours, name in (('attention.out_NHD.a_NHR', 'o_proj'), ('mlp.down_FD.a_FR', 'down_proj')):
        a = params['blocks']
        for part in ours.split('.'):
            a = a[part]
        theirs = [p for n, p in model.named_parameters() if f'{name}.lora_A' in n]
        theirs = torch.cat([p.detach().flatten() for p in theirs]).numpy()
        assert np.abs(a).max() == pytest.approx(np.abs(theirs).max(), rel=1e-2)
        assert np.std(a) == pytest.approx(theirs.std(), rel=3e-2)
    assert not any(np.any(x) for n, x in trees.named(params) if '.b_' in n)
