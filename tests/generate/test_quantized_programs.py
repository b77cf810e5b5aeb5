"""Integers beside what else generation does: the engine, beams, several devices, accelerators."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.beam import beam_search
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.model import quantized as arrays
from tests.engine.asking import GREEDY, ask, engine  # noqa: F401 (a fixture)
from tests.generate.rounded import CHUNK, HOW, N, check, generator, reference
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights


def sharded(quantization, **axes):
    settings = {'compute': COMPUTE, 'eos_ids': (), 'pad_id': 0, 'prefill_chunk': CHUNK}
    mesh = mesh_of(8, **axes)
    params = jax.device_put(weights(), layout.shardings(weights(), mesh))
    return Generator(CONFIG, params, mesh=mesh, quantization=quantization, **settings)


@pytest.mark.slow
def test_several_devices():
    how, bound = HOW['both']
    ours = sharded(how, data=2, tensor=2)
    check(ours, how, bound)
    whole, part = weights()['blocks']['mlp']['gate_DF'], ours.programs.params['blocks'][0]
    assert part['mlp']['gate_up_JFD'].value.addressable_shards[0].data.size == whole[0].size


@pytest.mark.slow
def test_an_accelerators_products(monkeypatch):
    """Which convert integers; the weights lie as in training."""
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: False)
    monkeypatch.setattr(arrays, 'platform_in_use', lambda: 'tpu')
    for how, bound in (HOW['both'], (Quantization('int4', 'int8', group=8), 5e-2)):
        ours = sharded(how, data=2, tensor=2)
        gate_DF = ours.programs.params['blocks'][0]['mlp']['gate_DF']
        assert gate_DF.value.dtype.name == how.weights
        check(ours, how, bound)


def test_groups_that_the_mesh_does_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: False)
    with pytest.raises(UserError, match='another group'):
        sharded(Quantization('int4', group=64), data=2, tensor=2)


@pytest.mark.slow
def test_the_engine_copies_a_beginning_of_int8(engine):  # noqa: F811
    ours, prompt = engine(generator(HOW['both'][0]).programs), prompt_of(40)
    controls = replace(GREEDY, logprobs=2)
    first, again = (ask(ours, prompt, controls).wait() for _ in range(2))
    assert (first.finish.cached_tokens, again.finish.cached_tokens) == (0, 32)
    assert first.tokens == again.tokens and first.logprobs == again.logprobs
    assert first.tokens == generator(HOW['both'][0])([prompt], max_tokens=12)[0].tokens


@pytest.mark.slow
def test_beams_follow_a_cache_of_int8():
    """One beam is greedy; the score of each of several is that of the model in float64."""
    (how, bound), prompt = HOW['cache'], prompt_of(9)
    ours = generator(how)
    search = functools.partial(beam_search, ours.programs, [prompt], max_tokens=N)
    assert search(beams=1)[0][0].tokens == ours([prompt], max_tokens=N)[0].tokens
    for found in search(beams=3, n=3)[0]:
        log_TV = reference(how, prompt + found.tokens, len(prompt))[len(prompt) - 1 : -1]
        score = log_TV[np.arange(N), found.tokens].sum() / N
        np.testing.assert_allclose(found.score, score, atol=bound)


def test_integers_are_arguments_of_the_program_and_stay_integers():
    programs = generator(HOW['both'][0]).programs
    block = programs.params['blocks'][0]
    qkv_KJHD, embed_VD = block['attention']['qkv_KJHD'], programs.params['embed_VD']
    for w in (block['mlp']['gate_up_JFD'], qkv_KJHD, embed_VD):
        assert w.value.dtype == np.int8 and w.scale.dtype == np.float32
    with jax.set_mesh(programs.mesh):
        cache = programs.empty(batch=1, slots=32)
        x_BD, token_BT = programs.no_features(1), programs.place(np.zeros((1, 16), np.int32))
        length = programs.place(np.array([16], np.int32))
        arguments = (programs.params, cache, x_BD, token_BT, length, 0)
        text = programs.read.lower(*arguments, first=True).compile().as_text()
    J, F, D = block['mlp']['gate_up_JFD'].shape
    entry = text[text.index('\nENTRY') :]
    assert f's8[{J},{F},{D}]' in entry
    for shape in (f'{J},{F},{D}', f'{J * F},{D}', f'{D},{J * F}', f'{F},{D}', f'{D},{F}'):
        assert f'f32[{shape}]' not in text
    kept = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert kept == programs.cache_bytes(rows=1, slots=32)
