"""What a synthetic task is: a generator of examples, and what guessing reaches."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data import splits

_SEED = 13
_DRAWS = 400
"""For each example that is wanted, at most, until a generator has no others."""


class Made(NamedTuple):
    """One example: a document that is trained on, of which a part is asked for."""

    key: str
    """Examples of one key are in one split: it is what there is to know of an example, in one
    spelling."""
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    """The answer among others; without them the answer is to be written."""
    after: str = ''
    """The rest of the document."""
    group: str = ''
    """What it shares with other examples, as a module does: with them it is not independent."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.after


Draw = Callable[[np.random.Generator], Made]
Every = Callable[[], Iterable[tuple[str, Made]]]


class Synthetic(NamedTuple):
    """A task. One of `draw` and `every` is given."""

    about: str
    chance: float
    """Share of right answers of one who does not read the prompt."""
    draw: Draw | None = None
    """One of any number of examples; its split follows from its key."""
    every: Every | None = None
    """All examples, with their splits."""

    def examples(self, name: str, split: str, n: int) -> Iterator[Made]:
        """Up to `n` different examples of a split: the same at every call, the first `m` of more
        those of fewer."""
        seed = [_SEED, zlib.crc32(name.encode()), splits.NAMES.index(split)]
        rng = np.random.default_rng(seed)
        if self.every is not None:
            found = [made for of, made in self.every() if of == split]
            yield from (found[i] for i in rng.permutation(len(found))[:n].tolist())
            return
        assert self.draw is not None
        seen: set[str] = set()
        for _ in range(_DRAWS * n):
            if len(seen) == n:
                return
            made = self.draw(rng)
            if made.key not in seen and splits.by_hash(made.key) == split:
                seen.add(made.key)
                yield made


def shuffled(rng: np.random.Generator, choices: Sequence[str]) -> tuple[str, ...]:
    """In another order."""
    return tuple(choices[i] for i in rng.permutation(len(choices)))


def some(rng: np.random.Generator, of: Sequence[str], n: int) -> list[str]:
    """`n` different ones. `of` is no set, whose order differs between processes."""
    return [of[i] for i in rng.choice(len(of), n, replace=False)]


def one(rng: np.random.Generator, of: tuple[str, ...] | list[str]) -> str:
    return of[int(rng.integers(len(of)))]


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


_ONSETS = words('b d f g k l m n p r s t v z br dr kl pl st tr')


def word(rng: np.random.Generator, syllables: int) -> str:
    """A name that nobody bears."""
    text = ''.join(one(rng, _ONSETS) + one(rng, list('aeiou')) for _ in range(syllables))
    return (text + one(rng, list('nlrsx'))).capitalize()


def new_names(rng: np.random.Generator, n: int) -> list[str]:
    """`n` different ones."""
    return some(rng, list(dict.fromkeys(word(rng, 2) for _ in range(2 * n))), n)
