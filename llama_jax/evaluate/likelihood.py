"""Likelihood in bits per byte, and infilling, of objectives that write text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llama_jax.evaluate import stats
from llama_jax.evaluate.examples import Middle
from llama_jax.evaluate.readings import Reading
from llama_jax.evaluate.scores import Example, Scores
from llama_jax.objectives.base import Objective
from llama_jax.text.tokenizer import Tokenizer

Result = dict[str, float | int]
Score = Callable[[Sequence[Example]], Scores]
"""A Scorer."""


def bits_per_byte(
    score: Score, examples: Sequence[Example], byte_lengths: np.ndarray, *, seed: int
) -> Result:
    """-log2 p of all targets that bear weight, per UTF-8 byte of them; an interval over examples.

    Control tokens count in the likelihood and have no bytes, as in train/validate.py.
    """
    bytes_N = [byte_lengths[e['targets'][e['weights'] > 0]].sum() for e in examples]
    bits_N = -score(examples).log_p.sum(axis=1, dtype=np.float64) / math.log(2)
    return stats.of_ratio(bits_N, np.array(bytes_N), seed=seed)


def plain(windows: Iterable[np.ndarray]) -> list[Example]:
    """Examples of next-token prediction: of each window [T + 1] the last T tokens."""
    return [
        {
            'inputs': window[:-1],
            'targets': window[1:],
            'weights': np.ones(len(window) - 1, np.float32),
        }
        for window in windows
    ]


def halves(windows: Iterable[np.ndarray]) -> list[Middle]:
    """Texts whose second half is asked for."""
    return [
        Middle(window[: len(window) // 2], window[len(window) // 2 :], window[:0])
        for window in windows
    ]


def pseudo(
    objective: Objective, asked: Reading, texts: Iterable[Middle], tokenizer: Tokenizer
) -> tuple[list[Example], np.ndarray]:
    """An example for each token of each middle, in which it alone is masked, and the number of the
    text that it belongs to (Salazar et al. 2020, equation 1)."""
    assert asked.middle is not None
    examples, owner = [], []
    for number, text in enumerate(texts):
        for j in range(len(text.middle)):
            one = Middle(
                np.concatenate([text.prefix, text.middle[:j]]),
                text.middle[j : j + 1],
                np.concatenate([text.middle[j + 1 :], text.suffix]),
            )
            examples.append(asked.middle(objective, one, tokenizer))
            owner.append(number)
    return examples, np.array(owner)


def pseudo_bits_per_byte(
    score: Score,
    objective: Objective,
    asked: Reading,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    *,
    seed: int,
) -> Result:
    """As `bits_per_byte` of the middles, each token given all others; an interval over texts."""
    examples, owner = pseudo(objective, asked, texts, tokenizer)
    bits_N = np.zeros(len(texts))
    np.add.at(bits_N, owner, -score(examples).log_p[:, 0].astype(np.float64) / math.log(2))
    bytes_N = [tokenizer.byte_lengths[text.middle].sum() for text in texts]
    return stats.of_ratio(bits_N, np.array(bytes_N), seed=seed)


def infill(
    score: Score,
    objective: Objective,
    asked: Reading,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    *,
    longest: int,
    seed: int,
) -> Result:
    """Share of the middles, of at most `longest` tokens, that greedy infilling gives exactly."""
    if asked.ends == 'length':
        written = _most_certain_first(score, objective, asked, texts, tokenizer)
    else:
        written = _left_to_right(score, objective, asked, texts, tokenizer, longest + 1)
    return stats.of_mean(
        [
            exact(tokens, text, asked, tokenizer)
            for tokens, text in zip(written, texts, strict=True)
        ],
        seed=seed,
    )


def exact(tokens: np.ndarray, text: Middle, asked: Reading, tokenizer: Tokenizer) -> bool:
    """Whether what was written is the middle, and ends there."""
    if asked.ends == 'suffix':
        wanted = np.concatenate([text.middle, text.suffix[:1]])
        return tokens[: len(wanted)].tolist() == wanted.tolist()
    if asked.ends == 'mark':
        marks = np.flatnonzero(tokenizer.byte_lengths[tokens] == 0)
        if not len(marks):
            return False
        tokens = tokens[: marks[0]]
    return tokenizer.decode(tokens) == tokenizer.decode(text.middle)


def _left_to_right(
    score: Score,
    objective: Objective,
    asked: Reading,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    n: int,
) -> list[np.ndarray]:
    """The `n` most likely next tokens of each, one after another."""
    assert asked.middle is not None
    # What stands at a place that is not written yet is seen by no earlier one.
    blank = np.full(n, tokenizer.pad_id, np.int32)
    examples = [asked.middle(objective, text._replace(middle=blank), tokenizer) for text in texts]
    places = [np.flatnonzero(example['weights'] > 0) for example in examples]
    written = np.zeros((len(texts), n), np.int32)
    for j in range(n):
        written[:, j] = score(examples).chosen[:, j]
        for example, place, token in zip(examples, places, written[:, j], strict=True):
            if j + 1 < n:
                example['inputs'][place[j] + 1] = token
    return list(written)


def _most_certain_first(
    score: Score,
    objective: Objective,
    asked: Reading,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
) -> list[np.ndarray]:
    """Masks filled one at a time, that of the most probable token first, the others given it
    (mask-predict, Ghazvininejad et al. 2019, with as many rounds as tokens)."""
    assert asked.middle is not None
    examples = [asked.middle(objective, text, tokenizer) for text in texts]
    written = [np.full(len(text.middle), -1, np.int32) for text in texts]
    for _ in range(max(len(text.middle) for text in texts)):
        scores = score(examples)
        for i, (text, example) in enumerate(zip(texts, examples, strict=True)):
            open_ = written[i] < 0
            if open_.any():
                certain = np.where(open_, scores.confidence[i, : len(open_)], -np.inf)
                j = int(np.argmax(certain))
                written[i][j] = scores.chosen[i, j]
                # The masks stand after the begin token and the prefix, wherever they are read.
                example['inputs'][1 + len(text.prefix) + j] = written[i][j]
    return written
