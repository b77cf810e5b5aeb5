"""Decoding under sparse patterns and of other architectures equals the plain forward pass."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import layout, trees
from llama_jax.generate.beam import beam_search
from llama_jax.generate.generator import Generator
from llama_jax.generate.speculative.draft import Draft, Lookup
from llama_jax.model import layers
from llama_jax.model.cache import Cache
from llama_jax.model.config import Dynamic, LongRope
from llama_jax.model.patterns import BlockGlobal, Dilated, Window
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of

LONG_ROPE = LongRope(
    short=(1.0,) * (CONFIG.head_dim // 2),
    long=tuple(2.0**i for i in range(CONFIG.head_dim // 2)),
    original_context=24,
    attention_factor=1.2,
)
CONFIGS = {
    'window': replace(CONFIG, pattern=Window(5)),
    'dilated': replace(CONFIG, pattern=Dilated(3, 4)),
    'blocks and global': replace(CONFIG, pattern=BlockGlobal(6, 2)),
    'dynamic': replace(CONFIG, rope_scaling=Dynamic(4.0, 24)),
    'longrope': replace(CONFIG, rope_scaling=LONG_ROPE),
    'classic': replace(
        CONFIG,
        norm='layer',
        norm_place='post',
        mlp='gelu',
        bias=True,
        positions='learned',
    ),
}
N, LENGTH = 16, 64
"""Tokens generated, and the length of the plain forward pass."""


@functools.cache
def weights(config):
    """Large enough that greedy text does not fall into a loop of one token."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        values = random.normal(size=leaf.shape)
        if path.endswith('scale_D'):
            return (1 + 0.1 * values).astype(np.float32)
        size = 1 if path.startswith('embed') else 0.1 if 'bias' in path else 0.5
        return (size * values).astype(np.float32)

    return trees.map_named(draw, layers.abstract(config))


@functools.cache
def forward(config):
    """Next-token logits at every place of a row, no cache."""
    mesh = mesh_of()
    params = jax.device_put(weights(config), jax.NamedSharding(mesh, jax.P()))

    @jax.jit
    def step(token_BT, length_B):
        return layers.bind(config, params)(token_BT, length_B=length_B, compute=COMPUTE)[0]

    def logits(tokens):
        token_BT = np.zeros((1, LENGTH), np.int32)
        token_BT[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh):
            return np.asarray(step(token_BT, np.full(1, len(tokens), np.int32)))[0]

    return logits


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_cached_equals_uncached(name):
    """Prompts of several lengths together, read in pieces; a window's ring goes round, more often
    for a short prompt's padding than for its text."""
    config = CONFIGS[name]
    prompts = [prompt_of(n) for n in (48, 17, 3)]
    settings = {'mesh': mesh_of(), 'compute': COMPUTE, 'eos_ids': (), 'pad_id': 0}
    ours = Generator(config, weights(config), prefill_chunk=16, **settings)
    if name == 'window':
        assert ours.shape(3, 48, N).slots == 32, 'a ring, of less than the 63 tokens of a row'
    fused = 'gate_up_JFD' in ours.programs.params['blocks'][0]['mlp']
    assert fused == config.llama, 'columns are for the LLaMA family'
    completions = ours(prompts, max_tokens=N)
    assert len({token for one in completions for token in one.tokens}) > 4  # else it says little
    for prompt, completion in zip(prompts, completions, strict=True):
        # Greedy: every token is the most likely one after those before it.
        tokens = [*prompt, *completion.tokens]
        after = slice(len(prompt) - 1, len(tokens) - 1)
        np.testing.assert_array_equal(forward(config)(tokens)[after].argmax(-1), completion.tokens)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['window', 'dynamic'])
def test_beams_and_drafts_read_as_one_row_does(name):
    config, prompts = CONFIGS[name], [prompt_of(n) for n in (48, 17, 3)]
    settings = {'mesh': mesh_of(), 'compute': COMPUTE, 'eos_ids': (), 'pad_id': 0}
    ours = Generator(config, weights(config), prefill_chunk=16, **settings)
    expected = [one.tokens for one in ours(prompts, max_tokens=N)]
    drafted = ours(prompts, max_tokens=N, speculate=Draft(ours.programs, n_draft=15))
    assert [one.tokens for one in drafted] == expected
    assert all(one.speculation.accepted == one.speculation.drafted for one in drafted)
    beams = beam_search(ours.programs, prompts, beams=1, max_tokens=N, prefill_chunk=16)
    assert [best.tokens for (best,) in beams] == expected
    if name == 'window':  # most drafts are wrong, and beams change places
        drafted = ours(prompts, max_tokens=N, speculate=Lookup(n_draft=15))
        assert [one.tokens for one in drafted] == expected
        both = beam_search(ours.programs, prompts, beams=2, n=2, max_tokens=N, prefill_chunk=16)
        for prompt, found in zip(prompts, both, strict=True):
            for text in found:
                tokens = [*prompt, *text.tokens]
                log_TV = jax.nn.log_softmax(forward(config)(tokens)[len(prompt) - 1 :])
                scores = log_TV[np.arange(N), text.tokens]
                np.testing.assert_allclose(text.score, scores.mean(), atol=1e-4)


def test_a_pattern_changes_what_is_generated():
    tokens = prompt_of(40)
    dense = forward(CONFIG)(tokens)[39]
    for name in ('window', 'dilated', 'blocks and global'):
        config = CONFIGS[name]
        assert np.abs(forward(config)(tokens)[39] - dense).max() > 0.1


def test_a_prefix_read_into_the_cache_is_seen_by_all_of_it():
    config, mesh = CONFIG, mesh_of()
    tokens = np.asarray([prompt_of(24)], np.int32)
    prefix_BT = (np.arange(24) < 16).astype(np.int32)[None]

    def whole(params):
        model = layers.bind(config, params)
        return model(tokens, prefix_BT=prefix_BT, compute=COMPUTE)[0]

    def pieces(params):
        model = layers.bind(config, layers.unstack(params))
        cache = Cache.empty(config, batch=1, slots=32, dtype=np.float32)
        first, cache = model(
            tokens[:, :20], prefix_BT=prefix_BT[:, :20], cache=cache, compute=COMPUTE
        )
        at_B = jax.reshard(jnp.array([20]), layout.act('B'))
        rest, _ = model(tokens[:, 20:], cache=cache, at_B=at_B, compute=COMPUTE)
        return first, rest

    params = jax.device_put(weights(config), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        expected = np.asarray(jax.jit(whole)(params))
        first, rest = jax.jit(pieces)(params)
        found = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
