"""The cheap part of evaluation, for curves during training."""

from __future__ import annotations

import functools
from typing import Any

from jax.sharding import Mesh

from llama_jax.data import sources
from llama_jax.data.config import DataConfig
from llama_jax.evaluate import examples, retrieval
from llama_jax.evaluate.represent import vector_step, vectors
from llama_jax.model.layers import Params
from llama_jax.objectives.base import backbone
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment

PAIRS = 64
SPAN = 48
"""Most tokens of a span."""
DOCUMENTS = 128
"""Held-out documents that pairs are taken from, at most, and characters of each."""
CHARACTERS = 20_000


def light(
    experiment: Experiment, params: Params, tokenizer: Tokenizer, mesh: Mesh
) -> dict[str, float]:
    """recall_span_1, alignment and uniformity on span pairs of the run's validation split.

    The same pairs at every call and for every arm that shares data and tokenizer; empty where the
    split has no two documents of 16 tokens. Every process has to call it.
    """
    length = min(SPAN, experiment.model.context)
    pairs = _pairs(experiment.data, tokenizer.digest, _Held(tokenizer), length)
    if len(set(pairs.document.tolist())) < 2:
        return {}
    step = vector_step(
        experiment.model, causal=experiment.objective.causal, compute=experiment.compute
    )
    both = vectors(
        step,
        backbone(params),
        [*pairs.a, *pairs.b],
        longest=experiment.model.context,
        mesh=mesh,
    )
    a_ND, b_ND = both[: len(pairs.a)], both[len(pairs.a) :]
    values: dict[str, Any] = {
        'recall_span_1': (retrieval.ranks(a_ND, b_ND, pairs.document) < 1).mean(),
        'alignment': retrieval.alignment(a_ND, b_ND),
        'uniformity': retrieval.uniformity(a_ND),
    }
    return {name: float(value) for name, value in values.items()}


class _Held:
    """Something that a cache does not compare."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=4)
def _pairs(data: DataConfig, digest: str, held: _Held, length: int) -> examples.Pairs:
    corpus = sources.open_sources(data, 'validation')
    documents = []
    for source in corpus.sources:
        n = min(len(source), DOCUMENTS)
        # Spread over the split: its documents are in the order of their names.
        for index in (i * len(source) // n for i in range(n)):
            documents.append(held.tokenizer.encode(source[index][:CHARACTERS]))
    return examples.span_pairs(documents, n=PAIRS, length=length, seed=0)
