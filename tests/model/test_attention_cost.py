"""Work of attention under a sparse pattern, counted in the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llama_jax import layout, mesh
from llama_jax.mesh import MeshConfig
from llama_jax.model import kernels
from llama_jax.model.masks import Visibility
from llama_jax.model.patterns import BlockGlobal, Dense, Dilated, Window

N, K, H = 4, 2, 64


@functools.cache
def flops(pattern, T, causal=True):
    """Of the compiled forward pass of attention alone, per token."""

    def attended(q_BTNH, k_BSKH, v_BSKH):
        segment_BT = jnp.ones((1, T), jnp.int32, out_sharding=layout.act('BT'))
        visible = Visibility(segment_BT, segment_BT, causal=causal, pattern=pattern)
        return kernels.attend(q_BTNH, k_BSKH, v_BSKH, visible=visible, backend='auto')

    one = mesh.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(one):
        placed = jax.NamedSharding(one, layout.act('BTNH'))
        shapes = [
            jax.ShapeDtypeStruct((1, T, n, H), jnp.float32, sharding=placed) for n in (N, K, K)
        ]
        return jax.jit(attended).lower(*shapes).compile().cost_analysis()['flops'] / T


@pytest.mark.parametrize(
    ('pattern', 'causal'),
    [(Window(64), True), (Window(64), False), (Dilated(64, 4), True), (BlockGlobal(64, 4), False)],
)
def test_work_grows_linearly_with_the_length(pattern, causal):
    short, long = (flops(pattern, T, causal) for T in (1024, 4096))
    assert long < 1.15 * short, (short, long)
    assert long < 0.35 * flops(Dense(), 4096, causal), 'a pattern is cheaper than all keys'
    assert flops(Dense(), 4096) > 3 * flops(Dense(), 1024), 'the count would show growth'


@pytest.mark.parametrize('T', [300, 1200])
@pytest.mark.parametrize('pattern', [Window(100), Dilated(40, 4), BlockGlobal(128, 16)])
def test_the_cheaper_of_blocks_and_band_is_taken(T, pattern):
    # A quarter for the mask of the pattern, an element a query and key.
    assert flops(pattern, T) < 1.25 * flops(Dense(), T)
