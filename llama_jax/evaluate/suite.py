"""The whole evaluation of one trained model: the metrics of `METRICS`, on the same texts for every
arm of a comparison."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from llama_jax.data import synthetic
from llama_jax.data.record import Text as PlainText
from llama_jax.errors import UserError
from llama_jax.evaluate import choosing, finetune, held, likelihood, per_text, retrieval
from llama_jax.evaluate import texts as of_suite
from llama_jax.evaluate.examples import Labelled, Pairs
from llama_jax.evaluate.metrics import METRICS, TASK
from llama_jax.evaluate.per_text import PerText, text_id
from llama_jax.evaluate.probe import Part, Probed, labels, probe
from llama_jax.evaluate.represent import layer_step, vector_step, vectors
from llama_jax.evaluate.scores import Read, Scorer
from llama_jax.evaluate.texts import MARKS, Texts
from llama_jax.objectives.asked import Middle, Question
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.plain import to_plain
from llama_jax.train.restore import Trained, load


@dataclass(frozen=True)
class Suite:
    """Texts and sizes of an evaluation: about a minute on two CPU cores for 5M parameters.

    Fewer examples are taken where the data has no more; every result says its n. What the data has
    no fields for is n/a, and the result says why.
    """

    text: str = held.OWN
    """Data set of whose held-out splits the texts are, or `own`: what the run was trained on."""
    pairs: str = held.OWN
    """Data set of pairs; `own`: fields of the text itself, of python_corpus/stdlib_code the
    docstrings of the same modules. '' for none."""
    topics_field: str = 'package'
    """Field of the text that names its topic; of files `file`."""
    group_field: str = 'module'
    """Documents that are alike in this field are in one part of a probe; others stand alone."""
    pairs_fields: tuple[str, str] = ('docstring', 'body')
    """Fields of two texts that belong together."""
    topics: int = 8
    """Classes of the second probe: the topics of most groups."""
    per_topic: int = 100
    """Chunks of each: 60 to train, 15 to choose the layer, 25 to test."""
    order: int = 400
    """Texts that a probe, and fine-tuning, tell from themselves with their tokens shuffled."""
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
    steps: int = 120
    """Of fine-tuning, at most."""
    batch: int = 8
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Learning rates of fine-tuning, of which validation chooses."""
    tuned_seeds: int = 3
    """Fine-tunings at that rate."""
    tasks: tuple[str, ...] = ()
    """Tasks of data/synthetic that are asked as well: `star_graph`, `induction`."""
    task_items: int = 200
    """Items of each, at most."""
    seed: int = 0
    """Of the choice of texts."""


class Evaluation(NamedTuple):
    """What was measured."""

    result: dict[str, Any]
    """As evaluation.json holds it."""
    texts: dict[str, PerText]
    """Of each metric that is a mean over texts what each contributes: evaluation.npz."""


def evaluate(workdir: Path, experiment: Experiment, suite: Suite, device_mesh: Mesh) -> Evaluation:
    """Every metric of the newest checkpoint in `workdir`.

    The result: {'metrics': {name: {'value', 'low', 'high', 'n'}}, 'layers': {'probe', 'topics':
    [test accuracy of the embedding and of every layer]}, 'chosen_layers': {'probe', 'topics':
    Probed.chosen()}, 'finetuning': Tuned.about(), 'topics': [names], 'text': where the texts are
    from, 'examples': their hash, 'step', 'suite', 'seconds'}. A metric that does not apply has the
    value None, n 0 and 'why'. Objective, seed and precision are those of `experiment`; texts follow
    from the suite, the run's data and the tokenizer.
    """
    return evaluate_trained(load(workdir, device_mesh), experiment, suite, device_mesh)


def evaluate_trained(
    trained: Trained, experiment: Experiment, suite: Suite, device_mesh: Mesh
) -> Evaluation:
    """`evaluate` of parameters in memory."""
    check(suite, experiment)
    found = of_suite.of_run(suite, experiment, trained.tokenizer)
    return evaluate_texts(trained, experiment, suite, found, device_mesh)


def evaluate_texts(
    trained: Trained, experiment: Experiment, suite: Suite, found: Texts, device_mesh: Mesh
) -> Evaluation:
    """`evaluate` on given texts."""
    begin = time.perf_counter()
    measuring = _Measuring(trained, experiment, suite, found, device_mesh)
    measuring.representations()
    measuring.likelihoods()
    measuring.tasks()
    metrics = {
        name: measuring.metrics.get(name)
        or {'value': None, 'low': None, 'high': None, 'n': 0, 'why': _why(name, found)}
        for name in METRICS
        if not name.startswith(TASK) or name.removeprefix(TASK) in suite.tasks
    }
    result = {
        'metrics': metrics,
        **measuring.about,
        'topics': list(found.topics.names),
        'text': found.about,
        'examples': of_suite.digest(found),
        'step': trained.step,
        'suite': to_plain(suite),
        'seconds': time.perf_counter() - begin,
    }
    return Evaluation(result, measuring.texts)


def check(suite: Suite, experiment: Experiment) -> None:
    """Raise UserError for a suite that reads more at once than the model can, and for settings that
    are no numbers to measure by. Costs nothing."""
    most = max(suite.span, suite.window + MARKS)
    if most > experiment.model.context:
        raise UserError(
            f'the evaluation reads {most} tokens at once, the model context is '
            f'{experiment.model.context}: make suite.window and suite.span smaller'
        )
    objective, context = experiment.objective, experiment.model.context
    if objective.reads is PlainText and objective.reading.whole is not None:
        # A whole text stands as in training: in blocks, or twice.
        sizes = objective.sizes(suite.window + 1, seq_len=context, draw=0.5) or ()
        if max(sizes, default=0) > context:
            raise UserError(
                f'a text of suite.window {suite.window} tokens takes {max(sizes)} positions of '
                f'{type(objective).__name__}, the model context is {context}: make suite.window '
                'smaller'
            )
    for least, names in (
        (0, ('topics', 'per_topic', 'order', 'windows', 'seed')),
        (1, ('infill', 'batch', 'tuned_seeds', 'steps', *(['task_items'] if suite.tasks else []))),
        (of_suite.LEAST_TOKENS if suite.pool else 1, ('span',)),
        (_LEAST_WINDOW, ('window',)),
    ):
        for name in names:
            if getattr(suite, name) < least:
                raise UserError(f'suite.{name} {getattr(suite, name)}: give {least} or more')
    if suite.pool and suite.pool < _LEAST_POOL:
        raise UserError(f'suite.pool {suite.pool}: give 0 for none, or {_LEAST_POOL} or more')
    if not 0 < suite.middle < suite.window:
        raise UserError(
            f'suite.middle {suite.middle} of a suite.window of {suite.window} tokens: give 1 to '
            f'{suite.window - 1}'
        )
    if not (suite.windows or suite.pool):
        raise UserError('suite.windows and suite.pool are both 0: give one of them')
    rates = suite.rates
    if not rates or not all(0 < x < math.inf for x in rates) or len({*rates}) < len(rates):
        raise UserError(f'suite.rates {rates}: give one rate or more above 0, each once')
    if len({*suite.tasks}) < len(suite.tasks):
        raise UserError(f'suite.tasks {" ".join(suite.tasks)}: name each task once')
    for name in suite.tasks:
        if name not in synthetic.TASKS:
            near = difflib.get_close_matches(name, synthetic.TASKS, n=1)
            hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(synthetic.TASKS)}'
            raise UserError(f'suite.tasks: no task is called {name!r}: {hint}')


def check_tasks(suite: Suite, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Raise UserError for tasks whose items are longer than the model reads."""
    of_suite.tasks_of(suite, experiment, tokenizer)


def check_texts(suite: Suite, experiment: Experiment) -> None:
    """Raise UserError where the texts that are to be measured on, or fields of them that are asked
    for, are not there."""
    of_suite.check_fields(suite, *of_suite.sets_of(suite, experiment))


def _why(name: str, found: Texts) -> str:
    """What to say of a metric that is n/a."""
    needs = METRICS[name].needs
    other = _SMALL if name.startswith('recall') else _OBJECTIVE
    return next((found.absent[what] for what in needs if what in found.absent), other)


_LEAST_WINDOW, _LEAST_POOL = 8, 8
"""Tokens around a middle; pairs of a retrieval: of fewer an interval says nothing."""
_OBJECTIVE = 'the objective cannot be asked for it'
_SMALL = 'there are no more pairs than it looks for: give more text'


class _Measuring:
    """The metrics of one model, as they are found."""

    def __init__(
        self, trained: Trained, experiment: Experiment, suite: Suite, found: Texts, mesh: Mesh
    ):
        self._trained, self._experiment, self._suite = trained, experiment, suite
        self._found, self._mesh = found, mesh
        self._causal = experiment.objective.causal
        self.metrics: dict[str, Any] = {}
        self.texts: dict[str, PerText] = {}
        self.about: dict[str, Any] = {'layers': {}, 'chosen_layers': {}}

    def representations(self) -> None:
        """What is common to all objectives."""
        found = self._found
        if found.order.names:
            self._probe('probe', found.order)
            self._finetune(found.order)
        if found.topics.names:
            probed = self._probe('topics', found.topics)
            self._mean('topics_embedding_accuracy', probed.right_LN[0], *_of(found.topics))
        last = vector_step(
            self._experiment.model, causal=self._causal, compute=self._experiment.compute
        )
        white = None
        if found.whitening:
            white = retrieval.whitening(self._vectors(last, found.whitening))
        for kind, pairs in (('doc', found.pairs), ('span', found.spans)):
            if not pairs.a:
                continue
            ids = [text_id(a, b) for a, b in zip(pairs.a, pairs.b, strict=True)]
            clusters = pairs.cluster.tolist()
            both = self._vectors(last, [*pairs.a, *pairs.b])
            a_ND, b_ND = both[: len(ids)], both[len(ids) :]
            self._recall(f'recall_{kind}', a_ND, b_ND, pairs, ids)
            if white is not None:
                name = f'recall_{kind}_white'
                self._recall(name, white(a_ND), white(b_ND), pairs, ids)
            if kind == 'span':
                self._mean('alignment', retrieval.distance(a_ND, b_ND), ids, clusters)
                seed = self._suite.seed
                self.metrics['uniformity'] = retrieval.uniformity_result(a_ND, seed=seed)
                self.metrics['effective_rank'] = retrieval.effective_rank_result(a_ND)

    def likelihoods(self) -> None:
        """What the objective can be asked for, and there are texts for."""
        found, tokenizer, seed = self._found, self._trained.tokenizer, self._suite.seed
        asked = self._experiment.objective.reading
        for name, question, asked_of in (
            ('bits_per_byte', asked.whole, likelihood.wholes(found.begun)),
            ('suffix_bits_per_byte', asked.rest, likelihood.halves(found.windows)),
            ('middle_bits_per_byte', asked.middle, found.middles),
        ):
            if question is None or not asked_of:
                continue
            if question.kind == 'pseudo':
                name = name.replace('_bits', '_pseudo_bits')
            score = self._scorer(question.sees_all, question.read)
            answer = likelihood.ask(score, question, asked_of, tokenizer, seed=seed)
            bits = likelihood.bits(answer, asked_of, tokenizer)
            of = self._documents(asked_of)
            about: dict[str, Any] = {'kind': question.kind}
            if question.draws > 1:
                about['standard_error'] = likelihood.standard_error(answer, bits, question.draws)
            self._ratio(name, bits.bits, bits.bytes, *of, **about)
            if '_bits' in name:  # of a part: a whole text ends with a control token
                ordinary = name.replace('_bits', '_ordinary_bits')
                self._ratio(ordinary, bits.ordinary, bits.bytes, *of, kind=question.kind)
            if question is asked.rest and question.draws == 1:
                self.metrics['calibration_error'] = likelihood.calibration_error(answer, of[1])
        if asked.infill is not None and found.infills:
            right = likelihood.infill(
                *(self._scorer(asked.infill.sees_all), asked.infill, found.infills, tokenizer),
                longest=self._suite.infill,
            )
            self._mean('infill_exact', np.array(right), *self._documents(found.infills))

    def tasks(self) -> None:
        """Accuracy on the tasks of the suite."""
        reading, tokenizer = self._experiment.objective.reading, self._trained.tokenizer

        def ask(
            question: Question, texts: Sequence[Middle], items: Sequence[int]
        ) -> likelihood.Answer:
            score, seed = self._scorer(question.sees_all, question.read), self._suite.seed
            return likelihood.ask(score, question, texts, tokenizer, seed=seed, groups=items)

        for name, task in self._found.tasks.items():
            chosen = choosing.right(task, reading, tokenizer, ask)
            if chosen is not None:
                right_N, by = chosen
                self._ratio(f'{TASK}{name}', right_N, None, task.ids, task.documents, by=by)

    def _scorer(self, sees_all: bool, read: Read | None = None) -> Scorer:
        return Scorer(
            self._experiment.model,
            self._trained.params,
            sees_all=sees_all,
            compute=self._experiment.compute,
            mesh=self._mesh,
            byte_lengths=self._trained.tokenizer.byte_lengths,
            read=read,
        )

    def _documents(self, windows: Sequence[tuple[np.ndarray, ...]]) -> tuple[list[str], list[str]]:
        """Ids and documents of whole windows, or of those in three parts."""
        ids = [text_id(*window) for window in windows]
        return ids, [self._found.document[each] for each in ids]

    def _recall(
        self, name: str, a_ND: np.ndarray, b_ND: np.ndarray, pairs: Pairs, ids: list[str]
    ) -> None:
        rank_N = retrieval.ranks(a_ND, b_ND, pairs.document)
        for k in (1, 5, 10):
            # Among k texts the first k hold every one.
            if k < retrieval.smallest_pool(pairs.document):
                self._mean(f'{name}_{k}', rank_N < k, ids, pairs.cluster.tolist())

    def _probe(self, name: str, parts: Labelled) -> Probed:
        """The metric is the test accuracy of the best layer that sees other tokens."""
        config, compute = self._experiment.model, self._experiment.compute
        step = layer_step(config, causal=self._causal, compute=compute)
        every = [parts.train, parts.validation, parts.test]
        x_LND = self._vectors(step, [chunk.tokens for part in every for chunk in part])
        ends = np.cumsum([len(part) for part in every])[:-1]
        probed = probe(
            *(
                Part(x, labels(part))
                for x, part in zip(np.split(x_LND, ends, axis=1), every, strict=True)
            )
        )
        self.about['layers'][name] = probed.right_LN.mean(axis=1).tolist()
        self.about['chosen_layers'][name] = probed.chosen()
        self._mean(f'{name}_accuracy', probed.right_LN[probed.contextual], *_of(parts))
        return probed

    def _finetune(self, parts: Labelled) -> None:
        suite, experiment = self._suite, self._experiment
        texts = (
            finetune.Texts([chunk.tokens for chunk in part], labels(part))
            for part in (parts.train, parts.validation, parts.test)
        )
        tuned = finetune.finetune(
            experiment.model,
            self._trained.params,
            *texts,
            n_classes=len(parts.names),
            budget=finetune.Budget(suite.steps, suite.batch, suite.rates, suite.tuned_seeds),
            causal=self._causal,
            compute=experiment.compute,
            seed=experiment.seed,
            mesh=self._mesh,
        )
        self.about['finetuning'] = tuned.about()
        self._mean('finetune_accuracy', tuned.right_SN.mean(axis=0), *_of(parts))

    def _vectors(self, step: Any, tokens: list[np.ndarray]) -> np.ndarray:
        longest = self._experiment.model.context
        return vectors(step, self._trained.params, tokens, longest=longest, mesh=self._mesh)

    def _mean(self, name: str, over: np.ndarray, ids: list[str], documents: list[str]) -> None:
        self._ratio(name, over, None, ids, documents)

    def _ratio(
        self,
        name: str,
        over: np.ndarray,
        under: np.ndarray | None,
        ids: list[str],
        documents: list[str],
        **about: Any,
    ) -> None:
        found, self.texts[name] = per_text.measured(
            over, under=under, ids=ids, documents=documents, seed=self._suite.seed
        )
        self.metrics[name] = {**found, **about}


def _of(parts: Labelled) -> tuple[list[str], list[str]]:
    """Ids and documents of the test part."""
    return [text_id(c.tokens) for c in parts.test], [c.group for c in parts.test]
