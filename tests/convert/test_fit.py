"""Files that differ from their settings: what changes nothing loads, the rest is named."""

import logging
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert import huggingface, params
from llama_jax.convert.huggingface import HUGGING_FACE
from llama_jax.errors import UserError
from llama_jax.model.rope import frequencies
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3_1'], layers=2, vocab=32)
TIED = replace(CASES['llama3_2'], layers=2, vocab=32)
EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def loaded(tensors, config=CONFIG):
    found, unread = params.unread(HUGGING_FACE, tensors, config)
    return found, params.stacked(unread)


def refused(tensors, config=CONFIG):
    with pytest.raises(UserError) as error:
        loaded(tensors, config)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('prefix', ['module.', 'base_model.model.', '_orig_mod.'])
def test_a_prefix_of_all_tensors_is_passed_over(prefix):
    plain = weights(CONFIG, seed=3)
    expected = huggingface.params_from_huggingface(plain, CONFIG)
    prefixed = {prefix + name: w for name, w in plain.items()}
    jax.tree.map(np.testing.assert_array_equal, loaded(prefixed)[1], expected)
    assert 'extra' in refused(prefixed | {'extra': np.zeros(2)})


def test_an_adapter_within_is_told():
    name = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    prefixed = {'base_model.model.' + n: w for n, w in weights(CONFIG, seed=3).items()}
    assert 'merge the adapter' in refused(prefixed | {name: np.zeros((2, 64), np.float32)})


@pytest.mark.parametrize(('embedding', 'head'), [(37, 37), (37, 32), (32, 35)])
def test_rows_beyond_the_vocabulary_are_padding(embedding, head):
    tensors = weights(CONFIG, seed=3)
    for name, n in ((EMBEDDING, embedding), (HEAD, head)):
        more = np.ones((n - 32, 64), np.float32)
        tensors[name] = np.concatenate([tensors[name], more])
    found, made = loaded(tensors)
    n = max(embedding, head)
    assert (found.vocab, found.vocab_padding) == (n, n - 32)
    assert made['embed_VD'].shape == made['head_VD'].shape == (n, 64)
    np.testing.assert_array_equal(made['embed_VD'][:32], tensors[EMBEDDING][:32])
    np.testing.assert_array_equal(made['head_VD'][:32], tensors[HEAD][:32])


def test_ids_without_a_row_are_left_out(caplog):
    tensors = weights(CONFIG, seed=3)
    with caplog.at_level(logging.WARNING):
        found, _ = loaded(tensors, replace(CONFIG, vocab=34))
    assert (found.vocab, found.vocab_padding) == (32, 0)
    assert 'ids from 32 on have none' in caplog.text


def test_a_head_that_differs_from_a_tied_embedding_is_one_of_its_own(caplog):
    tensors = weights(TIED, seed=3)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    assert loaded(tensors, TIED)[0].tied
    assert not caplog.text
    tensors[HEAD][31, 63] += 1
    found, made = loaded(tensors, TIED)
    assert not found.tied and 'differs from' in caplog.text
    np.testing.assert_array_equal(made['head_VD'], tensors[HEAD])
    # Writers that keep shared tensors once may keep either.
    del tensors[EMBEDDING]
    found, made = loaded(tensors, TIED)
    assert found.tied
    np.testing.assert_array_equal(made['embed_VD'], tensors[HEAD])


ANGLES = np.asarray(
    frequencies(CONFIG.head_dim, theta=CONFIG.rope_theta, scaling=CONFIG.rope_scaling)
)
PLAIN = np.asarray(frequencies(CONFIG.head_dim, theta=CONFIG.rope_theta, scaling=None))
OTHER = np.asarray(frequencies(CONFIG.head_dim, theta=1e3, scaling=None))
PLACES = (
    'model.rotary_emb.inv_freq',
    'model.layers.1.self_attn.rotary_emb.inv_freq',
    'rope.freqs',
    'rotary_pos_emb.inv_freq',
)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rotary_frequencies_are_checked_and_left_out(place, dtype):
    tensors = weights(CONFIG, seed=3)
    for angles in (ANGLES, PLAIN):
        found, made = loaded(tensors | {place: angles.astype(dtype)})
        assert found == CONFIG and set(made) == {'blocks', 'embed_VD', 'head_VD', 'norm'}
    message = refused(tensors | {place: OTHER.astype(dtype)})
    assert place in message and 'rope_theta' in message


@pytest.mark.parametrize('wave', [np.cos, np.sin])
@pytest.mark.parametrize('twice', [lambda x: np.concatenate([x, x], -1), lambda x: x])
def test_tables_of_cosines_and_sines_are_checked_and_left_out(wave, twice):
    tensors, place = weights(CONFIG, seed=3), f'model.rotary_emb.{wave.__name__}_cached'

    def table(angles):
        return twice(wave(np.arange(20)[:, None] * angles))[None, None].astype(np.float32)

    loaded(tensors | {place: table(ANGLES)})
    assert place in refused(tensors | {place: table(OTHER)})


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_told_by_tensor(dtype, bad):
    tensors = {name: w.astype(dtype) for name, w in weights(CONFIG, seed=3).items()}
    for w in tensors.values():  # the largest that is finite
        w.reshape(-1)[-1] = ml_dtypes.finfo(np.float32 if dtype == np.float64 else dtype).max
    loaded(tensors)
    tensors['model.layers.1.mlp.up_proj.weight'][-1, -1] = bad
    message = refused(tensors)
    assert 'model.layers.1.mlp.up_proj.weight' in message and 'not finite' in message


def test_types_are_mixed_and_none_but_floats_are_numbers():
    tensors = weights(CONFIG, seed=3)
    types = (np.float16, np.float32, ml_dtypes.bfloat16)
    mixed = {name: w.astype(types[i % 3]) for i, (name, w) in enumerate(tensors.items())}
    _, made = loaded(mixed)
    expected = {name: w.astype(np.float32) for name, w in mixed.items()}
    jax.tree.map(
        np.testing.assert_array_equal, made, huggingface.params_from_huggingface(expected, CONFIG)
    )
    mixed[EMBEDDING] = mixed[EMBEDDING].astype(np.int8)
    assert 'int8' in refused(mixed)
