"""Beam search against one written plainly, and against all texts there are."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.beam import beam_search
from llama_jax.generate.programs import Programs
from llama_jax.model import layers
from tests.generate.test_cached_architectures import weights as weights_of
from tests.generate.tiny import (
    COMPUTE,
    CONFIG,
    forward,
    mesh_of,
    nothing_compiles,
    prompt_of,
    uncached,
    weights,
)

ENDS = (5, 17, 29, 31, 46, 60, 75, 88)
T = 12


def programs(n_devices=1, end_ids=ENDS, config=CONFIG, params=None, **axes):
    return Programs(
        config,
        weights() if params is None else params,
        mesh=mesh_of(n_devices, **axes),
        compute=COMPUTE,
        end_ids=end_ids,
        pad_id=0,
    )


OURS = programs()


def log_softmax(logits):
    logits = np.float64(logits) - logits.max()
    return logits - np.log(np.exp(logits).sum())


_known = {}


def after(tokens):
    """Log-probabilities of what follows, by the plain forward pass."""
    if tokens not in _known:
        _known[tokens] = log_softmax(forward()(list(tokens)))
    return _known[tokens]


def plain(
    prompt, *, beams, max_tokens, ends, length_penalty=1.0, early_stopping=False, after=after
):
    """Beam search with lists: [(tokens with the end id, score)], best first."""
    running, ended = [((), 0.0)], []
    for n in range(1, max_tokens + 1):
        every = []
        for tokens, score in running:
            log_V = after((*prompt, *tokens))
            every += [((*tokens, v), score + log) for v, log in enumerate(log_V)]
        every.sort(key=lambda one: -one[1])
        running = []
        for rank, (tokens, score) in enumerate(every):
            if tokens[-1] in ends or n == max_tokens:
                if rank < beams:
                    ended.append((tokens, score / n**length_penalty))
            elif len(running) < beams:
                running.append((tokens, score))
        ended = sorted(ended, key=lambda one: -one[1])[:beams]
        if not running:
            break
        if len(ended) == beams:
            longest = early_stopping == 'never' and length_penalty > 0
            hope = running[0][1] / (max_tokens if longest else n) ** length_penalty
            if early_stopping is True or hope <= ended[-1][1]:
                break
    return ended


def assert_same(found, expected, ends):
    assert len(found) == len(expected)
    for one, (tokens, score) in zip(found, expected, strict=True):
        ended = tokens[-1] in ends
        assert one.tokens == list(tokens[:-1] if ended else tokens)
        assert one.finish_reason == ('stop' if ended else 'length')
        np.testing.assert_allclose(one.score, score, rtol=1e-5, atol=1e-4)


PROMPTS = [prompt_of(n) for n in (5, 17, 1, 16)]


@pytest.mark.slow
@pytest.mark.parametrize('early_stopping', [True, False, 'never'])
@pytest.mark.parametrize('length_penalty', [-1.0, 0.0, 1.0, 2.5])
def test_equals_beam_search_written_plainly(early_stopping, length_penalty):
    """Prompts of several lengths together; three beams."""
    rules = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    found = beam_search(OURS, PROMPTS, beams=3, n=3, max_tokens=T, **rules)
    lengths = set()
    for prompt, ours in zip(PROMPTS, found, strict=True):
        assert_same(ours, plain(prompt, beams=3, max_tokens=T, ends=ENDS, **rules), ENDS)
        lengths |= {len(one.tokens) for one in ours}
    assert len(lengths) > 1, 'some end before others'


def test_rules_make_a_difference():
    """Else the comparison above would say little."""
    every = [
        [
            [one.tokens for one in row]
            for row in beam_search(OURS, PROMPTS, beams=3, n=3, max_tokens=T, **rules)
        ]
        for rules in (
            dict(early_stopping=True),
            dict(early_stopping=False, length_penalty=-1.0),
            dict(early_stopping='never', length_penalty=2.5),
        )
    ]
    assert all(one != other for one, other in itertools.combinations(every, 2))


@pytest.mark.parametrize('beams', [2, 6])
def test_numbers_of_beams(beams):
    [found] = beam_search(OURS, PROMPTS[:1], beams=beams, n=beams, max_tokens=T)
    assert_same(found, plain(PROMPTS[0], beams=beams, max_tokens=T, ends=ENDS), ENDS)


def test_one_beam_is_greedy():
    endless = programs(end_ids=())
    for prompt, [found] in zip(
        PROMPTS, beam_search(endless, PROMPTS, beams=1, max_tokens=T), strict=True
    ):
        assert found.tokens == uncached(prompt, T) and found.finish_reason == 'length'


@pytest.mark.slow
def test_the_best_come_first_and_n_of_them():
    three = beam_search(OURS, PROMPTS, beams=4, n=3, max_tokens=T)
    one = beam_search(OURS, PROMPTS, beams=4, max_tokens=T)
    assert [row[:1] for row in three] == one
    for row in three:
        assert [h.score for h in row] == sorted((h.score for h in row), reverse=True)
        assert len({(*h.tokens, h.finish_reason) for h in row}) == 3


def test_stop_ids_end_a_text_too():
    few, rest = programs(end_ids=ENDS[:2]), ENDS[2:]
    rules = dict(beams=3, n=3, max_tokens=T)
    assert beam_search(few, PROMPTS, stop_ids=rest, **rules) == beam_search(OURS, PROMPTS, **rules)


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 2, 'tensor': 2}, {}])
def test_eight_devices_equal_one(axes):
    sharded = programs(8, **axes)
    rules = dict(beams=3, n=3, max_tokens=T)
    ours, theirs = (beam_search(one, PROMPTS, **rules) for one in (OURS, sharded))
    for row, other in zip(ours, theirs, strict=True):
        assert [h.tokens for h in row] == [h.tokens for h in other]
        np.testing.assert_allclose(
            [h.score for h in row], [h.score for h in other], rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_alone_equals_together_and_pieces_equal_whole():
    rules = dict(beams=3, n=2, max_tokens=T)
    together = beam_search(OURS, PROMPTS, **rules)
    pieces = beam_search(OURS, PROMPTS, prefill_chunk=16, **rules)
    alone = [beam_search(OURS, [prompt], **rules)[0] for prompt in PROMPTS[:2]]
    for rows in (pieces, alone):
        for one, row in zip(rows, together, strict=False):
            assert [h.tokens for h in one] == [h.tokens for h in row]


@pytest.mark.slow
@pytest.mark.parametrize('length_penalty', [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(length_penalty):
    """Of a vocabulary of four: all texts of up to three tokens, scored one by one."""
    config, ends = replace(CONFIG, vocab=4, layers=1, context=16), (3,)
    params = weights_of(config)
    mesh = mesh_of()
    placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    model = jax.jit(lambda token_BT: layers.bind(config, placed)(token_BT, compute=COMPUTE)[0])

    def score(tokens):
        token_BT = np.zeros((1, 16), np.int32)
        token_BT[0, : 1 + len(tokens)] = [1, *tokens]
        with jax.set_mesh(mesh):
            logits_TV = np.asarray(model(token_BT))[0]
        each = [log_softmax(logits_TV[t])[token] for t, token in enumerate(tokens)]
        return sum(each) / len(tokens) ** length_penalty

    texts = [t for n in (1, 2, 3) for t in itertools.product(range(4), repeat=n)]
    texts = [t for t in texts if 3 not in t[:-1] and (t[-1] == 3 or len(t) == 3)]
    expected = sorted(((text, score(text)) for text in texts), key=lambda one: -one[1])
    assert len(expected) == 1 + 3 + 9 + 27
    ours = programs(end_ids=ends, config=config, params=params)
    [found] = beam_search(
        *(ours, [[1]]),
        beams=40,
        n=40,
        max_tokens=3,
        length_penalty=length_penalty,
        early_stopping='never',
    )
    assert_same(found, expected, ends)


def test_lengths_and_rules_compile_nothing():
    beam_search(OURS, PROMPTS, beams=3, max_tokens=T)
    with nothing_compiles():
        rules = dict(length_penalty=0.5, early_stopping='never', n=2, max_tokens=T - 3)
        beam_search(OURS, [prompt_of(n) for n in (30, 2, 9)], beams=3, **rules)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'prompts': []}, 'no prompts'),
        ({'prompts': [[1], []]}, 'prompt 1 is empty'),
        ({'prompts': [[96]]}, 'token id 96'),
        ({'prompts': [[1] * 250]}, "model's context of 256"),
        ({'beams': 0}, 'beams 0'),
        ({'n': 4}, 'n 4 is not within 1 and the 3 beams'),
        ({'max_tokens': 0}, 'max_tokens 0'),
        ({'length_penalty': float('nan')}, 'length_penalty nan'),
        ({'early_stopping': 'ever'}, "early_stopping 'ever'"),
        ({'stop_ids': [96]}, 'stop_ids: token id 96'),
    ],
)
def test_bad_input_is_named(arguments, message):
    arguments = {'prompts': [[1]], 'beams': 3, 'max_tokens': T, **arguments}
    with pytest.raises(UserError, match=message) as error:
        beam_search(OURS, arguments.pop('prompts'), **arguments)
    assert '\n' not in str(error.value)
