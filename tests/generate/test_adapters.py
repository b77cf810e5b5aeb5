"""Generation with adapters upon the weights: the text and the likelihoods of the merged ones."""

import jax
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import NOTHING, Quantization
from llama_jax.model.adapted import Adapted
from llama_jax.model.quantized import Quantized
from llama_jax.model.tune import LoRA, combined
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights
from tests.model.test_adapted import factors, in_bits, merged

N = 12
PROMPTS = [prompt_of(n) for n in (5, 17)]


def written(params, mesh, quantization=NOTHING):
    """The programs, the tokens drawn, and how likely they were."""
    ours = Generator(
        *(CONFIG, params),
        mesh=mesh,
        compute=COMPUTE,
        eos_ids=(),
        pad_id=0,
        quantization=quantization,
    )
    found = ours(PROMPTS, max_tokens=N, temperature=0.0, logprobs=1)
    return (
        ours.programs,
        [c.tokens for c in found],
        np.array([[x.logprob for x in c.logprobs] for c in found]),
    )


def placed(params, mesh):
    return jax.device_put(params, layout.shardings(params, mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('targets', 'kind', 'axes'),
    [
        (('all',), 'cpu', {}),
        (('v_DKH', 'up_DF'), 'cpu', {}),  # a block of zeros for the query, the key and the gate
        (('all',), 'cpu', {'fsdp': 2, 'tensor': 4}),  # two copies of each key-value head
        (('all',), 'accelerator', {'data': 2, 'tensor': 4}),
    ],
)
def test_text_is_that_of_merged_weights(targets, kind, axes, monkeypatch):
    if kind != 'cpu':
        monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: False)
    tune = LoRA(rank=3, alpha=6.0, targets=targets)
    mesh = mesh_of(int(np.prod([*axes.values()])), **axes)
    params = combined(tune, placed(factors(CONFIG, tune), mesh), placed(weights(), mesh))
    programs, tokens, logprobs = written(params, mesh)
    _, expected, wanted = written(
        merged(combined(tune, factors(CONFIG, tune), weights())), mesh_of()
    )
    assert tokens == expected
    np.testing.assert_allclose(logprobs, wanted, atol=2e-4)
    block = programs.params['blocks'][0]
    name = 'qkv_KJHD' if kind == 'cpu' else 'q_DNH'
    assert isinstance(block['attention'][name], Adapted), 'nothing is merged'
    before = programs.params
    programs.renew(params)  # as after a step of training
    assert jax.tree.structure(programs.params) == jax.tree.structure(before)
    for again, once in zip(*map(jax.tree.leaves, (programs.params, before)), strict=True):
        assert again.sharding == once.sharding
        np.testing.assert_array_equal(again, once)


@pytest.mark.parametrize('bits', ['int8', 'int4'])
def test_a_quantised_base_stays_in_its_integers(bits, monkeypatch):
    """On a CPU int4 is kept as float32, as always."""
    tune = LoRA(rank=3, alpha=6.0)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        base = in_bits(placed(weights(), mesh), bits)
    params = combined(tune, placed(factors(CONFIG, tune), mesh), base)
    programs, tokens, logprobs = written(params, mesh)
    _, expected, wanted = written(merged(params), mesh)
    w = programs.params['blocks'][0]['attention']['qkv_KJHD'].base
    assert isinstance(w, Quantized) == (bits == 'int8')
    np.testing.assert_allclose(logprobs[:, 0], wanted[:, 0], atol=2e-2)
    assert [t[0] for t in tokens] == [t[0] for t in expected]


@pytest.mark.slow
def test_a_base_is_quantised_below_its_adapters():
    """The base alone loses bits: the factors are those that were trained."""
    tune, mesh, how = LoRA(rank=3, alpha=6.0), mesh_of(), Quantization(weights='int8')
    params = combined(tune, placed(factors(CONFIG, tune), mesh), placed(weights(), mesh))
    programs, _, logprobs = written(params, mesh, how)
    w = programs.params['blocks'][0]['mlp']['down_DF']
    assert isinstance(w.base, Quantized)
    np.testing.assert_array_equal(
        w.b, factors(CONFIG, tune)['blocks']['mlp']['down_FD']['a_FR'][0].T
    )
    _, _, wanted = written(params, mesh)
    assert 1e-6 < np.abs(logprobs[:, 0] - wanted[:, 0]).max() < 0.1
