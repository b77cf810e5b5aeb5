"""Tasks that are made here (data/synthetic) within a suite: asked of any objective that gives a
text a likelihood, in the form of its training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data import synthetic
from llama_jax.errors import UserError
from llama_jax.evaluate.likelihood import Answer, bits
from llama_jax.evaluate.per_text import text_id
from llama_jax.objectives.asked import Middle, Question, Reading
from llama_jax.text.tokenizer import Tokenizer


class Asked(NamedTuple):
    """The items of a task as tokens."""

    texts: list[Middle]
    """Each choice of each item behind its prompt; of an item without choices the answer alone."""
    owner_K: np.ndarray
    """Number of the item of each text."""
    right_K: np.ndarray
    """Whether it is the right choice."""
    ids: list[str]
    documents: list[str]
    """Of each item, or the module that several are from."""
    written: bool
    """Whether there are no choices: right is who would write the answer, greedily."""


def asked(name: str, tokenizer: Tokenizer, *, n: int, longest: int) -> Asked:
    """Up to `n` held-out items of a task. Raises UserError where one is longer than `longest`
    tokens, which are all that the model can read."""
    items = list(synthetic.examples(name, 'test', n))
    texts, owner, right = [], [], []
    for number, made in enumerate(items):
        prefix = tokenizer.encode(made.prompt)
        for choice in made.choices or (made.answer,):
            middle = tokenizer.encode(choice, continues=bool(made.prompt))
            texts.append(Middle(prefix, middle, middle[:0]))
            owner.append(number)
            right.append(choice == made.answer)
    most = max(len(text.prefix) + len(text.middle) for text in texts)
    if most > longest:
        raise UserError(
            f'the task {name} has prompts of {most} tokens, and {longest} fit into the context of '
            'the model: leave it out of --suite.tasks, or raise --model.context'
        )
    ids = [text_id(tokenizer.encode(made.text)) for made in items]
    written = not items[0].choices
    groups = [made.group or made.key for made in items]
    return Asked(texts, np.array(owner), np.array(right), ids, groups, written)


def check(name: str, task: Asked, reading: Reading, tokenizer: Tokenizer, *, context: int) -> None:
    """Raise UserError where an item, as an objective is asked it, is longer than the `context` of
    the model: some read a text twice."""
    question, texts = _question(task, reading, tokenizer)
    if question is None:
        return
    longest = max(texts, key=lambda text: len(text.prefix) + len(text.middle))
    made = question.examples(longest, tokenizer, np.random.default_rng(0))
    most = max(len(array) for example in made for array in example.values())
    if most > context:
        raise UserError(
            f'the task {name} takes {most} positions of this objective, the model context is '
            f'{context}: leave it out of --suite.tasks, or raise --model.context'
        )


def right(
    task: Asked,
    reading: Reading,
    tokenizer: Tokenizer,
    ask: Callable[[Question, Sequence[Middle], Sequence[int]], Answer],
) -> tuple[np.ndarray, str] | None:
    """Whether each item [n] is answered rightly, and by what kind of likelihood: of the choices the
    likeliest is taken, and half a point is given to one of two that are equally likely. None where
    the objective cannot be asked. `ask` is told the item of each text."""
    question, texts = _question(task, reading, tokenizer)
    if question is None:
        return None
    answer = ask(question, texts, task.owner_K.tolist())
    n = len(task.ids)
    if task.written:
        if question.kind not in ('exact', 'order') or len(answer.examples) != n:
            return None  # nothing that it would write one after the other
        same = [
            (chosen[: len(text.middle)] == text.middle).all()
            for chosen, text in zip(answer.scores.chosen, texts, strict=True)
        ]
        return np.array(same, np.float64), question.kind
    cost_K = bits(answer, texts, tokenizer).bits
    least_N = np.full(n, np.inf)
    np.minimum.at(least_N, task.owner_K, cost_K)
    best_K = cost_K == least_N[task.owner_K]
    shared_N = np.bincount(task.owner_K, best_K, minlength=n)
    right_N = np.bincount(task.owner_K, best_K & task.right_K, minlength=n) / shared_N
    return right_N, question.kind


def _question(
    task: Asked, reading: Reading, tokenizer: Tokenizer
) -> tuple[Question | None, list[Middle]]:
    """Without prompts a text is asked for from its beginning on."""
    if any(len(text.prefix) for text in task.texts):
        return reading.rest or reading.middle, task.texts
    if reading.whole is not None:
        begin = np.array([tokenizer.bos_id], np.int32)
        return reading.whole, [text._replace(prefix=begin) for text in task.texts]
    return reading.middle, task.texts
