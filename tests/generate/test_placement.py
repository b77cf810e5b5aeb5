"""Where generation computes on a mesh, read from the compiled programs."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.generator import Generator
from tests.generate.test_cached_architectures import weights
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of
from tpu import hlo

D, V, L, B = 32, 96, 2, 4
CONFIG = replace(CONFIG, dim=D, vocab=V, layers=L, heads=8, kv_heads=4, ffn=80)
PROMPTS = [prompt_of(n) for n in (5, 17, 1, 16)]
N = 12


def generator(config=CONFIG, n_devices=8, params=None, **axes):
    return Generator(
        config,
        weights(config) if params is None else params,
        mesh=mesh_of(n_devices, **axes),
        compute=COMPUTE,
        eos_ids=(3,),
        pad_id=0,
    )


def moved(ours, name, *, sources=None):
    """What the program that reads prompts, or the loop that writes, moves in one turn: {(kind,
    elements of the array): how often}."""
    programs = ours.programs
    controls, shape = ours._checked(PROMPTS, {'max_tokens': N}, sources)
    with jax.set_mesh(programs.mesh):
        state, _, rows, _ = ours._read(PROMPTS, controls, shape, sources)
        if name == 'decode':
            lowered = programs.decode.lower(
                *(programs.params, state, rows, N), slots=16, n_top=None
            )
        else:
            lowered = programs.read.lower(
                *(programs.params, state.cache, programs.no_features(B)),
                programs.place(np.zeros((B, 32), np.int32)),
                *(programs.place(np.full(B, 5, np.int32)), 0),
                first=True,
            )
        text = lowered.compile().as_text()
    found = {}
    for c in hlo.collectives(hlo.parse(text)):
        for shape in c.shapes:
            n = int(np.prod([int(size) for size in shape.split('[')[1][:-1].split(',')]))
            found[c.kind, n] = found.get((c.kind, n), 0) + c.count
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'axes'),
    [('cpu', {'fsdp': 2, 'tensor': 4}), ('accelerator', {'data': 4, 'tensor': 2})],
)
def test_a_step_moves_activations_and_no_weight(kind, axes, monkeypatch):
    """Two sums of activations a layer, one for the embedding; one gather, of the logits."""
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: kind == 'cpu')
    ours = generator(**axes)
    rows = B * axes['tensor'] // 8
    assert moved(ours, 'decode') == {
        ('all-reduce', rows * D): 2 * L + 1,
        ('all-gather', rows * V): 1,
    }
    assert moved(ours, 'read') == {('all-reduce', rows * 32 * D): 2 * L + 1}


@pytest.mark.slow
def test_without_tensor_parallelism_a_step_moves_nothing():
    assert moved(generator(fsdp=8), 'decode') == {}


@pytest.mark.slow
def test_a_step_of_an_encoder_decoder_moves_activations_only():
    config = replace(CONFIG, encoder_layers=2)
    ours = generator(config, fsdp=2, tensor=4)
    assert moved(ours, 'decode', sources=PROMPTS) == {
        ('all-reduce', B // 2 * D): 3 * L + 1,
        ('all-gather', B // 2 * V): 1,
    }


@pytest.mark.slow
def test_a_weight_that_is_gathered_is_seen(monkeypatch):
    """Placed as for training, one of them moves at every step; else the counts above would prove
    nothing."""
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: False)
    ours = generator(fsdp=2, tensor=4)
    mlp = ours.programs.params['blocks'][0]['mlp']
    stored = jax.NamedSharding(ours.programs.mesh, layout.param('FD'))
    mlp['down_FD'] = jax.device_put(mlp['down_FD'], stored)
    assert moved(ours, 'decode')['all-gather', CONFIG.ffn // 4 * D] == 1


SHARED = {
    'one head for four devices': (replace(CONFIG, kv_heads=2), {'tensor': 8}),
    'neither divides the other': (
        replace(CONFIG, heads=12, kv_heads=6, bias=True, ffn=96),
        {'fsdp': 2, 'tensor': 4},
    ),
    'one head for all, of an encoder too': (
        replace(CONFIG, layers=1, kv_heads=1, encoder_layers=1),
        {'tensor': 8},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SHARED)
def test_more_devices_than_key_value_heads(name):
    config, axes = SHARED[name]
    sources = {'sources': PROMPTS} if config.encoder_layers else {}
    sampled = {'max_tokens': N, 'temperature': [0.0, 1.0, 2.0, 0.0], 'seed': range(4), **sources}
    one, ours = generator(config, 1), generator(config, **axes)
    assert ours(PROMPTS, **sampled) == one(PROMPTS, **sampled)
    assert len({token for row in one(PROMPTS, **sampled) for token in row.tokens}) > 9
    k_heads = ours.config.kv_heads
    assert k_heads % axes['tensor'] == 0 and config.heads % k_heads == 0
    cache = ours.programs.cache_bytes(rows=1, slots=1)
    assert cache == one.programs.cache_bytes(rows=1, slots=1) * k_heads // config.kv_heads


@pytest.mark.slow
def test_shared_heads_move_no_more_than_others():
    ours = generator(replace(CONFIG, kv_heads=2), tensor=8)
    assert moved(ours, 'decode') == {('all-reduce', B * D): 2 * L + 1, ('all-gather', B * V): 1}


@pytest.mark.slow
def test_parameters_that_lie_on_such_a_mesh():
    """As they are restored: key-value heads whole, the rest divided."""
    config = replace(CONFIG, kv_heads=2)
    mesh = mesh_of(8, fsdp=2, tensor=4)
    params = jax.device_put(weights(config), layout.shardings(weights(config), mesh))
    k_LDKH = params['blocks']['attention']['k_DKH']
    assert k_LDKH.addressable_shards[0].data.shape == (L, D // 2, 2, 8)
    ours = generator(config, fsdp=2, tensor=4, params=params)
    assert ours(PROMPTS, max_tokens=N) == generator(config, 1)(PROMPTS, max_tokens=N)


def test_query_heads_still_divide_and_training_is_strict():
    with pytest.raises(UserError, match=r'number of heads \(8\) does not divide over the 3'):
        generator(replace(CONFIG, vocab=96, ffn=96), 6, fsdp=2, tensor=3)
    with pytest.raises(UserError, match=r'key-value heads \(2\) does not divide over the 4'):
        layout.check(replace(CONFIG, kv_heads=2).sizes(), mesh_of(8, fsdp=2, tensor=4))
