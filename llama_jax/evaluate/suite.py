"""The whole evaluation of one trained model: the metrics of `METRICS`, on the same texts for every
arm of a comparison."""

from __future__ import annotations

import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama_jax.data import sources
from llama_jax.data.config import DataConfig, Source
from llama_jax.errors import UserError
from llama_jax.evaluate import examples, finetune, likelihood, retrieval, stats
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.probe import Part, labels, probe
from llama_jax.evaluate.represent import layer_step, vector_step, vectors
from llama_jax.evaluate.scores import Scorer
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.restore import Trained, load

MARKS = 16
"""Positions that a window leaves free in the model's context, for marks and for what is written."""


@dataclass(frozen=True)
class Suite:
    """Sizes of an evaluation: about 30 s on two CPU cores for 5M parameters.

    Fewer examples are taken where the data has no more; every result says its n.
    """

    text: str = 'python_corpus/stdlib_code'
    """Data set with `text`, `module` and `package`: topics (all splits), spans and likelihood (held
    out)."""
    pairs: str = 'python_corpus/stdlib_docs'
    """Data set with `docstring` and `body`; the held-out ones are taken."""
    topics: int = 8
    """Classes of the probe and of fine-tuning: the packages of most modules."""
    per_topic: int = 100
    """Chunks of each: 60 to train, 15 to choose the layer, 25 to test."""
    span: int = 64
    """Most tokens of a text that is made into one vector."""
    pool: int = 256
    """Pairs of each retrieval; each looks for its own among all."""
    window: int = 128
    """Tokens of a text whose likelihood is taken."""
    windows: int = 64
    middle: int = 8
    """Tokens of the middle span."""
    infill: int = 4
    """Most tokens of a name that is infilled."""
    steps: int = 60
    """Of fine-tuning."""
    batch: int = 8
    rate: float = 1e-3
    """Peak learning rate of fine-tuning."""
    seed: int = 0
    """Of the choice of texts."""


class Texts(NamedTuple):
    """All that a suite measures on."""

    topics: examples.Topics
    spans: examples.Pairs
    functions: examples.Pairs
    begun: list[np.ndarray]
    """Windows [T + 1] of documents with begin and end tokens: likelihood of plain text."""
    windows: list[np.ndarray]
    """Windows [T] of text alone."""
    middles: list[examples.Middle]
    infills: list[examples.Middle]


def evaluate(
    workdir: Path, experiment: Experiment, suite: Suite, device_mesh: Mesh
) -> dict[str, Any]:
    """Every metric of the newest checkpoint in `workdir`, as evaluation.json holds it.

    {'metrics': {name: {'value', 'low', 'high', 'n'}}, 'layers': {'probe': [test accuracy of the
    embedding and of every layer]}, 'topics': [names], 'examples': hash of the texts, 'step',
    'suite', 'seconds'}. A metric that does not apply has the value None and n 0. Objective, seed
    and precision are those of `experiment`; texts follow from the suite and the tokenizer alone.
    """
    return evaluate_trained(load(workdir, device_mesh), experiment, suite, device_mesh)


def evaluate_trained(
    trained: Trained, experiment: Experiment, suite: Suite, device_mesh: Mesh
) -> dict[str, Any]:
    """`evaluate` of parameters in memory."""
    check(suite, experiment)
    found = texts(suite, trained.tokenizer)
    return evaluate_texts(trained, experiment, suite, found, device_mesh)


def evaluate_texts(
    trained: Trained, experiment: Experiment, suite: Suite, found: Texts, device_mesh: Mesh
) -> dict[str, Any]:
    """`evaluate` on given texts. Without topics or functions, what needs them is n/a."""
    begin = time.perf_counter()
    absent = {'value': None, 'low': None, 'high': None, 'n': 0}
    metrics: dict[str, Any] = {name: dict(absent) for name in METRICS}
    represented, layers = _representations(trained, experiment, suite, found, device_mesh)
    written = _likelihoods(trained, experiment, suite, found, device_mesh)
    metrics |= represented | written
    return {
        'metrics': metrics,
        'layers': {'probe': layers},
        'topics': list(found.topics.names),
        'examples': examples.digest(found),
        'step': trained.step,
        'suite': dataclasses.asdict(suite),
        'seconds': time.perf_counter() - begin,
    }


def texts(suite: Suite, tokenizer: Tokenizer) -> Texts:
    """The texts of a suite under a tokenizer, kept for the next arm."""
    key = (suite, tokenizer.digest)
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = _texts(suite, tokenizer)
    return _KEPT[key]


_KEPT: dict[Any, Texts] = {}


def _texts(suite: Suite, tokenizer: Tokenizer) -> Texts:
    seed, window = suite.seed, suite.window
    every = [r for split in examples.PARTS for r in _records(suite.text, split)]
    held = [r for split in examples.PARTS[1:] for r in _records(suite.text, split)]
    functions = [r for split in examples.PARTS[1:] for r in _records(suite.pairs, split)]
    documents = [tokenizer.encode(record['text']) for record in held]
    begun = [
        np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        for tokens in documents
    ]
    # More than are needed: not every window has a name to infill.
    windows = examples.windows(documents, n=4 * suite.windows, length=window, seed=seed)
    found = Texts(
        topics=examples.topics(
            every,
            tokenizer,
            n_topics=suite.topics,
            per_topic=suite.per_topic,
            length=suite.span,
            seed=seed,
        ),
        spans=examples.span_pairs(documents, n=suite.pool, length=suite.span, seed=seed),
        functions=examples.docstring_pairs(
            functions, tokenizer, n=suite.pool, length=suite.span, seed=seed
        ),
        begun=examples.windows(begun, n=suite.windows, length=window + 1, seed=seed),
        windows=windows[: suite.windows],
        middles=examples.thirds(windows[: suite.windows], middle=suite.middle),
        infills=examples.infills(
            windows, tokenizer, n=suite.windows, longest=suite.infill, seed=seed
        ),
    )
    if len(found.topics.names) < 2 or len(found.spans.a) < 2 or len(found.functions.a) < 2:
        raise UserError(
            f'{suite.text} and {suite.pairs} have too few packages, held-out documents or '
            'functions to measure on: use python_corpus'
        )
    return found


@functools.lru_cache(maxsize=8)
def _records(name: str, split: str) -> list[examples.Record]:
    # `train_split` names the split to open, whichever it is.
    config = DataConfig(sources=(Source(name),), train_split=split)
    (documents,) = sources.open_sources(config, 'train').sources
    stored = (documents.records[i] for i in range(len(documents)))
    return [
        {key: value.decode('utf-8', errors='replace') for key, value in record.items()}
        for record in stored
    ]


def check(suite: Suite, experiment: Experiment) -> None:
    """Raise UserError for a suite that reads more at once than the model can. Costs nothing."""
    longest = max(suite.span, suite.window + MARKS)
    if longest > experiment.model.context:
        raise UserError(
            f'the evaluation reads {longest} tokens at once, the model context is '
            f'{experiment.model.context}: make suite.window and suite.span smaller'
        )


def _representations(
    trained: Trained, experiment: Experiment, suite: Suite, found: Texts, mesh: Mesh
) -> tuple[dict[str, Any], list[float]]:
    """The metrics that are common to all objectives, and the probe of every layer."""
    metrics: dict[str, Any] = {}
    layers: list[float] = []
    if found.topics.names:
        metrics, layers = _classification(trained, experiment, suite, found.topics, mesh)
    config, seed = experiment.model, suite.seed
    last = vector_step(config, causal=experiment.objective.causal, compute=experiment.compute)
    for kind, pairs in (('doc', found.functions), ('span', found.spans)):
        if not pairs.a:
            continue
        both = vectors(
            last, trained.params, [*pairs.a, *pairs.b], longest=config.context, mesh=mesh
        )
        a_ND, b_ND = both[: len(pairs.a)], both[len(pairs.a) :]
        rank_N = retrieval.ranks(a_ND, b_ND, pairs.document)
        for k, result in retrieval.recall(rank_N, seed=seed).items():
            # Among k texts the first k hold every one.
            if k < retrieval.smallest_pool(pairs.document):
                metrics[f'recall_{kind}_{k}'] = result
        if kind == 'span':
            metrics['alignment'] = retrieval.alignment_result(a_ND, b_ND, seed=seed)
            metrics['uniformity'] = retrieval.uniformity_result(a_ND, seed=seed)
    return metrics, layers


def _classification(
    trained: Trained,
    experiment: Experiment,
    suite: Suite,
    topics: examples.Topics,
    mesh: Mesh,
) -> tuple[dict[str, Any], list[float]]:
    """The probe, whose accuracy is also that of every layer, and fine-tuning."""
    config, compute, seed = experiment.model, experiment.compute, suite.seed
    causal = experiment.objective.causal
    by_layer = layer_step(config, causal=causal, compute=compute)
    every = [topics.train, topics.validation, topics.test]
    chunks = [chunk for part in every for chunk in part]
    x_LND = vectors(
        by_layer, trained.params, [c.tokens for c in chunks], longest=config.context, mesh=mesh
    )
    ends = np.cumsum([len(part) for part in every])[:-1]
    parts = [
        Part(x, labels(part)) for x, part in zip(np.split(x_LND, ends, axis=1), every, strict=True)
    ]
    metrics: dict[str, Any] = {}
    metrics['probe_accuracy'], layers = probe(*parts, seed=seed)

    right = finetune.accuracy(
        config,
        trained.params,
        [chunk.tokens for chunk in topics.train],
        labels(topics.train),
        [chunk.tokens for chunk in topics.test],
        labels(topics.test),
        n_classes=len(topics.names),
        budget=finetune.Budget(suite.steps, suite.batch, suite.rate),
        causal=causal,
        compute=compute,
        seed=experiment.seed,
        mesh=mesh,
    )
    metrics['finetune_accuracy'] = stats.of_mean(right, seed=seed)
    return metrics, layers


def _likelihoods(
    trained: Trained, experiment: Experiment, suite: Suite, found: Texts, mesh: Mesh
) -> dict[str, Any]:
    """The metrics that the objective can be asked for."""
    tokenizer, seed = trained.tokenizer, suite.seed
    asked = experiment.objective.reading

    def score(sees_all: bool) -> Scorer:
        return Scorer(
            experiment.model,
            trained.params,
            sees_all=sees_all,
            compute=experiment.compute,
            mesh=mesh,
        )

    metrics: dict[str, Any] = {}
    for name, question, texts in (
        ('bits_per_byte', asked.whole, likelihood.wholes(found.begun)),
        ('suffix_bits_per_byte', asked.rest, likelihood.halves(found.windows)),
        ('middle_bits_per_byte', asked.middle, found.middles),
    ):
        if question is not None and texts:
            pseudo = question.kind == 'pseudo'
            metrics[name.replace('_bits', '_pseudo_bits') if pseudo else name] = (
                likelihood.bits_per_byte(
                    score(question.sees_all), question, texts, tokenizer, seed=seed
                )
            )
    if asked.infill is not None and found.infills:
        metrics['infill_exact'] = likelihood.infill(
            *(score(asked.infill.sees_all), asked.infill, found.infills, tokenizer),
            longest=suite.infill,
            seed=seed,
        )
    return metrics
