"""Drafts that are looked up in the row: the same tokens, drawn in fewer steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import trees
from llama_jax.generate.speculative import loop
from llama_jax.generate.speculative.draft import Lookup, look_up
from tests.generate.drafting import CONTROLS, PROMPTS, N, check_equal, generator
from tests.generate.tiny import prompt_of


@pytest.mark.slow
@pytest.mark.parametrize('name', CONTROLS)
@pytest.mark.parametrize('loops', [True, False])
def test_looking_up_draws_the_same_tokens(loops, name):
    rate = check_equal(generator(loops), Lookup(n_draft=5), **CONTROLS[name])
    assert rate > 2 or not loops or name != 'greedy'


@pytest.mark.slow
def test_a_longer_least_match_makes_some_steps_of_one_token():
    ours, how = generator(), Lookup(n_gram=4, n_draft=5, least=3)
    check_equal(ours, how)
    drafted = ours(PROMPTS, max_tokens=N, speculate=how)[0].speculation
    assert 0 < drafted.drafted < 5 * drafted.steps


def followed(text, how):
    """Oracle: the longest and latest match of the end, and what follows it."""
    n = len(text)
    for length in range(min(how.n_gram, n - 1), how.least - 1, -1):
        for end in range(n - 1, length - 1, -1):
            if text[end - length : end] == text[n - length :]:
                found = text[end:]
                return [found[i % len(found)] for i in range(how.n_draft)]
    return None


@pytest.mark.parametrize('how', [Lookup(), Lookup(n_gram=1), Lookup(4, 15, 2), Lookup(2, 1, 2)])
def test_what_is_looked_up(how):
    rng = np.random.default_rng(0)
    text_BS = rng.integers(0, 4, (200, 40))
    n_B = rng.integers(1, 41, 200)
    draft = jax.jit(functools.partial(look_up, how))(jnp.asarray(text_BS), jnp.asarray(n_B - 1))
    for text, n, tokens, n_drafted in zip(text_BS, n_B, draft.token_BK, draft.n_B, strict=True):
        expected = followed(text[:n].tolist(), how)
        assert n_drafted == (0 if expected is None else how.n_draft)
        assert expected is None or tokens.tolist() == expected


@pytest.mark.slow
def test_a_second_call_compiles_nothing_and_the_cache_stays_in_place():
    ours, how = generator(), Lookup(n_draft=5)
    ours(PROMPTS, max_tokens=N, speculate=how)
    before = loop._run._cache_size()
    ours([prompt_of(n) for n in (2, 19, 5, 8)] + [[4] * 20], max_tokens=N - 1, speculate=how)
    assert loop._run._cache_size() == before

    programs, shape, how = ours.programs, ours.shape(1, 30, 900), Lookup(n_draft=1)
    controls, _ = ours._checked([PROMPTS[0]], {})
    with jax.set_mesh(programs.mesh):
        state, _, rows, _ = ours._read([PROMPTS[0]], controls, shape)
        text_BS = programs.place(np.zeros((1, 1024), np.int32))
        arguments = (programs.model, how, programs.params, None, state, text_BS, None, rows)
        lowered = loop._run.lower(*arguments, slots=16, n_top=None)
        memory = lowered.compile().memory_analysis()
    n_bytes = programs.cache_bytes(rows=1, slots=shape.slots)
    assert memory.alias_size_in_bytes >= n_bytes == trees.n_bytes(state.cache.layers)
    assert memory.temp_size_in_bytes < n_bytes / 2
