"""Scores of texts that a model wrote, against those that are right (host)."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax import installed
from llama_jax.errors import UserError
from llama_jax.evaluate.words import pieces_of

TEXT_METRICS = ('exact', 'f1', 'rouge1', 'rouge2', 'rougeL', 'chrf')


def check() -> None:
    """Raise UserError where the libraries of ROUGE and chrF are missing."""
    _rouge()
    _chrf()


def scores(text: str, answers: Sequence[str]) -> dict[str, float]:
    """Each metric in [0, 1], of the answer that gives most.

    'exact': equal after `normalized`. 'f1': of words (Rajpurkar et al. 2016), of characters where a
    script puts no spaces between words. 'rouge1', 'rouge2', 'rougeL': F-measures of `rouge_score`
    on the same words, no stemming. 'chrf': chrF2 of `sacrebleu`, of the single text.
    """
    found = [_against(text, answer) for answer in answers]
    return {name: max(one[name] for one in found) for name in TEXT_METRICS}


def _against(text: str, answer: str) -> dict[str, float]:
    rouge = _rouge().score(answer, text)
    return {
        'exact': float(normalized(text) == normalized(answer)),
        'f1': f1(text, answer),
        **{name: float(rouge[name].fmeasure) for name in ('rouge1', 'rouge2', 'rougeL')},
        'chrf': float(_chrf().sentence_score(text, [answer]).score) / 100,
    }


_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalized(text: str) -> str:
    """Of SQuAD, for all scripts: lower case, compatible forms (full width) as one, no ASCII
    punctuation, no English articles, single spaces; and other punctuation as spaces."""
    text = unicodedata.normalize('NFKC', text).casefold().translate(_PUNCTUATION)
    text = ''.join(' ' if unicodedata.category(c)[0] in 'PZC' else c for c in text)
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def f1(text: str, answer: str) -> float:
    """Of the words that both hold; of no words 1 where both have none."""
    ours, theirs = (list(pieces_of(normalized(x))) for x in (text, answer))
    if not ours or not theirs:
        return float(ours == theirs)
    both = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * both / (len(ours) + len(theirs))


def report(gold: Sequence[str], chosen: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and number of each class, and the means over classes ('macro'). A class
    that was never chosen has precision 0, and one that is not there recall 0."""
    n_gold, n_chosen = Counter(gold), Counter(chosen)
    n_right = Counter(g for g, c in zip(gold, chosen, strict=True) if g == c)
    classes: dict[str, dict[str, float]] = {}
    for label in labels:
        right, n, n_said = n_right[label], n_gold[label], n_chosen[label]
        classes[label] = {
            'precision': right / n_said if n_said else 0.0,
            'recall': right / n if n else 0.0,
            'f1': 2 * right / (n + n_said) if n + n_said else 0.0,
            'n': n,
        }
    names = ('precision', 'recall', 'f1')
    macro = {name: float(np.mean([one[name] for one in classes.values()])) for name in names}
    return {'classes': classes, 'macro': macro}


class _Words:
    """How `rouge_score` cuts a text: any script, where its own way keeps a-z and digits alone."""

    def tokenize(self, text: str) -> list[str]:
        return list(pieces_of(unicodedata.normalize('NFKC', text).casefold()))


@functools.cache
def _rouge() -> Any:
    rouge_scorer = _needed(lambda: __import__('rouge_score.rouge_scorer').rouge_scorer)
    return rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], tokenizer=_Words())


@functools.cache
def _chrf() -> Any:
    return _needed(lambda: __import__('sacrebleu.metrics').metrics).CHRF()


def _needed(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise UserError(
            f'to score what a model writes takes {error.name}: {installed.extra("eval")}'
        ) from None
