"""Every request gets what it would get alone, whatever the others do."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.engine import slots
from llama_jax.engine.request import Finish, PromptScores
from llama_jax.generate.controls import Controls
from llama_jax.generate.generator import Generator
from llama_jax.generate.speculative.draft import Lookup
from llama_jax.model import cache
from llama_jax.model.config import Dynamic
from llama_jax.model.patterns import Window
from tests.engine.asking import GREEDY, MIXED, ask, programs, text_of
from tests.generate.tiny import COMPUTE, CONFIG, generator, mesh_of, prompt_of, uncached, weights


def test_greedy_equals_the_uncached_forward(engine):
    """More requests than rows, prompts of one piece and of several."""
    ours = engine()
    heard = [ask(ours, prompt_of(n)) for n in (1, 15, 16, 17, 40, 33)]
    for n, one in zip((1, 15, 16, 17, 40, 33), heard, strict=True):
        assert one.wait().tokens == uncached(prompt_of(n), 12)
        assert one.text == text_of(one.tokens)
        assert one.finish == Finish('length', n, 12, 0)


@pytest.mark.slow
@pytest.mark.parametrize(('speculate', 'n'), [(None, 128), (Lookup(n_draft=4), 124)])
def test_a_prompt_that_fills_its_row_is_shared_as_it_was_read(engine, monkeypatch, speculate, n):
    """It is only scored, and steps of other rows go on over its row, those with drafts too."""
    monkeypatch.setattr(slots, 'is_cpu', lambda mesh: False)  # all rows are in each step
    monkeypatch.setattr(cache, 'platform_in_use', lambda: 'gpu')
    ours, whole = engine(rows=3, length=n, speculate=speculate), prompt_of(n)
    other, controls = [*whole[:80], *prompt_of(7)], replace(GREEDY, logprobs=0)
    alone = ask(ours, other, controls, owner='another').wait()
    ask(ours, whole, replace(GREEDY, prompt_logprobs=0, max_tokens=0)).wait()
    ask(ours, [5, 6, 7, 8] * 6, replace(GREEDY, max_tokens=20)).wait()
    one = ask(ours, other, controls).wait()
    assert one.finish.cached_tokens == 80 and alone.finish.cached_tokens == 0
    assert one.tokens == alone.tokens == uncached(other, len(one.tokens))
    for a, b in zip(one.logprobs, alone.logprobs, strict=True):
        np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('together', [False, True], ids=['slots apart', 'one array'])
def test_a_row_does_not_depend_on_its_mates(engine, monkeypatch, together):
    """Where all slots are one array, as on accelerators, to the last bit; on a CPU as far as
    products of several sizes sum alike. Arrivals at any time, whose prompts are read by turns."""
    if together:
        monkeypatch.setattr(slots, 'is_cpu', lambda mesh: False)
    ours = engine(rows=5, steps=3)
    assert ours._slots.sizes == ((5,) if together else (1, 2, 4, 5))
    alone = [ask(ours, prompt_of(n), controls).wait() for n, controls in MIXED]
    rng, sizes = np.random.default_rng(0), set()
    steps = ours._slots.steps
    monkeypatch.setattr(
        ours._slots, 'steps', lambda some, *n, **how: sizes.add(len(some)) or steps(some, *n, **how)
    )
    for pause in (0, 0.01):
        heard = {}
        for i in rng.permutation(len(MIXED)):
            heard[i] = ask(ours, prompt_of(MIXED[i][0]), MIXED[i][1])
            time.sleep(pause * rng.uniform())
        for i, one in heard.items():
            assert one.wait().tokens == alone[i].tokens
            assert one.finish.reason == alone[i].finish.reason
            if together:
                assert one.logprobs == alone[i].logprobs, 'floats, compared as they are'
            for a, b in zip(one.logprobs, alone[i].logprobs, strict=True):
                np.testing.assert_allclose(a.logprob, b.logprob, atol=1e-4)
    assert {ours._slots.size(n) for n in sizes} == ({5} if together else {1, 2, 4})
    assert len(alone[3].logprobs) == 9 and len(alone[3].logprobs[0].top) == 2
    assert alone[7].finish.reason == 'stop' and len(alone[7].tokens) >= 6


@pytest.mark.slow
def test_engine_equals_generator(engine):
    ours = engine()
    for n, controls in MIXED:
        settings = {name: getattr(controls, name) for name in Controls.__dataclass_fields__}
        settings.pop('prompt_logprobs'), settings.pop('stop')
        [completion] = generator()([prompt_of(n)], **settings)
        one = ask(ours, prompt_of(n), controls).wait()
        assert one.tokens == completion.tokens
        assert one.finish.reason == completion.finish_reason


@pytest.mark.slow
def test_tensor_parallel_equals_one_device(engine):
    sharded = engine(programs(n_devices=2, tensor=2))
    ours = engine()
    pairs = [[ask(one, prompt_of(n), controls) for one in (sharded, ours)] for n, controls in MIXED]
    for theirs, one in pairs:
        assert theirs.wait().tokens == one.wait().tokens


@pytest.mark.slow
def test_a_window_decodes_in_a_ring(engine):
    config = replace(CONFIG, pattern=Window(5))
    ours = engine(programs(config), length=120)
    assert ours._slots._room == 32
    whole = engine(programs(config), length=120)
    whole._slots._room = 128
    whole._slots.reset()
    # Together: while a long prompt is read, and after it, short ones run beside it.
    controls, lengths = replace(GREEDY, max_tokens=40), (3, 40, 70, 17)
    rings, rows = ([ask(one, prompt_of(n), controls) for n in lengths] for one in (ours, whole))
    for ring, row in zip(rings, rows, strict=True):
        assert ring.wait().tokens == row.wait().tokens and len(set(ring.tokens)) > 4


@pytest.mark.slow
def test_positions_that_go_by_length_go_by_that_of_each_text(engine):
    config = replace(CONFIG, rope_scaling=Dynamic(4.0, 24))
    ours = engine(programs(config))
    alone = Generator(*(config, weights()), mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0)
    # The same prompt once more, for a longer text: its keys are others, from the first on.
    asked = [(20, 4), (40, 4), (20, 12)]
    heard = [ask(ours, prompt_of(n), replace(GREEDY, max_tokens=more)) for n, more in asked]
    found = [one.wait() for one in heard]
    for (n, more), one in zip(asked, found, strict=True):
        (expected,) = alone([prompt_of(n)], max_tokens=more)
        assert one.tokens == expected.tokens
        assert one.finish.cached_tokens == 0
    assert found[0].tokens != found[2].tokens[:4], 'the length is seen'


def test_prompt_scores_are_those_of_the_forward_pass(engine):
    prompt = prompt_of(37)
    ours = engine()
    one = ask(ours, prompt, replace(GREEDY, prompt_logprobs=3)).wait()
    [scores] = [event for event in one if isinstance(event, PromptScores)]
    assert isinstance(one[0], PromptScores)
    from tests.generate.tiny import forward

    for i, score in enumerate(scores.logprobs, start=1):
        log_V = np.asarray(jax.nn.log_softmax(forward()(prompt[:i])))
        assert score.token == prompt[i]
        np.testing.assert_allclose(score.logprob, log_V[prompt[i]], atol=2e-4)
        best = np.argsort(-log_V)[:3]
        assert [token for token, _ in score.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in score.top], log_V[best], atol=2e-4)
    assert len(scores.logprobs) == 36

    # Nothing but these, for a prompt that fills its row; then the end that was drawn, as likely as
    # the model says.
    whole = prompt_of(128)
    alone = ask(ours, whole, replace(GREEDY, prompt_logprobs=0, max_tokens=0)).wait()
    assert isinstance(alone[0], PromptScores) and len(alone[0].logprobs) == 127
    assert len(alone) == 2 and alone.finish.reason == 'length'
    assert alone.finish.completion_tokens == 0
    ended = replace(GREEDY, stop_ids=(7,), logit_bias={7: 100.0}, logprobs=0)
    one = ask(ours, prompt, ended).wait()
    assert not one.tokens and one.finish.end.token == 7
    log_V = np.asarray(jax.nn.log_softmax(forward()(prompt)))
    np.testing.assert_allclose(one.finish.end.logprob, log_V[7], atol=2e-4)
