"""No two parameters of a model begin with the same draws."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.keys import named_key
from llama_jax.model.tune import LoRA
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.token_order import TokenOrder
from llama_jax.train.step import initial_params
from llama_jax.trees import named
from tests.train.every import BOTH, DECODER, EVERY

LEARNED = {'positions': 'learned', 'tied': False, 'layers': 3}


def bits(key):
    return tuple(jax.random.key_data(key).tolist())


def test_a_named_key_is_none_of_those_that_a_split_makes():
    key = jax.random.key(3)
    split = {bits(one) for n in (1, 2, 3, 40) for one in jax.random.split(key, n)}
    own = {bits(named_key(key, name)) for name in ('encoder', 'cross', 'objective')}
    assert len(own) == 3 and not own & split
    # Why: a small number folded in is no key of its own.
    assert bits(jax.random.fold_in(key, 1)) in split


def beginnings(params):
    """The first draws of every array, and of every layer of one: direction -> names."""
    found = {}
    for path, leaf in named(params):
        array = np.asarray(leaf, np.float64)
        for i, values in enumerate(array if '.blocks.' in f'.{path}' else array[None]):
            first = values.reshape(-1)[:8]
            if np.ptp(first) > 0:  # neither scales of norms nor zeros
                direction = tuple(np.round(first / np.linalg.norm(first), 5))
                found.setdefault(direction, []).append(f'{path} {i}')
    return found


@pytest.mark.parametrize(
    ('objective', 'model'),
    [
        *EVERY.values(),
        (EVERY['spans encoder'][0], replace(BOTH, encoder_layers=3, mlp='gelu', **LEARNED)),
        (TokenOrder(), replace(DECODER, **LEARNED)),
        (REGISTRY['reward'](), DECODER),
    ],
    ids=lambda x: type(x).__name__,
)
def test_no_two_parameters_begin_alike(objective, model):
    found = beginnings(initial_params(model, objective, jax.random.key(0)))
    assert len(found) > 3
    assert not [names for names in found.values() if len(names) > 1]


def test_nor_do_adapters_begin_as_the_weights_that_they_are_upon():
    key, objective = jax.random.key(0), EVERY['causal'][0]
    whole = initial_params(DECODER, objective, key)
    adapters = initial_params(DECODER, objective, key, LoRA(rank=4))
    assert not beginnings(whole).keys() & beginnings(adapters).keys()
