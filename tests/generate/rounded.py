"""A plain model in float64 whose numbers are rounded as those of generation are.

Bounds are of log-probabilities whose span is about 40. Floats of a kept key or value that lie
between two integers may round to either, which is why the cache of int8 has a wider one.
"""

import functools

import jax
import numpy as np

from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.model import layers
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights

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
