"""Generation with fewer bits equals a plain float64 model with its numbers rounded."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.quantized import Quantization
from llama_jax.model.patterns import Window
from llama_jax.model.quantized import dense, product, quantize
from tests.generate.rounded import HOW, N, check, generator
from tests.generate.tiny import CONFIG, mesh_of, prompt_of, tokens_of


@pytest.mark.parametrize(('bits', 'group'), [(8, None), (4, None), (4, 8)])
def test_rounding_errs_by_half_a_step_of_the_largest(bits, group):
    x = np.random.default_rng(bits).normal(size=(24, 5, 16)).astype(np.float32)
    x[3, 2] = 0
    found = np.asarray(dense(quantize(jnp.asarray(x), (0, 2), bits=bits, group=group), np.float32))
    largest = np.abs(x).max(axis=(0, 2), keepdims=True)
    if group:
        largest = np.abs(x.reshape(24, 5, 2, 8)).max(axis=-1).repeat(8, axis=-1)
    most = 2 ** (bits - 1) - 1
    assert (np.abs(found - x) <= largest / most / 2 * (1 + 1e-5)).all()
    assert (np.abs(found) <= largest * (1 + 1e-6)).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', HOW)
def test_equals_the_rounded_model_in_float64(name):
    how, bound = HOW[name]
    prompts, completions = check(generator(how), how, bound)
    if name != 'nothing':
        ours = [one.logprobs[0].logprob for one in completions]
        whole = [
            one.logprobs[0].logprob
            for one in generator(Quantization())(prompts, max_tokens=N, logprobs=3)
        ]
        assert not np.allclose(ours, whole, atol=1e-5), 'something was rounded'


@pytest.mark.parametrize('n', [2**17, 140_000])
def test_sums_too_long_for_integers(n):
    """All of one sign and as large as can be."""
    value = quantize(jnp.ones((1, 1, n, 2)), (3,))
    with jax.set_mesh(mesh_of()):
        found = product('BKGTS,BKSH->BKGTH', jnp.full((1, 1, 1, 1, n), 1 / n), value, dtype=float)
    np.testing.assert_allclose(found, 1, rtol=1e-3)


@pytest.mark.slow
def test_a_ring_of_int8():
    how, bound = HOW['cache']
    ours = generator(how, replace(CONFIG, pattern=Window(5)))
    assert ours.shape(3, 30, N).slots == 32
    check(ours, how, bound, window=5)


@pytest.mark.slow
def test_rows_do_not_depend_on_each_other():
    ours, prompts = generator(HOW['both'][0]), [prompt_of(n) for n in (30, 17, 3)]
    together = tokens_of(ours(prompts, max_tokens=N, logprobs=3))
    others = [prompt_of(20), *reversed(prompts)]
    assert together[::-1] == tokens_of(ours(others, max_tokens=N, logprobs=3))[1:]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Quantization(weights='int3'), "weights 'int3': there is int8 and int4"),
        (lambda: Quantization(cache='int4'), "cache 'int4': there is int8"),
        (lambda: Quantization('int4', group=0), 'group 0'),
        (lambda: Quantization('int8', group=32), 'group 32 is for weights int4'),
        (lambda: generator(Quantization(weights='int4', group=7)), 'groups of 7 inputs'),
        (
            lambda: generator(Quantization(cache='int8'), replace(CONFIG, encoder_layers=1)),
            'encoder_layers 0',
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
