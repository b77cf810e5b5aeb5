"""Generation against the plain forward pass, token for token, and its promises about cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import trees
from llama_jax.errors import UserError
from llama_jax.generate.engine import Generator
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig

CONFIG = ModelConfig(
    vocab=96, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, context=256
)
COMPUTE = Compute()


def mesh_of(n=1, **axes):
    return make(MeshConfig(**axes), jax.devices()[:n])


@functools.cache
def weights():
    """Weights large enough that greedy text does not fall into a loop of one token."""
    params = layers.create(CONFIG, jax.random.key(1), mesh_of())
    return jax.tree.map(lambda x: np.asarray(x) * (1.0 if x.ndim < 3 else 3.0), params)


@functools.cache
def generator(mesh_axes=(), n_devices=1, eos_ids=(), prefill_chunk=512):
    return Generator(
        CONFIG,
        weights(),
        mesh=mesh_of(n_devices, **dict(mesh_axes)),
        compute=COMPUTE,
        eos_ids=eos_ids,
        pad_id=0,
        prefill_chunk=prefill_chunk,
    )


@functools.cache
def forward():
    """Plain next-token logits of a whole row, no cache; padded at the end to compile once."""
    mesh = mesh_of()
    params = jax.device_put(
        weights(), jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), weights())
    )
    step = jax.jit(lambda token_BT: layers.bind(CONFIG, params)(token_BT, compute=COMPUTE)[0])

    def logits(tokens):
        token_BT = np.zeros((1, CONFIG.context), np.int32)
        token_BT[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh):
            return np.asarray(step(token_BT))[0, len(tokens) - 1]

    return logits


def uncached(prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(forward()(tokens).argmax()))
    return tokens[len(prompt) :]


def prompt_of(length, seed=0):
    return np.random.default_rng([seed, length]).integers(1, CONFIG.vocab, length).tolist()


def tokens_of(completions):
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize('length', [1, 15, 16, 17, 32, 33])
def test_cached_decoding_equals_the_uncached_forward(length):
    prompt = prompt_of(length)
    [completion] = generator()([prompt], max_tokens=48)
    assert completion.tokens == uncached(prompt, 48)
    assert len(set(completion.tokens)) > 10  # else the comparison says little
    assert completion.finish_reason == 'length'


SAMPLED = {'temperature': [0.0, 1.0, 0.7, 2.0, 1.0], 'top_k': [0, 0, 9, 0, 5], 'seed': range(5)}
LENGTHS = (1, 7, 16, 17, 40)


def lone(i, **settings):
    picked = {name: values[i] for name, values in SAMPLED.items()}
    return generator()([prompt_of(LENGTHS[i])], max_tokens=24, top_p=0.95, **picked)[0]


def test_padded_rows_equal_lone_rows():
    prompts = [prompt_of(n) for n in LENGTHS]
    together = generator()(prompts, max_tokens=24, top_p=0.95, **SAMPLED)
    assert together == [lone(i) for i in range(5)]
    assert len({tuple(tokens) for tokens in tokens_of(together)}) == 5


@pytest.mark.parametrize('chunk', [1, 5, 16])
def test_stream_equals_loop(chunk):
    settings = {'max_tokens': 23, 'temperature': 0.8, 'top_k': 20, 'seed': 3}
    pieces = list(generator().stream(prompt_of(9), chunk=chunk, **settings))
    [whole] = generator()([prompt_of(9)], **settings)
    assert sum(pieces, []) == whole.tokens
    assert [len(piece) for piece in pieces] == [
        1,
        *[chunk] * (22 // chunk),
        *[22 % chunk] * (22 % chunk > 0),
    ]


def test_chunked_prefill_equals_whole_prefill():
    prompts = [prompt_of(n) for n in (70, 3, 33, 64)]
    chunked = generator(prefill_chunk=16)
    assert chunked.shape(4, 70, 20).prompt == 80
    assert chunked(prompts, max_tokens=20) == generator()(prompts, max_tokens=20)


def test_stops_at_the_end_ids():
    prompts = [prompt_of(n) for n in (5, 9, 12)]
    plain = tokens_of(generator()(prompts, max_tokens=40))
    ends = (plain[0][7], plain[1][0], plain[1][20])
    cut = generator(eos_ids=ends)
    for tokens, stopped in zip(plain, cut(prompts, max_tokens=40), strict=True):
        first = next((i for i, token in enumerate(tokens) if token in ends), 40)
        assert stopped.tokens == tokens[:first]
        assert stopped.finish_reason == ('stop' if first < 40 else 'length')
    for prompt, stopped in zip(prompts, cut(prompts, max_tokens=40), strict=True):
        assert sum(cut.stream(prompt, max_tokens=40, chunk=3), []) == stopped.tokens


def test_loop_ends_when_every_row_is_done():
    prompts = [prompt_of(n) for n in (5, 9, 12)]
    plain = tokens_of(generator()(prompts, max_tokens=40))
    cut = generator(eos_ids=tuple({tokens[7] for tokens in plain}))
    states = []
    run = cut._decode
    cut._decode = lambda *args, **kwargs: states.append(run(*args, **kwargs)) or states[-1]
    cut(prompts, max_tokens=40)
    cut._decode = run
    # The cursor counts slots written: 16 of the prompts and at most 7 steps.
    assert int(states[0][0].cache.cursor) <= 16 + 7


def test_a_second_call_compiles_nothing():
    ours = Generator(
        CONFIG, weights(), mesh=mesh_of(), compute=COMPUTE, eos_ids=(3,), pad_id=0, prefill_chunk=16
    )
    ours([prompt_of(20), prompt_of(3)], max_tokens=30, temperature=1.0)
    list(ours.stream(prompt_of(3), max_tokens=30, chunk=4))
    compiled = []

    def count(event, _, **kwargs):
        if 'compile' in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x * 2.5 + 1)(jnp.ones(3))
        assert compiled, 'the count sees compilations'
        compiled.clear()
        settings = {'temperature': [0.0, 2.0], 'top_k': [4, 0], 'top_p': 0.3, 'seed': [8, 9]}
        ours([prompt_of(31), prompt_of(17)], max_tokens=25, **settings)
        list(ours.stream(prompt_of(15), max_tokens=26, chunk=4, seed=4, top_k=5, temperature=1))
        assert not compiled
    finally:
        jax._src.monitoring.unregister_event_duration_listener(count)


def test_the_cache_stays_in_place():
    ours = generator()
    shape = ours.shape(4, 30, 1000)
    prompts = [prompt_of(5)] * 4
    with jax.set_mesh(ours.mesh):
        sampling = ours._sampling(4, shape, 0.0, 0, 1.0, 0)
        state = ours._read(prompts, shape, sampling)
        kept = jax.tree.leaves(state.cache.layers)
        pointers = [x.unsafe_buffer_pointer() for x in kept]
        memory = (
            ours._decode.lower(ours._params, state, sampling, 5, slots=16)
            .compile()
            .memory_analysis()
        )
        state, _ = ours._decode(ours._params, state, sampling, 5, slots=16)
    cache_bytes = shape.cache_bytes(CONFIG, itemsize=4)
    assert cache_bytes == trees.n_bytes(state.cache.layers)
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4
    assert all(x.is_deleted() for x in kept)
    assert pointers == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.cache.layers)]


@pytest.mark.parametrize(
    'axes', [{'tensor': 2}, {}, {'data': 2, 'tensor': 2}, {'data': -1, 'fsdp': 1}]
)
def test_eight_devices_equal_one(axes):
    prompts = [prompt_of(n) for n in LENGTHS]
    settings = {'max_tokens': 24, 'top_p': 0.95, **SAMPLED}
    sharded = generator(tuple(axes.items()), n_devices=8)
    assert sharded(prompts, **settings) == generator()(prompts, **settings)
    whole, part = weights()['blocks']['mlp']['gate_DF'], sharded._params['blocks'][0]
    part = part['mlp']['gate_DF'].addressable_shards[0].data
    assert part.size * axes.get('tensor', 1) == whole[0].size


def test_parameters_already_apart():
    apart = layers.unstack(weights())
    ours = Generator(CONFIG, apart, mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)
    assert ours([prompt_of(9)], max_tokens=9) == generator()([prompt_of(9)], max_tokens=9)


def test_bfloat16_on_a_cpu_computes_in_float32():
    ours = Generator(
        CONFIG,
        weights(),
        mesh=mesh_of(),
        compute=Compute(precision='bfloat16'),
        eos_ids=(),
        pad_id=0,
    )
    assert ours([prompt_of(9)], max_tokens=9) == generator()([prompt_of(9)], max_tokens=9)


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
