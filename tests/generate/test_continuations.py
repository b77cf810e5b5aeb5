"""Scores of continuations against the plain forward pass of each text by itself."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate import continuations
from llama_jax.generate.continuations import Continuations, Request
from llama_jax.generate.finite import NotFiniteError
from llama_jax.generate.programs import Programs
from llama_jax.generate.tree import grow, packed
from llama_jax.model import layers
from tests.generate.test_cached_architectures import CONFIGS
from tests.generate.test_cached_architectures import weights as weights_of
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, weights

CONTEXT = 96
TINY = replace(CONFIG, context=CONTEXT)


def scorer(config=TINY, params=None, n=1, **axes):
    programs = Programs(
        config,
        params or weights(),
        mesh=mesh_of(n, **axes),
        compute=COMPUTE,
        end_ids=(1,),
        pad_id=0,
    )
    return Continuations(programs)


@functools.cache
def forward(config=TINY):
    """Logits of a whole row of the context's length, no cache."""
    params = weights() if config is TINY else weights_of(config)
    params = jax.device_put(params, jax.NamedSharding(mesh_of(), jax.P()))
    step = jax.jit(
        lambda token_BT, length_B: layers.bind(config, params)(
            token_BT, length_B=length_B, compute=COMPUTE
        )[0]
    )

    def logits(tokens):
        token_BT = np.zeros((1, config.context), np.int32)
        token_BT[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh_of()):
            found = step(token_BT, np.full(1, len(tokens), np.int32))
        return np.asarray(found[0, : len(tokens)], np.float64)

    return logits


def brute_force(request, config=TINY):
    """(log-probabilities, greedy) in float64 of the last `context` tokens and the one after."""
    whole = [*request.context, *request.continuation][-(config.context + 1) :]
    logits_TV = forward(config)(whole[:-1])[-len(request.continuation) :]
    log_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    rows = np.arange(len(request.continuation))
    return log_TV[rows, request.continuation], log_TV.argmax(-1) == request.continuation


def requests():
    """A prefix of all, items that share it, choices that share items and parts of each other."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(2, CONFIG.vocab, n).tolist()

    found, shots = [], draw(40)
    for n in (7, 3, 1, 12):
        item = [*shots, *draw(n)]
        begin = draw(2)
        found += [Request(item, choice) for choice in (draw(1), draw(1), begin, [*begin, *draw(3)])]
        found.append(Request(item[:-1], [item[-1], *begin]))  # another cut of one of them
    found.append(found[0])  # asked twice
    found += [Request(draw(1), draw(4)), Request(draw(3), draw(30))]
    found += [Request(draw(CONTEXT), draw(1)), Request(draw(CONTEXT + 9), draw(5))]
    found.append(Request(draw(2), draw(CONTEXT)))
    return found


def check(scores, asked, config=TINY):
    for request, scored in zip(asked, scores, strict=True):
        log_p, greedy = brute_force(request, config)
        # Float32 in another order, over two layers.
        np.testing.assert_allclose(scored.log_p, log_p, atol=2e-4)
        assert scored.greedy.tolist() == greedy.tolist()
        assert scored.total == pytest.approx(log_p.sum(), abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize('pieces', [(16, 32), (128,)], ids=['cached', 'packed'])
def test_shared_beginnings_equal_each_text_by_itself(pieces, monkeypatch):
    """With small pieces the shots are read into the cache before, and items in several bins."""
    monkeypatch.setattr(continuations, 'PIECES', pieces)
    monkeypatch.setattr(continuations, 'READ_OUT', 16)
    read = []
    check(scorer()(requests(), tell=read.append), requests())
    texts = {tuple([*r.context, *r.continuation][-(CONTEXT + 1) : -1]) for r in requests()}
    beginnings = {text[:n] for text in texts for n in range(1, len(text) + 1)}
    assert sum(read) == len(beginnings)  # each once


@pytest.mark.slow
def test_not_shared_and_divided_over_devices(monkeypatch):
    check(scorer()(requests(), shared=False), requests())
    monkeypatch.setattr(continuations, 'PIECES', (16, 32))
    check(scorer(n=8, tensor=2)(requests()), requests())


@pytest.mark.parametrize('name', ['window', 'dynamic', 'classic'])
def test_other_architectures(name):
    """Windows and rotations by length get each text by itself, learned positions go by depth."""
    config = replace(CONFIGS[name], context=64)
    asked = [r for r in requests() if len(r.context) + len(r.continuation) < 60]
    check(scorer(config, weights_of(config))(asked), asked, config)
    assert scorer(config, weights_of(config))._may_share == (name == 'classic')


@pytest.mark.slow
def test_what_cannot_be_scored():
    score = scorer()
    for request, words in (
        (Request([], [5]), 'the context of request 0 is empty'),
        (Request([5], []), 'the continuation of request 0 is empty'),
        (Request([5], [CONFIG.vocab]), 'token id 96'),
        (Request([5], [5] * (CONTEXT + 1)), '97 tokens, the context is 96'),
    ):
        with pytest.raises(UserError, match=words):
            score([request])
    assert score([]) == []
    with pytest.raises(UserError, match='encoder'):
        scorer(
            replace(TINY, encoder_layers=1),
            layers.create(replace(TINY, encoder_layers=1), jax.random.key(0), mesh_of()),
        )
    broken = {**weights(), 'norm': {'scale_D': np.full(CONFIG.dim, np.nan, np.float32)}}
    with pytest.raises(NotFiniteError, match='norm'):
        scorer(params=broken)([Request([5], [6])])


def test_a_tree_holds_every_beginning_once_however_deep():
    text = list(range(2, 2000))
    (root,) = grow([text[:n] for n in range(1, len(text))], [[7]] * (len(text) - 1))
    assert root.size == len(text) - 1
    assert len(root.tokens) == 1 and len(root.children) == 1


def test_bins_are_full():
    nodes = grow([[i] * n for i, n in enumerate([9, 8, 7, 3, 2, 1], 1)], [[1]] * 6)
    bins = packed(nodes, 10)
    assert len(bins) == 3 and all(sum(node.size for node in b) == 10 for b in bins)
