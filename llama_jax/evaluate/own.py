"""The evaluation on text of one's own: the metrics that need nothing but text."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from llama_jax.data.config import DataConfig, labels
from llama_jax.data.documents import Documents
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.evaluate import examples, words
from llama_jax.evaluate.suite import Suite, Texts, check, evaluate_texts
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.restore import Trained

_CHARACTERS = 8192
"""Of a document on average, at most: what is read of a corpus does not grow with it."""
_LEAST = 16
"""Tokens of a document that gives a pair of spans."""
_OF_THE_CORPUS = ('text', 'pairs', 'topics', 'per_topic', 'steps', 'batch', 'rate')
"""Settings of a suite that own text has no use for."""


class TooLittleError(UserError):
    """There is not enough text to choose from."""


def evaluate_own(
    trained: Trained, experiment: Experiment, data: DataConfig, suite: Suite, mesh: Mesh
) -> dict[str, dict[str, Any]]:
    """What `evaluate_trained` gives, for each validation set of `data` by its label.

    Classification and docstrings are n/a: plain text has neither labels nor pairs. 'text' says
    which text it was. Raises UserError for too little text, and for settings without effect.
    """
    check(suite, experiment)
    usual = Suite()
    for name in _OF_THE_CORPUS:
        if getattr(suite, name) != getattr(usual, name):
            raise UserError(
                f'--suite.{name.replace("_", "-")} has no effect on text of your own, which has no '
                'labels and no pairs: leave it out'
            )
    sets = data.of('validation')
    documents = open_sources(data, 'validation').sources
    names = labels(sets)
    found = [
        texts(name, of_set, suite, trained.tokenizer)
        for name, of_set in zip(names, documents, strict=True)
    ]
    results = {}
    for name, source, of_set, chosen in zip(names, sets, documents, found, strict=True):
        result = evaluate_texts(trained, experiment, suite, chosen, mesh)
        about = {
            'set': name,
            'name': source.name,
            'files': list(source.files),
            'split': source.split,
            'documents': len(of_set),
        }
        unused = dict.fromkeys(_OF_THE_CORPUS)
        results[name] = {**result, 'suite': result['suite'] | unused, 'text': about}
    return results


def texts(name: str, documents: Documents, suite: Suite, tokenizer: Tokenizer) -> Texts:
    """The texts of a suite from `documents`, of which some are taken, spread evenly, and of a long
    one the beginning. Raises UserError, which calls them `name`, where they are too little."""
    n = min(len(documents), max(suite.pool, suite.windows))
    most = _CHARACTERS * max(suite.pool, suite.windows) // n
    seed = suite.seed
    stride = len(documents) / n
    places = (np.arange(n) + np.random.default_rng(seed).random(n)) * stride
    encoded = [tokenizer.encode(documents[int(place)][:most]) for place in places]
    begun = [
        np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        for tokens in encoded
    ]
    # More than are needed: not every window has a word to infill.
    windows = examples.windows(encoded, n=4 * suite.windows, length=suite.window, seed=seed)
    spans = examples.span_pairs(encoded, n=suite.pool, length=suite.span, seed=seed)
    if len(set(spans.document.tolist())) < 2:
        raise TooLittleError(
            f'{name} has too little text: no two documents of {_LEAST} tokens (there are '
            f'{len(documents)} documents): give more'
        )
    if len(windows) < 2:
        longest = max(map(len, encoded))
        raise TooLittleError(
            f'{name} has too little text: no two texts of {suite.window} tokens (the longest '
            f'document has {longest}): give more, or set --suite.window lower'
        )
    return Texts(
        topics=examples.Topics((), [], [], []),
        spans=spans,
        functions=examples.Pairs([], [], np.zeros(0, np.int32)),
        begun=examples.windows(begun, n=suite.windows, length=suite.window + 1, seed=seed),
        windows=windows[: suite.windows],
        middles=examples.thirds(windows[: suite.windows], middle=suite.middle),
        infills=words.infills(windows, tokenizer, n=suite.windows, longest=suite.infill, seed=seed),
    )
