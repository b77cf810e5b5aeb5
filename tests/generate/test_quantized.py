"""Generation with fewer bits equals a plain model in float64 with the same numbers rounded.

Bounds are of log-probabilities whose span is about 40. Floats of a kept key or value that lie
between two integers may round to either, which is why the cache of int8 has a wider one.
"""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.beam import beam_search
from llama_jax.generate.engine import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.model import layers
from llama_jax.model.patterns import Window
from tests.generate.test_batching import GREEDY, ask, engine  # noqa: F401 (a fixture)
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, tokens_of, weights

CHUNK, N = 16, 12
SUMMED = {'out': (0, 1), 'embed': (1,), 'head': (1,)}
HOW = {
    'nothing': (Quantization(), 2e-4),
    'int8': (Quantization(weights='int8'), 5e-3),
    'int4': (Quantization(weights='int4', group=8), 5e-3),
    'cache': (Quantization(cache='int8'), 5e-2),
    'both': (Quantization(weights='int8', cache='int8'), 5e-2),
}


@functools.cache
def generator(quantization, config=CONFIG):
    settings = {'mesh': mesh_of(), 'compute': COMPUTE, 'eos_ids': (), 'pad_id': 0}
    return Generator(config, weights(), prefill_chunk=CHUNK, quantization=quantization, **settings)


def rounded(x, axes, bits=8):
    most = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis=axes, keepdims=True) / most
    return np.round(x / scale) * scale


def plain_weights(how):
    """Float64, by layer, with what `how` rounds rounded."""

    def change(path, x):
        name, x = path[-1].key, np.float64(x)
        kind = name.split('_')[0]
        if 'scale' in name or how.weights is None:
            return x
        axes = SUMMED.get(kind, (0,))
        if how.weights == 'int8' or kind in ('embed', 'head'):
            return rounded(x, axes)
        axis = axes[-1]  # where inputs lie in groups
        shape = x.shape[:axis] + (-1, how.group) + x.shape[axis + 1 :]
        return rounded(x.reshape(shape), axis + 1, bits=4).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(change, layers.unstack(weights()))


def norm(x_TD, scale_D):
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale_D


def turned(x_TNH):
    H = CONFIG.head_dim
    angle = np.arange(len(x_TNH))[:, None, None] * CONFIG.rope_theta ** -(np.arange(0, H, 2) / H)
    a, b = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def reference(how, tokens, n_prompt, window=None):
    """Log-probabilities after every token. The first piece of a prompt sees its own keys and values
    as they are, all else sees them as they are kept."""
    params, n = plain_weights(how), len(tokens)
    place = np.arange(n)
    sees_TS = (place <= place[:, None]) & (place[:, None] - place < (window or n))
    as_kept = (place >= min(n_prompt, CHUNK)) & (how.cache is not None)
    x_TD = params['embed_VD'][np.array(tokens)]
    for block in params['blocks']:
        w, h_TD = block['attention'], norm(x_TD, block['attention_norm']['scale_D'])
        q_TNH = turned(np.einsum('TD,DNH->TNH', h_TD, w['q_DNH']))
        k_TKH = turned(np.einsum('TD,DKH->TKH', h_TD, w['k_DKH']))
        v_TKH = np.einsum('TD,DKH->TKH', h_TD, w['v_DKH'])

        def attended(k_TKH, v_TKH, q_TNH=q_TNH):
            k_TNH, v_TNH = (
                np.repeat(x, CONFIG.heads // CONFIG.kv_heads, 1) for x in (k_TKH, v_TKH)
            )
            score_NTS = np.einsum('TNH,SNH->NTS', q_TNH, k_TNH) / np.sqrt(CONFIG.head_dim)
            weight_NTS = softmax(np.where(sees_TS, score_NTS, -np.inf))
            return np.einsum('NTS,SNH->TNH', weight_NTS, v_TNH)

        exact, kept = attended(k_TKH, v_TKH), attended(rounded(k_TKH, 2), rounded(v_TKH, 2))
        mixed_TNH = np.where(as_kept[:, None, None], kept, exact)
        x_TD = x_TD + np.einsum('TNH,NHD->TD', mixed_TNH, w['out_NHD'])
        w, h_TD = block['mlp'], norm(x_TD, block['mlp_norm']['scale_D'])
        gate_TF = h_TD @ w['gate_DF']
        x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ w['up_DF'])) @ w['down_FD']
    head_VD = params['embed_VD' if CONFIG.tied else 'head_VD']
    return np.log(softmax(norm(x_TD, params['norm']['scale_D']) @ head_VD.T))


def check(ours, how, bound, window=None):
    prompts = [prompt_of(n) for n in (30, 17, 3)]
    completions = ours(prompts, max_tokens=N, logprobs=3)
    for prompt, one in zip(prompts, completions, strict=True):
        log_TV = reference(how, prompt + one.tokens, len(prompt), window)[len(prompt) - 1 : -1]
        assert one.tokens == log_TV.argmax(-1).tolist()
        theirs = log_TV[np.arange(N), one.tokens]
        np.testing.assert_allclose([x.logprob for x in one.logprobs], theirs, atol=bound)
    return prompts, completions


@pytest.mark.parametrize('name', HOW)
def test_equals_the_rounded_model_in_float64(name):
    how, bound = HOW[name]
    prompts, completions = check(generator(how), how, bound)
    if name != 'nothing':
        ours = [one.logprobs[0].logprob for one in completions]
        whole = [
            one.logprobs[0].logprob
            for one in generator(Quantization())(prompts, max_tokens=N, logprobs=3)
        ]
        assert not np.allclose(ours, whole, atol=1e-5), 'something was rounded'


def test_a_ring_of_int8():
    how, bound = HOW['cache']
    ours = generator(how, replace(CONFIG, pattern=Window(5)))
    assert ours.shape(3, 30, N).slots == 32
    check(ours, how, bound, window=5)


def test_rows_do_not_depend_on_each_other():
    ours, prompts = generator(HOW['both'][0]), [prompt_of(n) for n in (30, 17, 3)]
    together = tokens_of(ours(prompts, max_tokens=N))
    assert together == [ours([prompt], max_tokens=N)[0].tokens for prompt in prompts]


def test_the_engine_copies_a_beginning_of_int8(engine):  # noqa: F811
    ours, prompt = engine(generator(HOW['both'][0]).programs), prompt_of(40)
    controls = replace(GREEDY, logprobs=2)
    first, again = (ask(ours, prompt, controls).wait() for _ in range(2))
    assert (first.finish.cached_tokens, again.finish.cached_tokens) == (0, 32)
    assert first.tokens == again.tokens and first.logprobs == again.logprobs
    assert first.tokens == generator(HOW['both'][0])([prompt], max_tokens=12)[0].tokens


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
    for w in (block['mlp']['gate_FD'], block['attention']['q_NHD'], programs.params['embed_VD']):
        assert w.value.dtype == np.int8 and w.scale.dtype == np.float32
    with jax.set_mesh(programs.mesh):
        cache = programs.empty(batch=1, slots=32)
        x_BD, token_BT = programs.no_features(1), programs.place(np.zeros((1, 16), np.int32))
        length = programs.place(np.array([16], np.int32))
        arguments = (programs.params, cache, x_BD, token_BT, length, 0)
        text = programs.read.lower(*arguments, first=True).compile().as_text()
    F, D = block['mlp']['gate_FD'].shape
    entry = text[text.index('\nENTRY') :]
    assert f's8[{F},{D}]' in entry
    assert f'f32[{F},{D}]' not in text and f'f32[{D},{F}]' not in text
    kept = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert kept == programs.cache_bytes(rows=1, slots=32)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Quantization(weights='int3'), "weights 'int3': there is int8 and int4"),
        (lambda: Quantization(cache='int4'), "cache 'int4': there is int8"),
        (lambda: Quantization(group=0), 'group 0'),
        (lambda: generator(Quantization(weights='int4', group=7)), 'groups of 7 inputs'),
        (
            lambda: generator(Quantization(cache='int8'), replace(CONFIG, encoder_layers=1)),
            'encoder_layers 0',
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
