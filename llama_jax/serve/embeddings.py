"""Embeddings: a few texts at a time, so that those who ask take turns and those who left are let
go."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence

import numpy as np

from llama_jax.errors import UserError
from llama_jax.generate.embed import ROWS
from llama_jax.generate.finite import NotFiniteError
from llama_jax.serve.errors import ApiError
from llama_jax.serve.feed import full
from llama_jax.serve.served import EngineLike
from llama_jax.serve.threads import Threads, TooManyError


class Embeddings:
    """Vectors of one engine, for one caller at a time."""

    def __init__(self, engine: EngineLike, *, waiting: int):
        """`waiting`: requests that may wait for their turn."""
        self._engine, self._most = engine, waiting
        self.threads = Threads(1)

    async def __call__(
        self, texts: Sequence[Sequence[int]], *, owner: str, deadline: float
    ) -> np.ndarray:
        """Float32 [n, D], as `engine.embed` gives them. Owners take turns after every few texts;
        what is cancelled ends with those that are computed. `deadline`: of time.monotonic().

        Raises ApiError: the queue is full, the deadline is past, the model gives no numbers.
        """
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[np.ndarray] = []
        for start in range(0, len(texts), ROWS):
            members = by_length[start : start + ROWS]
            work = functools.partial(self._engine.embed, [texts[i] for i in members])
            most = None if start else self._most
            try:
                await self.threads.wait(owner, seconds=deadline - time.monotonic(), most=most)
                left = deadline - time.monotonic()
                vectors.extend(await self.threads.run(work, seconds=left))
            except TooManyError:
                raise full('requests for embeddings of others are waiting') from None
            except TimeoutError:
                raise ApiError(
                    504, f'{start} of {len(texts)} texts were embedded in time', code='deadline'
                ) from None
            except NotFiniteError as error:
                raise ApiError(500, _of_all(str(error), members), code='engine_error') from None
            except UserError as error:
                raise ApiError(400, _of_all(str(error), members), param='input') from None
        ordered = sorted(zip(by_length, vectors, strict=True), key=lambda pair: pair[0])
        return np.stack([vector for _, vector in ordered])


def _of_all(message: str, members: Sequence[int]) -> str:
    """A message about a text, by its place among all."""
    return re.sub(r'^text (\d+)', lambda found: f'text {members[int(found[1])]}', message)
