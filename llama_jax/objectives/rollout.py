"""What an on-policy objective learns from: completions that the model itself writes to prompts, and
how well functions think of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from llama_jax.data.pieces import Example
from llama_jax.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """How completions are drawn, and by what they are judged."""

    completions: int = 8
    """Of each prompt: a group. Every row of prompts becomes so many rows of the batch, one
    completion of each of its prompts in each."""
    max_tokens: int = 128
    """Of a completion, its end token included; one that has no end by then is truncated."""
    temperature: float = 1.0
    """Logits are divided by it, when tokens are drawn and in the loss."""
    rewards: tuple[str, ...] = ('answer',)
    """Functions of a completion and its record, see train/rewards.py: names of built-in ones, or
    path/to/file.py:function."""
    weights: tuple[float, ...] = ()
    """Of the rewards in their sum. Empty: 1 each."""
    failed: Literal['stop', 'skip'] = 'stop'
    """What happens where a function raises or returns no number: the run ends with a line that
    names all of it, or the completion is counted and left out of its group."""

    def __post_init__(self) -> None:
        if self.completions < 2:
            raise UserError(
                f'rollout.completions is {self.completions}: a completion is compared with the '
                'others of its prompt, which takes 2 or more'
            )
        if self.max_tokens < 1:
            raise UserError(f'rollout.max_tokens is {self.max_tokens}: it must be 1 or more')
        if not self.temperature > 0:
            raise UserError(
                f'rollout.temperature is {self.temperature}: without chance all completions of a '
                'prompt are one; set it above 0'
            )
        if not self.rewards:
            raise UserError('rollout.rewards is empty: name a reward, such as answer')
        if len(set(self.rewards)) < len(self.rewards):
            raise UserError(f'rollout.rewards {self.rewards} names one twice: give it a weight')
        if self.weights and len(self.weights) != len(self.rewards):
            raise UserError(
                f'{len(self.weights)} rollout.weights for {len(self.rewards)} rollout.rewards: '
                'give one each, or none'
            )


class Drawn(NamedTuple):
    """A completion that was drawn."""

    prompt: np.ndarray
    """Token ids int32 [n]."""
    tokens: np.ndarray
    """Token ids int32 [m], the end token among them where there is one."""
    log_probs: np.ndarray
    """Of each as the generator has them, at temperature 1: float32 [m]."""
    truncated: bool
    """It has no end token."""


class OnPolicy(Protocol):
    """What rollouts ask of the objective that they are for. All of it works on the host."""

    @property
    def rollout(self) -> Rollout: ...

    def completed(
        self, drawn: Sequence[Sequence[Drawn]], reward_PG: np.ndarray
    ) -> tuple[list[list[Example]], dict[str, float]]:
        """The example of every completion [P][G], and figures of all of them.

        `reward_PG` is float64, NaN for a completion that no reward could be given to.
        """
        ...

    def blank(self, n: int) -> Example:
        """An example of `n` positions: arrays of the names and types of all of them."""
        ...


def prompts_of(batch: dict[str, Any], row: int) -> list[tuple[np.ndarray, tuple[int, int, int]]]:
    """The prompts in a row of what `asked` made examples of: token ids, and (epoch, source,
    document)."""
    found = []
    segments = batch['segments'][row]
    for segment in range(1, int(segments.max(initial=0)) + 1):
        here = segments == segment
        n = int(batch['prompt'][row][here].sum())
        at = int(np.argmax(here))
        origin = tuple(int(batch[name][row][at]) for name in ('epoch', 'source', 'document'))
        found.append((batch['inputs'][row][here][:n], origin))
    return found  # type: ignore[return-value]


def asked(prompt: np.ndarray, origin: tuple[int, int, int], *, size: int, pad_id: int) -> Example:
    """A prompt as an example, with room for a completion: `size` positions in all."""
    arrays = {
        'inputs': np.full(size, pad_id, np.int32),
        'prompt': np.zeros(size, np.int32),
        **{
            name: np.full(size, value, np.int32)
            for name, value in zip(('epoch', 'source', 'document'), origin, strict=True)
        },
    }
    arrays['inputs'][: len(prompt)] = prompt
    arrays['prompt'][: len(prompt)] = 1
    return arrays
