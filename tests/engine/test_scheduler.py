"""Who comes when, and who is refused."""

import time
from dataclasses import replace

import pytest

from llama_jax.engine.request import Finish, QueueFullError, Request
from llama_jax.errors import UserError
from tests.engine.asking import GREEDY, ask
from tests.generate.tiny import prompt_of, uncached


def test_fewer_steps_while_few_rows_share_them(engine, monkeypatch):
    """Rows that fill one after the other: steps grow with the rows that are busy."""
    ours, steps = engine(rows=4, steps=8), []
    scheduler, start = ours._scheduler, ours._core._start_steps

    def count(n_steps):
        waits = scheduler.reading is not None or len(scheduler.waiting) > 0
        steps.append((waits, sum(one is not None for one in scheduler.running), n_steps))
        start(n_steps)

    monkeypatch.setattr(ours._core, '_start_steps', count)
    long = replace(GREEDY, max_tokens=60)
    for heard in [ask(ours, prompt_of(40 + i), long) for i in range(5)]:
        assert len(heard.wait().tokens) == 60
    assert all(n == (max(1, 2 * busy) if waits else 8) for waits, busy, n in steps)
    assert {(True, 1, 2), (True, 3, 6), (True, 4, 8)} <= set(steps)


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
