"""What an arm has to surpass: figures of the same texts that need no trained model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax import installed
from llama_jax.data.synthetic import TASKS
from llama_jax.errors import UserError
from llama_jax.evaluate import examples, likelihood, retrieval, words
from llama_jax.evaluate.examples import Labelled, Pairs
from llama_jax.evaluate.metrics import METRICS, TASK
from llama_jax.evaluate.probe import labels
from llama_jax.evaluate.texts import Texts
from llama_jax.objectives.asked import Middle
from llama_jax.text.tokenizer import Tokenizer

Row = dict[str, dict[str, float | int]]
"""Metric to its value and the number of its texts."""

_PLACES = (1, 5, 10)
ORDER = 3
"""Of the n-gram model."""
MOST = 20_000_000
"""Tokens that it counts, some gigabytes: of longer runs the beginning."""


def counts(found: Texts, tokenizer: Tokenizer, training: Iterable[np.ndarray]) -> dict[str, Row]:
    """Name of each baseline to its metrics; `training` are documents as token ids, as many as an
    arm reads."""
    trigram = NGram(_first(training, MOST), vocab=tokenizer.vocab_size)
    counted = f'{ORDER}-gram' if trigram.tokens < MOST else f'{ORDER}-gram of {MOST:,} tokens'
    return {
        'TF-IDF': _of_vectors(found, _tf_idf),
        'bag of tokens': _of_vectors(found, lambda fitted, texts: _bag(texts)),
        counted: _of_likelihood(found, tokenizer, trigram.log_p),
        'most frequent name': _infills(found, tokenizer),
        'chance': _chance(found, tokenizer),
    }


class NGram:
    """A model of the next token by the two before it, with the smoothing of Witten & Bell (1991):
    p(w | h) = (c(h w) + T(h) p(w | shorter h)) / (c(h) + T(h)), T(h) being how many tokens were
    seen behind h; at the end all tokens are alike."""

    def __init__(self, documents: Iterable[np.ndarray], *, vocab: int):
        self._vocab = vocab
        self._seen: Counter[tuple[int, ...]] = Counter()
        """Of histories with a token behind them."""
        self._behind: Counter[tuple[int, ...]] = Counter()
        self._kinds: Counter[tuple[int, ...]] = Counter()
        self.tokens = 0
        for document in documents:
            ids = document.tolist()
            self.tokens += len(ids)
            for n in range(ORDER):
                self._seen.update(zip(*(ids[i:] for i in range(n + 1)), strict=False))
        for ngram, count in self._seen.items():
            self._behind[ngram[:-1]] += count
            self._kinds[ngram[:-1]] += 1

    def log_p(self, prefix: np.ndarray, tokens: np.ndarray) -> float:
        """Of `tokens` behind `prefix`, in nats."""
        ids = [*prefix.tolist(), *tokens.tolist()]
        start = len(ids) - len(tokens)
        return sum(math.log(self._p(ids, i)) for i in range(start, len(ids)))

    def _p(self, ids: list[int], i: int) -> float:
        p = 1 / self._vocab
        for n in range(min(ORDER, i + 1)):
            history = tuple(ids[i - n : i])
            total, kinds = self._behind[history], self._kinds[history]
            if total:
                p = (self._seen[*history, ids[i]] + kinds * p) / (total + kinds)
        return p


def _first(documents: Iterable[np.ndarray], most: int) -> Iterator[np.ndarray]:
    """As many of them as have `most` tokens, and the part of one."""
    for document in documents:
        yield document[:most]
        most -= len(document)
        if most <= 0:
            return


def _of_vectors(found: Texts, vectors: Callable[[Sequence, Sequence], Any]) -> Row:
    """Metrics of representations, where `vectors` gives those of texts [n, D], dense or sparse, by
    what it may be fitted on."""
    row = _of_classes(found, lambda parts: _classified(parts, vectors))
    for kind, pairs in _pairs(found):
        both = [*pairs.a, *pairs.b]
        x_ND = vectors(both, both)
        x_ND = x_ND.toarray() if hasattr(x_ND, 'toarray') else x_ND
        rank_N = retrieval.ranks(x_ND[: len(pairs.a)], x_ND[len(pairs.a) :], pairs.document)
        row |= _recalls(kind, pairs, {k: float((rank_N < k).mean()) for k in _PLACES})
    return row


def _of_classes(found: Texts, accuracy: Callable[[Labelled], float]) -> Row:
    """Metrics of classifications."""
    row: Row = {}
    for names, parts in (
        (('probe_accuracy', 'finetune_accuracy'), found.order),
        (('topics_accuracy',), found.topics),
    ):
        if parts.names:
            value = accuracy(parts)
            row |= {name: _value(value, len(parts.test)) for name in names}
    return row


def _most_frequent(parts: Labelled) -> float:
    """Accuracy of the most frequent class of the training texts."""
    usual = np.bincount(labels(parts.train)).argmax()
    return float((labels(parts.test) == usual).mean())


def _pairs(found: Texts) -> list[tuple[str, Pairs]]:
    return [(kind, x) for kind, x in (('doc', found.pairs), ('span', found.spans)) if x.a]


def _recalls(kind: str, pairs: Pairs, found: Mapping[int, float]) -> Row:
    """Recall, where no pool is smaller; of whitened vectors too, which have to be above the
    same."""
    return {
        f'recall_{kind}{white}_{k}': _value(value, len(pairs.a))
        for white in ('', '_white')
        for k, value in found.items()
        if k < retrieval.smallest_pool(pairs.document)
    }


def _classified(parts: Labelled, vectors: Callable[[Sequence, Sequence], Any]) -> float:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(f'the baselines need scikit-learn: {installed.extra("compare")}') from error
    train, test = ([chunk.tokens for chunk in part] for part in (parts.train, parts.test))
    x_ND = vectors(train, [*train, *test])
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(x_ND[: len(train)], labels(parts.train))
    return float((model.predict(x_ND[len(train) :]) == labels(parts.test)).mean())


def _bag(texts: Sequence[np.ndarray]) -> Any:
    """Counts of tokens, of unit length."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    return normalize(CountVectorizer(analyzer=_ids).fit_transform(texts).astype(np.float64))


def _tf_idf(fitted: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> Any:
    """TF-IDF of tokens, frequencies on a logarithmic scale, of unit length."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=_ids, sublinear_tf=True).fit(fitted).transform(texts)


def _ids(text: np.ndarray) -> list[int]:
    return text.tolist()


def _of_likelihood(
    found: Texts, tokenizer: Tokenizer, log_p: Callable[[np.ndarray, np.ndarray], float]
) -> Row:
    """Bits per byte from left to right."""
    row: Row = {}
    for name, asked in _asked(found).items():
        bits = sum(-log_p(text.prefix, text.middle) for text in asked) / math.log(2)
        n_bytes = likelihood.text_bytes(asked, tokenizer).sum()
        row[name] = _value(bits / n_bytes, len(asked))
        # There are no control tokens among these: of ordinary ones alone it is the same.
        ordinary = name.replace('_bits', '_ordinary_bits')
        row |= {ordinary: row[name]} if ordinary in METRICS else {}
    return row


def _asked(found: Texts) -> dict[str, list[Middle]]:
    every = {
        'bits_per_byte': likelihood.wholes(found.begun),
        'suffix_bits_per_byte': likelihood.halves(found.windows),
        'middle_bits_per_byte': found.middles,
    }
    return {name: asked for name, asked in every.items() if asked}


def _infills(found: Texts, tokenizer: Tokenizer) -> Row:
    """The name that stands most often around the gap."""
    right = []
    candidates = (examples if found.about.get('infills') == 'names' else words).candidates
    for text in found.infills:
        around = f'{tokenizer.decode(text.prefix)} {tokenizer.decode(text.suffix)}'
        guess, _ = max(candidates(around).items(), key=lambda of: of[1], default=('', 0))
        right.append(guess == tokenizer.decode(text.middle).strip())
    return {'infill_exact': _value(float(np.mean(right)), len(right))} if right else {}


def _chance(found: Texts, tokenizer: Tokenizer) -> Row:
    """The most frequent class, a key at random, any choice of a task, all tokens alike."""
    row = _of_classes(found, _most_frequent)
    for kind, pairs in _pairs(found):
        _, place_N, size = np.unique(pairs.document, return_inverse=True, return_counts=True)
        pool_N = len(pairs.a) - size[place_N] + 1
        chance = {k: float(np.minimum(1, k / pool_N).mean()) for k in _PLACES}
        row |= _recalls(kind, pairs, chance)
    row |= {
        f'{TASK}{name}': _value(TASKS[name].chance, len(task.ids))
        for name, task in found.tasks.items()
    }
    uniform = math.log(tokenizer.vocab_size)
    row |= _of_likelihood(found, tokenizer, lambda prefix, tokens: -len(tokens) * uniform)
    return row


def _value(value: float, n: int) -> dict[str, float | int]:
    return {'value': value, 'n': n}
