"""Every program that serving needs is compiled before the first request comes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llama_jax.engine.request import Event, Finish, Grammar, Request
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.serve.served import EngineLike

_SMALLEST = 16
"""Pieces of prompts are padded to powers of two from here on."""


def lengths(*, piece: int, longest: int) -> list[int]:
    """Prompts of so many tokens are read in pieces of every shape, at the beginning of a row and
    behind a first piece."""
    ends, size = [], _SMALLEST
    while size < piece:
        ends.append(size)
        size *= 2
    ends.append(piece)
    shapes = (*ends, *(piece + end for end in ends))
    return sorted({min(n, longest) for n in shapes})


def warm(engine: EngineLike, *, piece: int, source_length: int = 0) -> None:
    """Ask for what makes the engine compile; returns when it is done. `piece` is the tokens of a
    prompt that the engine reads at a time, `source_length` those of the longest source of a model
    with an encoder. Raises UserError when the engine fails."""
    few = max(1, min(8, engine.length - 2))
    plain = Request([0], Controls(max_tokens=few), source=[0] if source_length else None)

    for n in lengths(piece=piece, longest=engine.length - few):
        scored = replace(plain.controls, prompt_logprobs=0)
        _run(engine, [replace(plain, prompt=[0] * n, controls=scored)])
    n_source = 2 * _SMALLEST
    while n_source < 2 * source_length:
        _run(engine, [replace(plain, source=[0] * min(n_source, source_length))])
        n_source *= 2
    _run(engine, [replace(plain, grammar=_Anything(np.ones(engine.config.vocab, bool)))])
    # A prompt that another row holds is copied from there.
    _run(engine, [replace(plain, prompt=[0] * min(piece + 1, engine.length - few))] * 2)


class _Anything(Grammar):
    """Every token, whatever was before."""

    def __init__(self, all_V: np.ndarray):
        self._all_V = all_V

    def mask(self) -> np.ndarray:
        return self._all_V

    def accept(self, token: int) -> None:
        pass


def _run(engine: EngineLike, requests: Sequence[Request]) -> None:
    ended, failures = threading.Semaphore(0), []

    def on_event(event: Event) -> None:
        if isinstance(event, Finish):
            if event.reason == 'error':
                failures.append(event.message)
            ended.release()

    for request in requests:
        engine.submit(request, on_event)
    for _ in requests:
        ended.acquire()
    if failures:
        raise UserError(f'the engine does not work here: {failures[0]}')
