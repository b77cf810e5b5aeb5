"""Generation against the plain forward pass and against itself, token for token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, trees
from llama_jax.generate import columns, programs
from llama_jax.generate.generator import Generator
from llama_jax.model import layers
from llama_jax.model.config import Compute
from tests.generate.tiny import (
    COMPUTE,
    CONFIG,
    N,
    generator,
    mesh_of,
    prompt_of,
    tokens_of,
    uncached,
    weights,
)


@pytest.mark.parametrize('length', [1, 15, 16, 17, 32, 33])
def test_cached_decoding_equals_the_uncached_forward(length):
    prompt = prompt_of(length)
    [completion] = generator()([prompt], max_tokens=N)
    assert completion.tokens == uncached(prompt, N)
    assert len(set(completion.tokens)) > 10  # else the comparison says little
    assert completion.finish_reason == 'length'


SAMPLED = {'temperature': [0.0, 1.0, 0.7, 2.0, 1.0], 'top_k': [0, 0, 9, 0, 5], 'seed': range(5)}
LENGTHS = (1, 7, 16, 17, 30)


def lone(i, **settings):
    picked = {name: values[i] for name, values in SAMPLED.items()}
    return generator()([prompt_of(LENGTHS[i])], max_tokens=N, top_p=0.95, **picked)[0]


@pytest.mark.slow
def test_padded_rows_equal_lone_rows():
    prompts = [prompt_of(n) for n in LENGTHS]
    together = generator()(prompts, max_tokens=N, top_p=0.95, **SAMPLED)
    assert together == [lone(i) for i in range(5)]
    assert len({tuple(tokens) for tokens in tokens_of(together)}) == 5


@pytest.mark.slow
def test_a_prompt_several_times_draws_several_texts():
    again, other = prompt_of(7), prompt_of(9)
    settings = {'max_tokens': N, 'temperature': 1.0}
    prompts = [again, other, again, again, again]
    for seed in ({}, {'seed': 2**32 - 1}):
        drawn = generator()(prompts, **settings, **seed)
        assert len({tuple(tokens) for tokens in tokens_of(drawn)}) == 5
        first = seed.get('seed', 0)
        seeds = [first, first, *((first + i) % 2**32 for i in (1, 2, 3))]
        assert drawn == generator()(prompts, **settings, seed=seeds)
        assert drawn == generator()(prompts, **settings, **seed), 'and again the same'
    same = generator()([again] * 2, **settings, seed=[3, 3])
    assert same[0] == same[1], 'seeds row by row are those'


@pytest.mark.parametrize('chunk', [1, 6])
def test_stream_equals_loop(chunk):
    settings = {'max_tokens': N, 'temperature': 0.8, 'top_k': 20, 'seed': 3}
    pieces = list(generator().stream(prompt_of(9), chunk=chunk, **settings))
    [whole] = generator()([prompt_of(9)], **settings)
    assert sum(pieces, []) == whole.tokens
    lengths = [1] + [chunk] * ((N - 1) // chunk) + [(N - 1) % chunk] * ((N - 1) % chunk > 0)
    assert [len(piece) for piece in pieces] == lengths


def test_chunked_prefill_equals_whole_prefill():
    prompts = [prompt_of(n) for n in (17, 1, 30, 16, 20)]
    chunked = generator(prefill_chunk=16)
    assert chunked(prompts, max_tokens=N) == generator()(prompts, max_tokens=N)
    assert chunked.shape(5, 70, N).prompt == 80 and generator().shape(5, 70, N).prompt == 128


@pytest.mark.slow
def test_stops_at_the_end_ids():
    prompts = [prompt_of(n) for n in (5, 9, 12, 3, 2)]
    plain = tokens_of(generator()(prompts, max_tokens=N))
    ends = (plain[0][7], plain[1][0])
    cut = generator(eos_ids=ends)
    firsts = [next((i for i, token in enumerate(row) if token in ends), N) for row in plain]
    for i, stopped in enumerate(cut(prompts, max_tokens=N)):
        assert stopped.tokens == plain[i][: firsts[i]]
        assert stopped.finish_reason == ('stop' if firsts[i] < N else 'length')
    assert N in firsts and len(set(firsts)) > 2  # rows of every kind
    for i in range(2):
        streamed = cut.stream(prompts[i], max_tokens=N, chunk=6)
        assert sum(streamed, []) == plain[i][: firsts[i]]


@pytest.mark.slow
def test_the_loop_ends_when_every_row_is_done():
    prompts = [prompt_of(n) for n in (5, 9)]
    plain = tokens_of(generator()(prompts, max_tokens=N))
    cut = generator(eos_ids=tuple({tokens[7] for tokens in plain}))
    states = []
    run = cut.programs.decode
    cut.programs.decode = lambda *args, **kwargs: states.append(run(*args, **kwargs)) or states[-1]
    cut(prompts, max_tokens=N)
    cut.programs.decode = run
    state, drawn = states[0]
    assert (state.position_B <= np.array([5, 9]) + 7).all()
    assert (drawn.token_BT[:, 7:] == 0).all(), 'and what follows is padding'


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 2, 'tensor': 2}, {}])
def test_eight_devices_equal_one(axes):
    prompts = [prompt_of(n) for n in LENGTHS]
    settings = {'max_tokens': N, 'top_p': 0.95, **SAMPLED}
    sharded = generator(tuple(axes.items()), n_devices=8)
    assert sharded(prompts, **settings) == generator()(prompts, **settings)
    whole, part = weights()['blocks']['mlp']['gate_DF'], sharded.programs.params['blocks'][0]
    part = part['mlp']['gate_up_JFD'].addressable_shards[0].data
    assert part.size * axes.get('tensor', 1) == 2 * whole[0].size


def test_an_accelerators_step_equals_a_cpus(monkeypatch):
    monkeypatch.setattr(programs, 'is_cpu', lambda mesh: False)
    mesh = mesh_of(8, data=2, tensor=2)
    plain = Generator(CONFIG, weights(), mesh=mesh, compute=COMPUTE, eos_ids=(), pad_id=0)
    assert 'gate_DF' in plain.programs.params['blocks'][0]['mlp']
    prompts = [prompt_of(n) for n in LENGTHS]
    settings = {'max_tokens': N, 'top_p': 0.95, **SAMPLED}
    assert plain(prompts, **settings) == generator()(prompts, **settings)


def test_parts_of_fused_matrices_are_those_of_the_modules():
    params = layers.unstack(weights())
    with jax.set_mesh(mesh_of()):
        block, fused = params['blocks'][1], generator().programs.params['blocks'][1]
    heads = fused['attention']['qkv_KJHD']  # of each key-value head: its queries, key and value
    K, J, H, D = heads.shape
    assert (CONFIG.kv_heads, CONFIG.heads // CONFIG.kv_heads + 2, 8, 32) == (K, J, H, D)
    for n in range(CONFIG.heads):
        expected = block['attention']['q_DNH'][:, n].T
        np.testing.assert_array_equal(heads[n // (J - 2), n % (J - 2)], expected)
    for k in range(K):
        np.testing.assert_array_equal(heads[k, -2], block['attention']['k_DKH'][:, k].T)
        np.testing.assert_array_equal(heads[k, -1], block['attention']['v_DKH'][:, k].T)
    for j, name in enumerate(('gate_DF', 'up_DF')):
        np.testing.assert_array_equal(fused['mlp']['gate_up_JFD'][j], block['mlp'][name].T)


def test_the_first_token_of_a_stream_does_not_wait_for_the_program_of_the_others(monkeypatch):
    ours, prompt = generator(), prompt_of(9)
    expected = ours([prompt], max_tokens=9)[0].tokens
    monkeypatch.setattr(ours.programs, 'decode', lambda *_, **__: 1 / 0)
    pieces = ours.stream(prompt, max_tokens=9)
    assert next(pieces) == expected[:1]
    with pytest.raises(ZeroDivisionError):
        next(pieces)


def test_a_context_too_long_for_a_table_of_rotations(monkeypatch):
    monkeypatch.setattr(columns, 'LONGEST_TABLE', 10)
    ours = Generator(CONFIG, weights(), mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)
    assert 'rope' not in ours.programs.params and 'rope' in generator().programs.params
    prompts = [prompt_of(n) for n in LENGTHS]
    assert ours(prompts, max_tokens=N) == generator()(prompts, max_tokens=N)


def test_parameters_already_apart():
    apart = layers.unstack(weights())
    ours = Generator(CONFIG, apart, mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)
    jax.tree.map(np.testing.assert_array_equal, ours.programs.params, generator().programs.params)


@pytest.mark.slow
def test_bfloat16_on_a_cpu_keeps_matrices_in_it_and_computes_in_float32():
    """As a float32 model whose matrices were rounded: activations are not."""
    compute = Compute(precision='bfloat16')

    def rounded(path, x):
        return x if path.endswith('scale_D') else x.astype(jnp.bfloat16).astype(x.dtype)

    params = trees.map_named(rounded, weights())
    how = {'mesh': mesh_of(), 'eos_ids': (), 'pad_id': 0}
    ours = Generator(CONFIG, weights(), compute=compute, **how)
    plain = Generator(CONFIG, params, compute=COMPUTE, **how)
    assert ours.programs.model.compute == COMPUTE
    for path, x in trees.named(ours.programs.params):
        assert x.dtype == ('float32' if path.endswith(('scale_D', '_CH')) else 'bfloat16'), path
    prompts = [prompt_of(n) for n in LENGTHS]
    found, expected = (one(prompts, max_tokens=N, logprobs=1) for one in (ours, plain))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for pair in zip(found, expected, strict=True):
        here, there = ([x.logprob for x in one.logprobs] for one in pair)
        # Activations of a product are known to 1/65536; rounded to bfloat16 they are to 1/256.
        np.testing.assert_allclose(here, there, atol=2e-3)


@pytest.mark.slow
def test_arrays_of_a_draw_hold_the_end_and_its_probability():
    """As completions have them, which lack the end."""
    prompts, settings = [prompt_of(n) for n in (3, 9)], {'temperature': 1.0, 'seed': [1, 2]}
    whole = generator()(prompts, max_tokens=12, logprobs=0, **settings)
    end = whole[0].tokens[5]
    ended = generator(eos_ids=(end,)).draw(prompts, max_tokens=12, logprobs=0, **settings)
    assert ended.token_BT.shape == ended.logprob_BT.shape == (2, 12 + 5)  # padded
    n = whole[0].tokens.index(end) + 1
    assert ended.token_BT[0, :n].tolist() == whole[0].tokens[:n]
    logprobs = [one.logprob for one in whole[0].logprobs[:n]]
    np.testing.assert_allclose(ended.logprob_BT[0, :n], logprobs, atol=1e-6)


@pytest.mark.parametrize(('axes', 'n'), [((), 1), ((('fsdp', 2), ('tensor', 2)), 4)])
def test_renewed_parameters_are_those_of_a_new_generator(axes, n):
    """And they need no program that was not there."""
    again = generator(axes, n)
    prompts = [prompt_of(5)]
    before = again(prompts, max_tokens=6)

    def placed(params):
        return jax.device_put(params, layout.shardings(params, again.programs.mesh))

    other = placed(jax.tree.map(lambda x: x * 1.25, weights()))
    fresh = Generator(
        CONFIG, other, mesh=again.programs.mesh, compute=COMPUTE, eos_ids=(), pad_id=0
    )
    again.programs.renew(other)
    trees_of_both = (again.programs.params, fresh.programs.params)
    for mine, theirs in zip(*map(jax.tree.leaves, trees_of_both), strict=True):
        assert mine.sharding == theirs.sharding and mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert again(prompts, max_tokens=6) == fresh(prompts, max_tokens=6) != before
    again.programs.renew(placed(weights()))
    assert again(prompts, max_tokens=6) == before
