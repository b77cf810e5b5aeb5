"""Who comes when, and who is refused."""

import time
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.engine.request import Finish, QueueFullError, Request
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import SequenceState
from llama_jax.errors import UserError
from tests.engine.asking import GREEDY, ask
from tests.generate.tiny import prompt_of, uncached


def waiting(n):
    return SequenceState(
        Request([1] * n), lambda event: None, token_bytes=bytes, names={}, end_ids=()
    )


class Device:
    """Runs what a scheduler decides, on a clock of its own."""

    def __init__(self, *, rows=8, piece=64, piece_seconds=0.1, step_seconds=0.04):
        self.scheduler = Scheduler(rows=rows, steps=8, piece=piece)
        self.piece, self.now = piece, 0.0
        self._piece_seconds, self._step_seconds = piece_seconds, step_seconds
        self.began, self.steps, self.read = {}, [], []
        for _ in range(2):  # the first of each may have gone into compiling
            self.scheduler.piece_took(piece, piece_seconds, waited=False)
            self.scheduler.steps_took(rows, 1, step_seconds)

    def asks(self, n):
        one = waiting(n)
        one.slot = self.scheduler.free()[0]
        self.scheduler.reading.append(one)
        return one

    def turn(self):
        one = self.scheduler.next_to_read()
        if one is not None:
            self.now += self._piece_seconds
            waited = self.scheduler.n_running > 0
            self.scheduler.piece_took(self.piece, self._piece_seconds, waited=waited)
            one.n_read = min(len(one.prompt), one.n_read + self.piece)
            self.read.append(one)
            if one.n_read == len(one.prompt):
                self.began[one] = self.now
                self.scheduler.begin(one)
        elif self.scheduler.n_running:
            n = self.scheduler.n_steps(8)
            self.now += n * self._step_seconds
            self.scheduler.steps_took(8, n, n * self._step_seconds)
            self.steps += [self.now] * n


def test_a_short_prompt_is_read_before_the_rest_of_a_long_one():
    device = Device()
    long = device.asks(2000)
    for _ in range(5):
        device.turn()
    short, asked = device.asks(20), device.now
    device.turn()
    assert device.began[short] - asked <= 0.1
    while long not in device.began:
        device.turn()


@pytest.mark.parametrize('busy', [False, True])
def test_a_long_prompt_is_read_while_short_ones_keep_coming(busy):
    device = Device()
    if busy:
        device.scheduler.begin(device.asks(64))
    long = device.asks(640)
    for _ in range(200):
        if len(device.scheduler.reading) < 3:
            device.asks(20)
        device.turn()
        for one in device.scheduler.running[1:]:
            if one:
                device.scheduler.release(one)  # a text of one token
        if long in device.began:
            break
    # Every fourth piece is its own.
    assert 30 <= len(device.read) <= 40 and device.read.count(long) == 10


def test_who_writes_has_more_than_half_of_the_time_while_prompts_are_read():
    device = Device()
    running = device.asks(64)
    device.scheduler.begin(running)
    device.asks(2000), device.asks(1000)
    while device.now < 5:
        device.turn()
    alone = 5 / 0.04
    assert 0.55 * alone < len(device.steps) < 0.7 * alone
    # And never stands still for long: a piece, its first token.
    gaps = np.diff([0.0, *device.steps])
    assert gaps.max() < 0.2


def test_short_prompts_go_before_steps_but_do_not_stop_them():
    device = Device()
    device.scheduler.begin(device.asks(64))
    device.asks(2000)
    device.turn()
    short, asked = device.asks(64), device.now
    device.turn()
    assert device.began[short] - asked <= 0.1
    for _ in range(50):
        while len(device.scheduler.reading) < 4:
            device.asks(64)
        device.turn()
        for one in device.scheduler.running[1:]:
            if one:
                device.scheduler.release(one)
    assert len(device.steps) * 0.04 > 0.5 * device.now
    assert np.diff([0.0, *device.steps]).max() < 0.5


def test_steps_are_started_together_where_they_are_short():
    for seconds, n in ((0.04, 1), (0.011, 1), (0.006, 3), (0.001, 8)):
        assert Device(step_seconds=seconds).scheduler.n_steps(8) == n
    scheduler = Scheduler(rows=8, steps=8, piece=64)
    scheduler.steps_took(2, 1, 9.0)  # which went into compiling it
    assert scheduler.n_steps(2) == 1
    scheduler.steps_took(2, 2, 0.008)
    assert scheduler.n_steps(2) == 5 and scheduler.n_steps(4) == 1


def test_the_time_to_compile_is_not_owed():
    scheduler = Scheduler(rows=2, steps=8, piece=64)
    scheduler.running[0] = waiting(5)
    scheduler.piece_took(64, 30.0, waited=True)
    one = waiting(500)
    scheduler.reading.append(one)
    assert scheduler.next_to_read() is one


@pytest.mark.slow
def test_a_short_prompt_behind_a_long_one_begins_first(engine):
    ours, heard = engine(length=256, rows=3, prefill_chunk=16), []
    for n in (240, 9, 30):
        request = Request(prompt_of(n), replace(GREEDY, max_tokens=4))
        ours.submit(request, lambda event, n=n: heard.append((n, event)))
    while sum(isinstance(event, Finish) for _, event in heard) < 3:
        time.sleep(0.01)
    assert list(dict.fromkeys(n for n, _ in heard)) == [9, 30, 240]


@pytest.mark.slow
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
