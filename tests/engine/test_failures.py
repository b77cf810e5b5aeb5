"""What fails ends what it has to, and no more."""

import threading
import time
from dataclasses import replace

import pytest

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import QueueFullError
from llama_jax.errors import UserError
from tests.engine.asking import GREEDY, ask, programs, token_bytes
from tests.generate.tiny import prompt_of, uncached


@pytest.mark.parametrize('program', ['read', 'begin', 'steps', 'copy'])
def test_a_failure_ends_requests_and_not_the_engine(engine, monkeypatch, program):
    ours, prompt = engine(steps=1), prompt_of(40)
    running = ask(ours, prompt, replace(GREEDY, max_tokens=80))
    while not running:
        time.sleep(0.001)
    with monkeypatch.context() as broken:  # the second request copies what the first has read
        broken.setattr(ours._slots._on, program, lambda *args, **named: 1 / 0)
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
    monkeypatch.setattr(ours._slots, 'reset', no_memory)
    monkeypatch.setattr(ours._slots._on, 'steps', lambda *args: held.wait() and 1 / 0)
    heard = [ask(ours, prompt_of(5)) for _ in range(3)]
    assert ours.alive
    held.set()
    assert [one.wait().finish.reason for one in heard] == ['error'] * 3
    ours._thread.join()
    assert not ours.alive
    with pytest.raises(QueueFullError, match='stopped'):
        ask(ours, prompt_of(5))


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
