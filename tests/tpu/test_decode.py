"""Where a step of decoding computes on a TPU, judged by its compiler (make test-tpu-compile)."""

import functools
import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llama_jax import layout
from llama_jax import mesh as meshes
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.decode import Model, State
from llama_jax.generate.prepare import How, prepared
from llama_jax.generate.quantized import placements
from llama_jax.generate.settings import rows_of
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.model.cache import Cache
from llama_jax.model.config import Compute, ModelConfig
from tpu import hlo, topology

D, F, V, N, K, H, L = 256, 768, 1024, 8, 2, 128, 3
ROWS, SLOTS = 8, 512
CONFIG = ModelConfig(vocab=V, dim=D, layers=L, heads=N, kv_heads=K, head_dim=H, ffn=F, context=2048)


def compiled(**axes):
    """The loop that writes, for a slice of four chips that is not there, and the size of its cache
    on a chip."""
    mesh = meshes.make(MeshConfig(**axes), topology.parse('v5e:2x2').devices())
    copies = layout.head_copies(K, mesh)
    config = replace(CONFIG, kv_heads=K * copies)
    model = Model(config, Compute(precision='bfloat16'), in_columns=False, pad_id=0)

    def lying(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def by_row(x):
        return lying(x, jax.NamedSharding(mesh, layout.rows()))

    with jax.set_mesh(mesh):
        params = jax.eval_shape(
            functools.partial(prepared, model, how=How(jnp.bfloat16, jnp.bfloat16, copies)),
            layers.abstract(CONFIG),
        )
        params = jax.tree.map(lying, params, placements(params, mesh))
        cache = jax.eval_shape(
            lambda: Cache.empty(config, batch=ROWS, slots=SLOTS, dtype=jnp.bfloat16)
        )
        in_use = jax.NamedSharding(mesh, layout.act('BK'))
        cache = jax.tree.map(lambda x: lying(x, in_use), cache)
        row_B, done_B = (by_row(jax.ShapeDtypeStruct((ROWS,), t)) for t in (jnp.int32, bool))
        settings = rows_of([], lengths=[], rows=ROWS, end_ids=(), vocab=V, bias=False)
        decode = jax.jit(
            functools.partial(decode_lib.decode, model),
            static_argnames=('slots', 'n_top'),
            donate_argnums=1,
        )
        lowered = decode.lower(
            *(params, State(cache, row_B, row_B, done_B, None), jax.tree.map(by_row, settings), 8),
            slots=16,
            n_top=None,
        )
    n_bytes = sum(2 * math.prod(in_use.shard_shape(x.shape)) for x in jax.tree.leaves(cache))
    return lowered.compile(), n_bytes


def moved(program):
    """{kind, shape: how often} in one turn of the loop."""
    found = Counter()
    for c in hlo.collectives(hlo.parse(program.as_text())):
        for shape in c.shapes:
            found[c.kind, shape] += c.count
    return found


@pytest.mark.tpu
@pytest.mark.parametrize('axes', [{'fsdp': 2, 'tensor': 2}, {'tensor': 4}])
def test_a_step_sums_activations_and_gathers_logits_only(axes):
    """Also with more chips than key-value heads."""
    program, cache_bytes = compiled(**{'fsdp': 1, **axes})
    rows = ROWS // axes.get('fsdp', 1)
    assert moved(program) == {
        ('all-reduce', f'bf16[{rows},1,{D}]'): 2 * L + 1,
        ('all-gather', f'f32[{rows},{V}]'): 1,
    }
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes, 'the cache is written in place'
