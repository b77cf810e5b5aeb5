"""Likelihood in bits per byte, and infilling, of objectives that write text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llama_jax.evaluate import stats
from llama_jax.evaluate.scores import Example, Scores
from llama_jax.objectives.asked import Infill, Middle, Question
from llama_jax.text.tokenizer import Tokenizer

Result = dict[str, Any]
Score = Callable[[Sequence[Example]], Scores]
"""A Scorer."""


def bits_per_byte(
    score: Score, question: Question, texts: Sequence[Middle], tokenizer: Tokenizer, *, seed: int
) -> Result:
    """-log2 p of the middles per UTF-8 byte of them, its interval over texts and its 'kind'.

    Control tokens count in the likelihood and have no bytes, as in train/validate.py. What a
    question draws follows from `seed` and the number of the text.
    """
    examples: list[Example] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        made = question.examples(text, tokenizer, np.random.default_rng([seed, number]))
        examples += made
        owner += [number] * len(made)
    log_p_NP = score(examples).log_p.astype(np.float64)
    for log_p_P, example in zip(log_p_NP, examples, strict=True):
        weights = example['weights'][example['weights'] > 0]
        log_p_P[: len(weights)] *= weights
    bits_N = np.zeros(len(texts))
    np.add.at(bits_N, owner, -log_p_NP.sum(axis=1) / math.log(2))
    bytes_N = [tokenizer.byte_lengths[text.middle].sum() for text in texts]
    return {**stats.of_ratio(bits_N, np.array(bytes_N), seed=seed), 'kind': question.kind}


def wholes(windows: Iterable[np.ndarray]) -> list[Middle]:
    """Texts of which all is asked for but the first token, which is given."""
    return [Middle(window[:1], window[1:], window[:0]) for window in windows]


def halves(windows: Iterable[np.ndarray]) -> list[Middle]:
    """Texts whose second half is asked for."""
    return [
        Middle(window[: len(window) // 2], window[len(window) // 2 :], window[:0])
        for window in windows
    ]


def infill(
    score: Score,
    asked: Infill,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    *,
    longest: int,
    seed: int,
) -> Result:
    """Share of the middles, of at most `longest` tokens, that greedy infilling gives exactly."""
    if asked.ends == 'length':
        written = _most_certain_first(score, asked, texts, tokenizer)
    else:
        written = _left_to_right(score, asked, texts, tokenizer, longest + 1)
    return stats.of_mean(
        [
            exact(tokens, text, asked, tokenizer)
            for tokens, text in zip(written, texts, strict=True)
        ],
        seed=seed,
    )


def exact(tokens: np.ndarray, text: Middle, asked: Infill, tokenizer: Tokenizer) -> bool:
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
    asked: Infill,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    n: int,
) -> list[np.ndarray]:
    """The `n` most likely next tokens of each, one after another."""
    # What stands at a place that is not written yet is seen by no earlier one.
    blank = np.full(n, tokenizer.pad_id, np.int32)
    examples = [asked.example(text._replace(middle=blank), tokenizer) for text in texts]
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
    asked: Infill,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
) -> list[np.ndarray]:
    """Masks filled one at a time, that of the most probable token first, the others given it
    (mask-predict, Ghazvininejad et al. 2019, with as many rounds as tokens)."""
    examples = [asked.example(text, tokenizer) for text in texts]
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
