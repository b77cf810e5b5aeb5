"""A model that computes NaN: an error where text would be, and no harm to the other rows."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.generate.beam import beam_search
from llama_jax.generate.controls import Controls
from llama_jax.generate.embed import Embedder
from llama_jax.generate.finite import NotFiniteError, finite
from llama_jax.generate.generator import Generator
from llama_jax.generate.programs import Programs
from llama_jax.generate.speculative.draft import Draft, Lookup
from tests.engine.asking import ask, engine  # noqa: F401  a fixture
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, tokens_of, uncached, weights

N = 12
PROMPT = prompt_of(9)
ALONE = uncached(PROMPT, N)
AT = 5
BAD = ALONE[AT]
"""The model can draw this token, and computes nothing after it."""
GOOD = next(p for p in map(prompt_of, range(4, 40)) if BAD not in [*p, *uncached(p, N)])
assert BAD not in [*PROMPT, *ALONE[:AT]]


@functools.cache
def broken(bad=BAD):
    embed_VD = weights()['embed_VD'].copy()
    embed_VD[bad] = np.nan
    return {**weights(), 'embed_VD': embed_VD}


@functools.cache
def generator():
    return Generator(
        CONFIG, broken(), mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0, prefill_chunk=16
    )


def test_what_can_be_drawn_from():
    inf, nan = np.inf, np.nan
    rows = [[0, -inf, 3], [nan, 1, 2], [1, 2, nan], [1, inf, 0], [-inf] * 3, [-3e38, 3e38, 0]]
    told = jax.jit(finite)(np.array(rows, np.float32))
    assert told.tolist() == [True, False, False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize('drawn', [{}, {'temperature': 1e-3, 'logprobs': 2}])
def test_a_stream_gives_what_was_drawn_and_then_the_error(drawn):
    told = []
    with pytest.raises(NotFiniteError, match=r'weights hold NaN.*\(embed_VD\): copy them again'):
        for tokens in generator().stream(PROMPT, chunk=4, max_tokens=N, **drawn):
            told += tokens
    assert told == ALONE[: AT + 1]


def small():
    return Programs(CONFIG, weights(), mesh=mesh_of(), compute=COMPUTE, end_ids=(), pad_id=0)


@pytest.mark.parametrize(
    ('how', 'temperature'),
    [(None, 0.0), (Lookup(least=1, n_draft=3), 0.0), ('draft', 0.0), ('draft', 1e-3)],
)
def test_a_batch_names_the_prompt(how, temperature):
    settings = {'max_tokens': [N, AT + 2], 'temperature': temperature, 'speculate': how}
    if how == 'draft':
        settings['speculate'] = Draft(small(), n_draft=3)
    with pytest.raises(NotFiniteError, match='prompt 1: the model gives NaN'):
        generator()([GOOD, PROMPT], **settings)
    expected = [uncached(GOOD, N), ALONE[: AT + 1]]
    if how is not None:  # a draft may be the token, and is read as soon as it is made
        expected[1] = ALONE[:AT]
    # What comes after the last token is not asked for.
    two = generator()([GOOD, PROMPT], **{**settings, 'max_tokens': [N, len(expected[1])]})
    assert tokens_of(two) == expected


def test_a_prompt_alone_is_enough():
    with pytest.raises(NotFiniteError, match='prompt 0'):
        generator()([[*GOOD, BAD]], max_tokens=1)


@pytest.mark.slow
def test_beams_end_too():
    ours = generator().programs
    (best,) = beam_search(ours, [GOOD], beams=1, max_tokens=N)[0]
    assert best.tokens == uncached(GOOD, N)
    with pytest.raises(NotFiniteError, match='prompt 1: the model gives NaN'):
        beam_search(ours, [GOOD, PROMPT], beams=1, max_tokens=N)
    with pytest.raises(NotFiniteError, match='prompt 0'):
        beam_search(ours, [[*GOOD, BAD]], beams=3, max_tokens=2)


def test_vectors_name_the_text():
    embed = Embedder(generator().programs)
    assert np.isfinite(embed([GOOD])).all()
    with pytest.raises(NotFiniteError, match='text 1: the model gives NaN'):
        embed([GOOD, [*GOOD, BAD]])


@pytest.mark.slow
@pytest.mark.parametrize('lookup', [None, Lookup(n_draft=3)])
def test_other_requests_go_on_and_the_row_is_clean_for_the_next(engine, lookup):  # noqa: F811
    one = engine(generator().programs, rows=2, speculate=lookup)
    greedy = Controls(temperature=0.0, max_tokens=N)
    scored = Controls(temperature=0.0, max_tokens=N, prompt_logprobs=1)
    asked = [(PROMPT, greedy), ([*GOOD, BAD], greedy), ([GOOD[0], BAD, *GOOD], scored)]
    heard = [ask(one, *each).wait() for each in asked]
    slots = one._slots
    cleared = slots._on.clear._cache_size()
    both = [ask(one, p, greedy) for p in (GOOD, PROMPT, GOOD)]
    assert [h.wait().finish.reason for h in both] == ['length', 'error', 'length']
    assert both[0].tokens == both[2].tokens == uncached(GOOD, N)
    for told in (heard[0], both[1]):
        assert told.tokens == ALONE[: AT + 1], 'what was drawn before is told'
        assert told.finish.completion_tokens == AT + 1
        assert 'weights hold NaN or infinity (embed_VD)' in told.finish.message
    assert [h.finish.reason for h in heard] == ['error'] * 3
    assert not heard[1].tokens and not heard[2].tokens
    # Every row has failed by now, and every row still serves.
    after = [ask(one, GOOD, controls) for controls in (greedy, scored, greedy)]
    assert [h.wait().tokens for h in after] == [uncached(GOOD, N)] * 3
    assert one.stats().requests_total == {'error': 4, 'length': 5}
    assert slots._on.clear._cache_size() == cleared
    assert slots._on.steps._cache_size() <= len(slots.sizes)


@pytest.mark.slow
def test_finite_weights_that_overflow_are_told_apart():
    large = {**weights(), 'norm': {'scale_D': np.full(CONFIG.dim, 3e38, np.float32)}}
    with pytest.raises(NotFiniteError, match='weights are finite, and overflow in float32'):
        Generator(CONFIG, large, mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)([GOOD])


@pytest.mark.slow
def test_each_device_tells_of_its_rows():
    mesh = mesh_of(2, data=2)
    made = Generator(CONFIG, broken(), mesh=mesh, compute=COMPUTE, eos_ids=(), pad_id=0)
    with pytest.raises(NotFiniteError, match='prompt 1'):
        made([GOOD, PROMPT], max_tokens=N)
