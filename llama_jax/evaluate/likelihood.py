"""Likelihood in bits per byte, and infilling, of objectives that write text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.evaluate import stats
from llama_jax.evaluate.scores import Example, Scores
from llama_jax.objectives.asked import Infill, Middle, Question
from llama_jax.text.tokenizer import Tokenizer

Result = dict[str, Any]
Score = Callable[[Sequence[Example]], Scores]
"""A Scorer."""
_BINS = 15
"""Of the calibration error."""


class Bits(NamedTuple):
    """Of each text [n]; bits per byte are the sum of bits over the sum of bytes."""

    bits: np.ndarray
    """-log2 p of the middle. Control tokens in it count and have no bytes, as in
    train/validate.py."""
    ordinary: np.ndarray
    """The same among the tokens that are no control tokens: what a model spends on the marks of its
    own form is not charged."""
    bytes: np.ndarray
    """UTF-8 bytes of the middle."""


class Answer(NamedTuple):
    """What came of a question."""

    examples: list[Example]
    owner: np.ndarray
    """Number of the text that each example is of."""
    scores: Scores


def ask(
    score: Score,
    question: Question,
    texts: Sequence[Middle],
    tokenizer: Tokenizer,
    *,
    seed: int,
    groups: Sequence[int] | None = None,
) -> Answer:
    """Put a question about each text. What it draws follows from `seed` and the number of the
    text, or of its group: texts that are compared are hidden alike, as far as they are of one
    length, so that their difference is none of masks (common random numbers)."""
    examples: list[Example] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        key = number if groups is None else int(groups[number])
        made = question.examples(text, tokenizer, np.random.default_rng([seed, key]))
        examples += made
        owner += [number] * len(made)
    return Answer(examples, np.array(owner), score(examples))


def bits(answer: Answer, texts: Sequence[Middle], tokenizer: Any) -> Bits:
    """Bits and bytes of each text that was asked about."""
    weights = _weights(answer)

    def of_texts(log_p_NP: np.ndarray) -> np.ndarray:
        bits_N = -(log_p_NP * weights).sum(axis=1) / math.log(2)
        return np.bincount(answer.owner, bits_N, minlength=len(texts))

    scores = answer.scores
    return Bits(of_texts(scores.log_p), of_texts(scores.ordinary), text_bytes(texts, tokenizer))


def text_bytes(texts: Sequence[Middle], tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes of each middle [N], float64. Where nothing is before it but a begin token, the
    space that a tokenizer puts before a text (`dummy_prefix`) is none of them."""
    bytes_N = np.array([tokenizer.byte_lengths[text.middle].sum() for text in texts], np.float64)
    if not tokenizer.dummy_prefix:
        return bytes_N
    begins_N = np.array([set(text.prefix) <= {tokenizer.bos_id} for text in texts])
    return bytes_N - (begins_N & (bytes_N > 0))


def standard_error(answer: Answer, of: Bits, draws: int) -> float:
    """Of the bits per byte of a bound, by Monte Carlo alone: how far other masks of the same texts
    would be. No less than it, for the draws of a text are stratified."""
    bits_K = -(answer.scores.log_p * _weights(answer)).sum(axis=1) / math.log(2)
    # Of a text the examples of a draw follow each other, and each weighs 1 / draws.
    draw_ND = bits_K.reshape(len(of.bits), draws, -1).sum(axis=2) * draws
    variance = draw_ND.var(axis=1, ddof=1).sum() / draws
    return float(math.sqrt(variance) / of.bytes.sum())


def _weights(answer: Answer) -> np.ndarray:
    """Of each target of each example, in float64."""
    weights = np.zeros(answer.scores.log_p.shape)
    for row, example in zip(weights, answer.examples, strict=True):
        of = example['weights'][example['weights'] > 0]
        row[: len(of)] = of
    return weights


def calibration_error(answer: Answer, documents: Sequence[str]) -> Result:
    """Expected calibration error (Naeini et al. 2015): of 15 bins with equally many tokens, by the
    probability of the most likely token, the mean distance between that probability and how often
    that token is the right one. `documents`: of each text; the interval leaves some of them out."""
    _, document_N = np.unique(documents, return_inverse=True)
    targets = [e['targets'][e['weights'] > 0] for e in answer.examples]
    n_N = [len(target) for target in targets]
    there_NP = np.arange(answer.scores.log_p.shape[1]) < np.array(n_N)[:, None]
    confidence = np.exp(answer.scores.confidence[there_NP].astype(np.float64))
    right = answer.scores.chosen[there_NP] == np.concatenate(targets)
    edges = np.quantile(confidence, np.linspace(0, 1, _BINS + 1)[1:-1])
    bin_K = np.searchsorted(edges, confidence, side='right')
    owner_K = np.repeat(document_N[answer.owner], n_N)
    gap_MC = np.zeros((document_N.max() + 1, _BINS))
    np.add.at(gap_MC, (owner_K, bin_K), confidence - right)
    tokens_M = np.bincount(owner_K, minlength=len(gap_MC))

    def statistic(w_RM: np.ndarray) -> np.ndarray:
        return np.abs(w_RM @ gap_MC).sum(axis=1) / np.maximum(w_RM @ tokens_M, 1)

    return {**stats.jackknife(statistic, len(gap_MC)), 'n': len(documents)}


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
    score: Score, asked: Infill, texts: Sequence[Middle], tokenizer: Tokenizer, *, longest: int
) -> list[bool]:
    """Whether greedy infilling gives each middle, of at most `longest` tokens, exactly."""
    if asked.ends == 'length':
        written = _most_certain_first(score, asked, texts, tokenizer)
    else:
        written = _left_to_right(score, asked, texts, tokenizer, longest + 1)
    return [
        exact(tokens, text, asked, tokenizer) for tokens, text in zip(written, texts, strict=True)
    ]


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
