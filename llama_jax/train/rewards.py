"""Rewards: functions that judge a completion.

A reward is `function(completion: str, problem: Problem) -> float`: the text that was written,
without control tokens, and the record with its `prompt`, `answer` and `fields`. More is better. It
is a built-in one by its name, or one's own as path/to/file.py:function, which is run as the Python
that it is. It should depend on its arguments alone: a run that goes on from a checkpoint asks it
again.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import numbers
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from llama_jax.data.record import Problem
from llama_jax.errors import UserError
from llama_jax.objectives.rollout import Rollout
from llama_jax.text.chat import one_line

Reward = Callable[[str, Problem], float]

_NUMBER = re.compile(r'[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?')
_MARKED = re.compile(r'####\s*([^\n]*)')


class RewardError(UserError):
    """A reward that is no number, or none at all."""


def answer(completion: str, problem: Problem) -> float:
    """1 where the completion is the answer, but for white space around it."""
    return float(completion.strip() == problem.answer.strip())


def number(completion: str, problem: Problem) -> float:
    """1 where the completion's final number is the answer's: the first behind the last '####', else
    the one in the last \\boxed{...}, else the last of the text. Thousands' commas, currency and
    zeros at the end do not matter."""
    found, wanted = final_number(completion), final_number(problem.answer)
    return float(found is not None and found == wanted)


def final_number(text: str) -> Decimal | None:
    """See `number`; None where there is none."""
    marked, boxed = _MARKED.findall(text), _boxed(text)
    part = marked[-1] if marked else boxed[-1] if boxed else text
    found = _NUMBER.findall(part.replace('\N{MINUS SIGN}', '-'))
    if not found or (boxed and not marked and len(found) > 1):
        return None
    try:
        return Decimal(found[0 if marked else -1].replace(',', ''))
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _boxed(text: str) -> list[str]:
    """What stands within each \\boxed{...}, whose braces may hold others."""
    found = []
    for opening in re.finditer(r'\\boxed\s*\{', text):
        depth, at = 1, opening.end()
        while at < len(text) and depth:
            depth += {'{': 1, '}': -1}.get(text[at], 0)
            at += 1
        if not depth:
            found.append(text[opening.end() : at - 1])
    return found


def contains(completion: str, problem: Problem) -> float:
    """1 where the answer stands anywhere in the completion."""
    return float(problem.answer.strip() in completion)


def regex(completion: str, problem: Problem) -> float:
    """1 where the regular expression that is the record's answer matches all of the completion, but
    for white space around it."""
    return float(re.fullmatch(problem.answer, completion.strip(), re.DOTALL) is not None)


def python(completion: str, problem: Problem) -> float:
    """1 where prompt and completion together are Python that parses, and the completion is not
    empty. Nothing of it is run. Of a chat the completion by itself, or the code between its first
    ``` fences."""
    if isinstance(problem.prompt, str):
        code = problem.prompt + completion
    else:
        fenced = re.search(r'```(?:\w+\n)?(.*?)```', completion, re.DOTALL)
        code = fenced[1] if fenced else completion
    if not completion.strip():
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a text's escapes, which its writer would be told
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return 1.0


def brief(completion: str, problem: Problem) -> float:
    """Less 1 for every 1,000 characters."""
    return -len(completion) / 1000


BUILT_IN: dict[str, Reward] = {
    function.__name__: function for function in (answer, number, contains, regex, python, brief)
}


@dataclass(frozen=True)
class Judge:
    """The rewards of a run, by name and weight."""

    rewards: tuple[tuple[str, float, Reward], ...]
    skips: bool
    """What fails is NaN, and counted."""

    def __call__(self, completion: str, problem: Problem, where: str) -> dict[str, float]:
        """What each reward gives. `where` names the record. Raises RewardError."""
        given: dict[str, float] = {}
        for name, _, function in self.rewards:
            try:
                given[name] = checked(function(completion, problem))
            except Exception as error:
                if self.skips:
                    given[name] = math.nan
                    continue
                kind = '' if isinstance(error, RewardError) else f'raised {type(error).__name__}: '
                raise RewardError(
                    f'the reward {name} {kind}{one_line(str(error), 200)}, for the completion '
                    f'{one_line(completion, 200)!r} of {where} (answer '
                    f'{one_line(problem.answer, 80)!r}): mend it, or set '
                    '--objective.rollout.failed skip'
                ) from error
        return given

    def total(self, given: dict[str, float]) -> float:
        """The weighted sum; NaN where one of them is."""
        return sum(weight * given[name] for name, weight, _ in self.rewards)


def checked(value: Any) -> float:
    """A finite number, as it is to be. Raises RewardError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        try:  # of numpy and jax: an array without dimensions
            value = value.item() if not isinstance(value, bool) else float(value)
        except (AttributeError, ValueError):
            raise RewardError(f'returned {one_line(repr(value), 80)}, which is no number') from None
    if isinstance(value, str | bytes) or not math.isfinite(value):
        raise RewardError(f'returned {value!r}, which is no finite number')
    return float(value)


def judge(rollout: Rollout) -> Judge:
    """The rewards that the settings name. Raises UserError for what is not there."""
    weights = rollout.weights or (1.0,) * len(rollout.rewards)
    for weight in weights:
        if not math.isfinite(weight) or not weight:
            raise UserError(f'a reward of weight {weight}: leave it out, or give it another')
    found = tuple(
        (name, weight, _function(name))
        for name, weight in zip(rollout.rewards, weights, strict=True)
    )
    return Judge(found, rollout.failed == 'skip')


def _function(name: str) -> Reward:
    if name in BUILT_IN:
        return BUILT_IN[name]
    file, colon, attribute = name.rpartition(':')
    if not colon or not file.endswith('.py'):
        raise UserError(
            f'there is no reward {name!r}: there are {", ".join(BUILT_IN)}, or give '
            'path/to/file.py:function'
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f'the reward {name}: there is no file {path}')
    spec = importlib.util.spec_from_file_location(f'reward_{path.stem}', path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f'the reward {name}: {path} fails with {type(error).__name__}: '
            f'{one_line(str(error), 200)}'
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = [key for key, x in vars(module).items() if callable(x) and key[0] != '_']
        raise UserError(
            f'the reward {name}: {path} has no function {attribute} (there: '
            f'{", ".join(there) or "none"})'
        )
    return function
