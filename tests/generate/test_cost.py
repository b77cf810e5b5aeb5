"""What generation promises about compilation, memory and bad input."""

import jax
import pytest

from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.generate.generator import Generator
from tests.generate.tiny import (
    COMPUTE,
    CONFIG,
    generator,
    mesh_of,
    nothing_compiles,
    prompt_of,
    weights,
)


@pytest.mark.slow
def test_a_second_call_compiles_nothing():
    ours = Generator(
        CONFIG, weights(), mesh=mesh_of(), compute=COMPUTE, eos_ids=(3,), pad_id=0, prefill_chunk=16
    )
    ours([prompt_of(20), prompt_of(3)], max_tokens=30, temperature=1.0)
    list(ours.stream(prompt_of(3), max_tokens=30, chunk=4))
    with nothing_compiles():
        settings = {'temperature': [0.0, 2.0], 'top_k': [4, 0], 'top_p': 0.3, 'seed': [8, 9]}
        ours([prompt_of(31), prompt_of(17)], max_tokens=25, **settings)
        list(ours.stream(prompt_of(15), max_tokens=26, chunk=4, seed=4, top_k=5, temperature=1))


@pytest.mark.slow
@pytest.mark.parametrize(('n_rows', 'n_top'), [(4, None), (4, 3), (1, None)])
def test_the_cache_stays_in_place(n_rows, n_top):
    ours, programs = generator(), generator().programs
    controls, _ = ours._checked([prompt_of(5)] * n_rows, {'logprobs': n_top})
    shape = ours.shape(n_rows, 30, 1000)
    with jax.set_mesh(programs.mesh):
        state, _, rows, _ = ours._read([prompt_of(5)] * n_rows, controls, shape)
        kept = jax.tree.leaves(state.cache.layers)
        pointers = [x.unsafe_buffer_pointer() for x in kept]
        how = {'slots': 16, 'n_top': n_top}
        lowered = programs.decode.lower(programs.params, state, rows, 5, **how)
        memory = lowered.compile().memory_analysis()
        state, _ = programs.decode(programs.params, state, rows, 5, **how)
    cache_bytes = programs.cache_bytes(rows=shape.rows, slots=shape.slots)
    assert cache_bytes == trees.n_bytes(state.cache.layers)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
    assert all(x.is_deleted() for x in kept)
    assert pointers == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.cache.layers)]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'prompts': []}, 'no prompts'),
        ({'prompts': [[1], []]}, 'prompt 1 is empty'),
        ({'prompts': [[1, 96]]}, 'token id 96, outside the vocabulary of 96'),
        ({'prompts': [[-1]]}, 'token id -1'),
        ({'prompts': [[1] * 250], 'max_tokens': 7}, "model's context of 256"),
        ({'max_tokens': 0}, 'max_tokens 0'),
        ({'temperature': -0.1}, 'temperature -0.1'),
        ({'temperature': float('nan')}, 'temperature nan'),
        ({'top_p': 0.0}, r'top_p 0.0 is not in \(0, 1\]'),
        ({'top_p': 1.1}, 'top_p 1.1'),
        ({'top_k': -1}, 'top_k -1'),
        ({'seed': -1}, 'seed -1'),
        ({'seed': 2**32}, 'seed 4294967296'),
        ({'temperature': [1.0, 1.0]}, '2 values of temperature for 1 prompt'),
        ({'min_p': 1.5}, r'min_p 1.5 is not in \[0, 1\]'),
        ({'typical_p': 0.0}, 'typical_p 0.0'),
        ({'repetition_penalty': 0.0}, 'repetition_penalty 0.0'),
        ({'presence_penalty': 101}, 'presence_penalty 101'),
        ({'frequency_penalty': True}, 'frequency_penalty True'),
        ({'logit_bias': {96: 1.0}}, 'logit_bias: token id 96'),
        ({'logit_bias': {5: 101.0}}, 'logit_bias of token 5'),
        ({'stop_ids': (-1,)}, 'stop_ids: token id -1'),
        ({'stop_ids': tuple(range(17))}, '17 stop_ids'),
        ({'logprobs': 21}, 'logprobs 21'),
        ({'min_tokens': 5}, 'min_tokens 5 is above max_tokens 4'),
        ({'stop': ('a',)}, 'for requests of the Engine'),
        ({'temprature': 1.0}, 'there is no setting temprature'),
    ],
)
def test_bad_input_is_named(arguments, message):
    arguments = {'prompts': [[1]], 'max_tokens': 4, **arguments}
    with pytest.raises(UserError, match=message) as error:
        generator()(arguments.pop('prompts'), **arguments)
    assert '\n' not in str(error.value)


def test_bad_settings_of_a_stream_raise_before_its_first_token():
    with pytest.raises(UserError, match='chunk 0'):
        generator().stream([1], max_tokens=3, chunk=0)
    with pytest.raises(UserError, match='top_p'):
        generator().stream([1], max_tokens=3, top_p=2.0)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'prefill_chunk': 48}, 'prefill_chunk 48'),
        ({'eos_ids': (2, 96)}, 'eos_ids'),
        ({'pad_id': -1}, 'pad_id'),
        ({'mesh': ('tensor', 8)}, 'does not divide'),
    ],
)
def test_bad_generator_is_named(settings, message):
    arguments = {'mesh': mesh_of(), 'compute': COMPUTE, 'eos_ids': (), 'pad_id': 0, **settings}
    if 'mesh' in settings:
        arguments['mesh'] = mesh_of(8, tensor=8)
    with pytest.raises(UserError, match=message):
        Generator(CONFIG, weights(), **arguments)
