"""Continuous batching: every request gets what it would get alone, whatever the others do."""

import functools
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate.batching import Engine
from llama_jax.generate.engine import Generator
from llama_jax.generate.guess import Lookup
from llama_jax.generate.programs import Programs
from llama_jax.generate.request import (
    Controls,
    Finish,
    Piece,
    PromptScores,
    QueueFullError,
    Request,
)
from llama_jax.model.config import Dynamic
from llama_jax.model.patterns import Window
from tests.generate.tiny import COMPUTE, CONFIG, generator, mesh_of, prompt_of, uncached, weights

GREEDY = Controls(temperature=0.0, max_tokens=12)


def text_of(ids):
    """A tokenizer of characters: id i is one CJK character."""
    return ''.join(chr(0x4E00 + i) for i in ids)


def token_bytes(token):
    return text_of([token]).encode()


@functools.cache
def programs(config=CONFIG, n_devices=1, **axes):
    return Programs(
        config,
        weights(),
        mesh=mesh_of(n_devices, **axes),
        compute=COMPUTE,
        end_ids=(),
        pad_id=0,
    )


@pytest.fixture
def engine():
    with_defaults = {'rows': 3, 'length': 128, 'prefill_chunk': 16, 'steps': 4}
    made = []

    def make(programs_=None, **sizes):
        made.append(
            Engine(programs_ or programs(), token_bytes=token_bytes, **{**with_defaults, **sizes})
        )
        return made[-1]

    yield make
    for one in made:
        one.close()
        stats = one.stats()
        assert (stats.rows_busy, stats.waiting) == (0, 0), 'no row leaks'


class Heard(list):
    """The events of one request."""

    def __init__(self):
        super().__init__()
        self.done = threading.Event()

    def __call__(self, event):
        self.append(event)
        if isinstance(event, Finish):
            self.done.set()

    def wait(self):
        assert self.done.wait(60), 'the request ends'
        return self

    @property
    def pieces(self):
        return [event for event in self if isinstance(event, Piece)]

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self):
        return ''.join(piece.text for piece in self.pieces)

    @property
    def logprobs(self):
        return [logprob for piece in self.pieces for logprob in piece.logprobs]

    @property
    def finish(self):
        assert isinstance(self[-1], Finish) and sum(isinstance(e, Finish) for e in self) == 1
        return self[-1]


def ask(engine, prompt, controls=GREEDY, **rest):
    heard = Heard()
    heard.ticket = engine.submit(Request(prompt, controls, **rest), heard)
    return heard


MIXED = [
    (5, GREEDY),
    (40, replace(GREEDY, max_tokens=30)),
    (16, Controls(temperature=0.9, top_p=0.9, seed=3, max_tokens=20)),
    (17, Controls(temperature=2.0, min_p=0.01, seed=4, max_tokens=9, logprobs=2)),
    (1, Controls(temperature=1.0, top_k=9, seed=5, max_tokens=25, repetition_penalty=1.3)),
    (33, Controls(temperature=0.0, max_tokens=11, presence_penalty=1.0, frequency_penalty=0.5)),
    (50, Controls(temperature=1.0, typical_p=0.8, seed=6, max_tokens=14, logit_bias={7: 5.0})),
    (23, Controls(temperature=3.0, max_tokens=40, min_tokens=6, stop_ids=tuple(range(40, 56)))),
]


def test_fewer_steps_while_few_rows_share_them(engine, monkeypatch):
    """Rows that fill one after the other: steps grow with the rows that are busy."""
    ours, steps = engine(rows=4, steps=8), []
    start = ours._start_steps

    def count(n_steps):
        waits = ours._reading is not None or len(ours._waiting) > 0
        steps.append((waits, sum(live is not None for live in ours._live), n_steps))
        start(n_steps)

    monkeypatch.setattr(ours, '_start_steps', count)
    long = replace(GREEDY, max_tokens=60)
    for heard in [ask(ours, prompt_of(40 + i), long) for i in range(5)]:
        assert len(heard.wait().tokens) == 60
    assert all(n == (max(1, 2 * busy) if waits else 8) for waits, busy, n in steps)
    assert {(True, 1, 2), (True, 3, 6), (True, 4, 8)} <= set(steps)


def test_greedy_equals_the_uncached_forward(engine):
    """More requests than rows, prompts of one piece and of several."""
    ours = engine()
    heard = [ask(ours, prompt_of(n)) for n in (1, 15, 16, 17, 40, 33)]
    for n, one in zip((1, 15, 16, 17, 40, 33), heard, strict=True):
        assert one.wait().tokens == uncached(prompt_of(n), 12)
        assert one.text == text_of(one.tokens)
        assert one.finish == Finish('length', n, 12, 0)


def test_a_row_does_not_depend_on_its_mates_to_the_last_bit(engine):
    ours = engine()
    alone = [ask(ours, prompt_of(n), controls).wait() for n, controls in MIXED]
    rng = np.random.default_rng(0)
    for _ in range(2):
        order = rng.permutation(len(MIXED))
        together = {i: ask(ours, prompt_of(MIXED[i][0]), MIXED[i][1]) for i in order}
        for i, one in together.items():
            assert one.wait().tokens == alone[i].tokens
            assert one.logprobs == alone[i].logprobs, 'floats, compared as they are'
            assert one.finish.reason == alone[i].finish.reason
    assert len(alone[3].logprobs) == 9 and len(alone[3].logprobs[0].top) == 2
    assert alone[7].finish.reason == 'stop' and len(alone[7].tokens) >= 6


def test_engine_equals_generator(engine):
    ours = engine()
    for n, controls in MIXED:
        settings = {name: getattr(controls, name) for name in Controls.__dataclass_fields__}
        settings.pop('prompt_logprobs'), settings.pop('stop')
        [completion] = generator()([prompt_of(n)], **settings)
        one = ask(ours, prompt_of(n), controls).wait()
        assert one.tokens == completion.tokens
        assert one.finish.reason == completion.finish_reason


def test_tensor_parallel_equals_one_device(engine):
    sharded = engine(programs(n_devices=2, tensor=2))
    ours = engine()
    pairs = [[ask(one, prompt_of(n), controls) for one in (sharded, ours)] for n, controls in MIXED]
    for theirs, one in pairs:
        assert theirs.wait().tokens == one.wait().tokens


def test_a_window_decodes_in_a_ring(engine):
    config = replace(CONFIG, pattern=Window(5))
    ours = engine(programs(config), length=120)
    assert ours._slots == 32
    whole = engine(programs(config), length=120)
    whole._slots = 128
    whole._reset()
    for n in (3, 40, 70):
        controls = replace(GREEDY, max_tokens=40)
        ring, rows = (ask(one, prompt_of(n), controls).wait() for one in (ours, whole))
        assert ring.tokens == rows.tokens and len(set(ring.tokens)) > 4


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


def test_a_shared_beginning_is_read_once_and_changes_nothing(engine):
    ours, prompt = engine(), prompt_of(50)
    controls = replace(GREEDY, logprobs=1)
    first = ask(ours, prompt, controls).wait()
    again = ask(ours, prompt, controls).wait()
    assert (first.finish.cached_tokens, again.finish.cached_tokens) == (0, 48)
    longer = [*prompt[:40], *prompt_of(9, seed=1)]
    fresh = ask(engine(), longer, controls).wait()
    forked = ask(ours, longer, controls).wait()
    assert (fresh.finish.cached_tokens, forked.finish.cached_tokens) == (0, 32)
    for one, other in ((first, again), (fresh, forked)):
        assert one.tokens == other.tokens and one.logprobs == other.logprobs
    # A prompt of whole pieces: its last token is read again, to know what follows it.
    assert ask(ours, prompt[:48], controls).wait().finish.cached_tokens == 32


def test_a_busy_rows_beginning_is_copied(engine):
    ours, prompt = engine(steps=1), prompt_of(40)
    running = ask(ours, prompt, replace(GREEDY, max_tokens=80))
    while not running:
        time.sleep(0.001)
    other = ask(ours, prompt, replace(GREEDY, max_tokens=80)).wait()
    assert other.finish.cached_tokens == 32
    assert running.wait().tokens == other.tokens


def test_prompt_scores_are_those_of_the_forward_pass(engine):
    prompt = prompt_of(37)
    one = ask(engine(), prompt, replace(GREEDY, prompt_logprobs=3)).wait()
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


def test_stop_strings(engine):
    ours = engine()
    tokens = uncached(prompt_of(9), 12)
    whole = text_of(tokens)
    assert len(set(zip(whole, whole[1:], strict=False))) == 11, 'no pair comes twice'
    for stop, kept in (
        ((whole[5:7],), whole[:5]),
        ((whole[3:5], whole[2:4]), whole[:2]),
        ((whole[11] + 'x',), whole),  # its beginning is held back, and comes in the end
        (('x',), whole),
    ):
        one = ask(ours, prompt_of(9), replace(GREEDY, stop=stop)).wait()
        assert one.text == kept
        assert one.finish.reason == ('length' if kept == whole else 'stop')


class Only:
    """A grammar: ids by turns from two sets, then the end."""

    def __init__(self, *turns):
        self.turns, self.seen = turns, []

    def mask(self):
        allowed = np.zeros(CONFIG.vocab, bool)
        allowed[list(self.turns[len(self.seen) % len(self.turns)])] = True
        return allowed

    def accept(self, token):
        assert self.mask()[token]
        self.seen.append(token)


def test_a_grammar_is_obeyed_beside_free_rows(engine):
    ours = engine()
    free = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=30))
    grammar = Only({11, 12}, {60, 61, 62}, {3})
    bound = ask(ours, prompt_of(8), Controls(max_tokens=9, seed=1), grammar=grammar).wait()
    assert [token in turn for token, turn in zip(bound.tokens, grammar.turns * 3, strict=True)]
    assert set(bound.tokens[::3]) <= {11, 12} and set(bound.tokens[2::3]) == {3}
    assert free.wait().tokens == uncached(prompt_of(5), 30)


class Fails(Only):
    """Knows no more after some tokens."""

    def mask(self):
        if len(self.seen) == 3:
            raise ValueError('no token is left')
        return super().mask()

    def accept(self, token):
        self.seen.append(token)


def test_a_grammar_that_fails_ends_its_request_only(engine):
    ours = engine()
    free = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=30))
    bound = ask(ours, prompt_of(8), GREEDY, grammar=Fails({11})).wait()
    assert bound.finish.reason == 'error' and bound.finish.message == 'no token is left'
    at_once = Fails({11})
    at_once.seen = [11] * 3
    assert ask(ours, prompt_of(8), GREEDY, grammar=at_once).wait().finish.reason == 'error'
    assert free.wait().tokens == uncached(prompt_of(5), 30)
    for controls in (replace(GREEDY, min_tokens=2), replace(GREEDY, ignore_end=True)):
        with pytest.raises(UserError, match='a grammar says where the text ends'):
            ask(ours, prompt_of(8), controls, grammar=Only({11}))


def test_cancelled_and_late_requests_leave_at_once(engine):
    ours = engine(rows=1, steps=1)
    running = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=120))
    waiting = ask(ours, prompt_of(6))
    late = ask(ours, prompt_of(7), deadline=time.monotonic() + 0.05)
    while not running:
        time.sleep(0.001)
    waiting.ticket.cancel()
    assert waiting.wait().finish.reason == 'cancelled' and not waiting.tokens
    assert late.wait().finish.reason == 'deadline'
    running.ticket.cancel()
    assert running.wait().finish.reason == 'cancelled'
    assert 0 < len(running.tokens) < 120
    running.ticket.cancel()  # once more does nothing
    assert ask(ours, prompt_of(9)).wait().tokens == uncached(prompt_of(9), 12)
    assert ours.stats().requests_total == {'cancelled': 2, 'deadline': 1, 'length': 1}


def test_what_was_held_back_comes_with_the_end(engine):
    ours = engine(rows=1, steps=1, length=256)
    controls = replace(GREEDY, max_tokens=200, ignore_end=True)
    whole = ask(ours, prompt_of(5), replace(controls, max_tokens=12)).wait().text
    # All of the text may be the beginning of this string.
    held = replace(controls, stop=(whole + 'x',), logprobs=0)
    one = ask(ours, prompt_of(5), held)
    while ours.stats().generated_tokens_total < 12 + 3:
        time.sleep(0.001)
    one.ticket.cancel()
    assert one.wait().finish.reason == 'cancelled'
    n = one.finish.completion_tokens
    assert 0 < n < 200 and len(one.tokens) == len(one.logprobs) == n
    assert one.text[:12] == whole[:n] and len(one.text) == n


def test_a_caller_that_fails_to_hear_ends_its_own_request(engine, caplog):
    ours = engine()

    def deaf(event):
        raise ValueError('the queue of this caller is full')

    ours.submit(Request(prompt_of(9), replace(GREEDY, max_tokens=90)), deaf)
    assert ask(ours, prompt_of(5)).wait().tokens == uncached(prompt_of(5), 12)
    while ours.stats().rows_busy:
        time.sleep(0.001)
    assert ours.alive and ours.stats().requests_total == {'cancelled': 1, 'length': 1}
    assert 'on_event of a request failed' in caplog.text


def test_an_owner_with_many_leaves_room_for_others(engine):
    ours = engine(rows=1, queue=8)
    running = ask(ours, prompt_of(5), replace(GREEDY, max_tokens=100), owner='a')
    while not running:
        time.sleep(0.001)
    heard = [ask(ours, prompt_of(6), owner='a') for _ in range(6)]
    with pytest.raises(QueueFullError, match='6 requests wait'):
        ask(ours, prompt_of(6), owner='a')
    heard += [ask(ours, prompt_of(6), owner='b') for _ in range(2)]
    with pytest.raises(QueueFullError, match='8 requests wait'):
        ask(ours, prompt_of(6), owner='c')
    running.ticket.cancel()
    for one in heard:
        assert one.wait().finish.reason == 'length'


def test_owners_take_turns(engine):
    ours, ended = engine(rows=1, queue=9), []
    ask(ours, prompt_of(5), replace(GREEDY, max_tokens=60))
    for i, owner in enumerate('aaaab'):
        request = Request(prompt_of(6 + i), replace(GREEDY, max_tokens=2), owner=owner)
        ours.submit(request, lambda e, i=i: ended.append(i) if isinstance(e, Finish) else None)
    while len(ended) < 5:
        time.sleep(0.01)
    assert ended.index(4) <= 1, 'the one of b does not wait for the four of a'


def test_a_full_queue_and_bad_requests_are_refused(engine):
    ours = engine(rows=1, queue=2)
    held = [ask(ours, prompt_of(5), replace(GREEDY, max_tokens=100)) for _ in range(1)]
    while not held[0]:
        time.sleep(0.001)
    held += [ask(ours, prompt_of(6)) for _ in range(2)]
    with pytest.raises(QueueFullError, match='2 requests wait'):
        ask(ours, prompt_of(7))
    for wrong, message in (
        ((prompt_of(100), replace(GREEDY, max_tokens=29)), 'exceed the 128 tokens of a row'),
        (([], GREEDY), 'the prompt is empty'),
        (([96], GREEDY), 'token id 96'),
        (([1], replace(GREEDY, stop='END')), "stop 'END' is no tuple"),
        (([1], replace(GREEDY, top_p=0)), 'top_p 0'),
    ):
        with pytest.raises(UserError, match=message):
            ask(ours, *wrong)
    for one in held:
        one.wait()


@pytest.mark.parametrize('program', ['read', 'begin', 'steps', 'copy'])
def test_a_failure_ends_requests_and_not_the_engine(engine, monkeypatch, program):
    ours, prompt = engine(steps=1), prompt_of(40)
    running = ask(ours, prompt, replace(GREEDY, max_tokens=80))
    while not running:
        time.sleep(0.001)
    with monkeypatch.context() as broken:  # the second request copies what the first has read
        broken.setattr(ours._on_rows, program, lambda *args, **named: 1 / 0)
        heard = (
            [running.wait(), ask(ours, prompt).wait()]
            if program == 'steps'
            else [ask(ours, prompt).wait(), running.wait()]
        )
    for one in heard:
        assert one.finish.reason == 'error' and 'ZeroDivisionError' in one.finish.message
    assert ask(ours, prompt).wait().tokens == uncached(prompt, 12)


def test_a_failure_that_cannot_be_mended_ends_all_requests_and_the_engine(engine, monkeypatch):
    ours = engine(rows=1)

    def no_memory():
        raise MemoryError('no memory for keys and values')

    held = threading.Event()
    monkeypatch.setattr(ours, '_reset', no_memory)
    monkeypatch.setattr(ours._on_rows, 'steps', lambda *args: held.wait() and 1 / 0)
    heard = [ask(ours, prompt_of(5)) for _ in range(3)]
    assert ours.alive
    held.set()
    assert [one.wait().finish.reason for one in heard] == ['error'] * 3
    ours._thread.join()
    assert not ours.alive
    with pytest.raises(QueueFullError, match='stopped'):
        ask(ours, prompt_of(5))


def test_nothing_compiles_over_200_mixed_requests(engine):
    ours = engine(queue=300)
    rng = np.random.default_rng(1)

    def run(n):
        kinds = [MIXED[i] for i in rng.integers(len(MIXED), size=n)]
        heard = [
            ask(
                ours,
                prompt_of(int(rng.integers(1, 60)), seed=int(rng.integers(9))),
                replace(controls, seed=int(rng.integers(99)), stop=('x',) * int(rng.integers(2))),
            )
            for _, controls in kinds
        ]
        return [one.wait() for one in heard]

    ask(ours, prompt_of(60)).wait()
    shared = [ask(ours, prompt_of(60), replace(GREEDY, prompt_logprobs=0)) for _ in range(4)]
    [one.wait() for one in shared]
    run(30)
    compiled = []

    def count(event, _, **kwargs):
        if 'compile' in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x * 3.5 + 1)(jnp.ones(3))
        assert compiled, 'the count sees compilations'
        compiled.clear()
        assert all(one.finish.reason in ('length', 'stop') for one in run(200))
        assert not compiled
    finally:
        jax._src.monitoring.unregister_event_duration_listener(count)


@pytest.mark.parametrize('lookup', [None, Lookup(n_draft=5)])
def test_the_cache_stays_in_place(engine, lookup):
    ours = engine(length=256, rows=8, prefill_chunk=64, lookup=lookup)
    state, place = ours._state, ours.programs.place
    dead_B = place(np.zeros(8, bool))
    with jax.set_mesh(ours.programs.mesh):
        given = (ours.programs.params, state, ours._settings, dead_B, 4, True)
        lowered = ours._on_rows.steps.lower(*given)
        memory = lowered.compile().memory_analysis()
    cache_bytes = ours.programs.cache_bytes(rows=8, slots=ours._slots)
    assert memory.alias_size_in_bytes >= cache_bytes
    # Scores of every column; of the cache no second one.
    n_columns = 1 if lookup is None else 1 + lookup.n_draft
    assert memory.temp_size_in_bytes < n_columns * cache_bytes / 4


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'rows': 0}, 'rows 0'),
        ({'length': 257}, 'context of 256'),
        ({'prefill_chunk': 24}, 'prefill_chunk 24'),
        ({'steps': 0}, 'steps 0'),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        Engine(programs(), token_bytes=token_bytes, **sizes)


def test_a_mesh_that_divides_the_batch_is_refused():
    with pytest.raises(UserError, match='serves one replica'):
        Engine(programs(n_devices=2, data=2), token_bytes=token_bytes, length=64)
