"""Engines that end with their test, and callers that keep what they hear."""

import functools
import threading
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Finish, Piece, Request
from llama_jax.generate.controls import Controls
from llama_jax.generate.programs import Programs
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, weights

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
    with_defaults = {'rows': 2, 'length': 128, 'prefill_chunk': 16, 'steps': 4}
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
        assert self.done.wait(120), 'the request ends'
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
    (
        23,
        Controls(
            temperature=3.0, seed=7, max_tokens=40, min_tokens=6, stop_ids=tuple(range(40, 56))
        ),
    ),
]


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
