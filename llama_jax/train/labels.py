"""The labels of a classification, where the data says what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llama_jax.data.documents import RecordDocuments, records
from llama_jax.data.record import BadRecordError, Labelled
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.objectives.classify import Classification
from llama_jax.train.experiment import Experiment


def labelled(experiment: Experiment) -> Experiment:
    """The experiment with the labels of its training split, and with the weights of balanced
    classes, where its objective is a classification that lacks them. Reads all of the split.

    Raises UserError where there are less than two labels.
    """
    objective = experiment.objective
    if not isinstance(objective, Classification):
        return experiment
    balanced = objective.class_weights or objective.balance != 'balanced'
    if objective.labels and balanced:
        return experiment
    return replace(experiment, objective=objective.filled(_good(experiment)))


def _good(experiment: Experiment) -> Iterator[Labelled]:
    """Records that can be learnt; what becomes of the others is told where all are read."""
    found, problem = 0, 'it is empty'
    for source in open_sources(experiment.data, 'train', Labelled).sources:
        assert isinstance(source, RecordDocuments)
        for number, record in enumerate(records(source, Labelled)):
            if isinstance(record, BadRecordError):
                problem = f'{source.origin(number)}: {record}'
            else:
                found += 1
                yield record
    if not found:
        raise UserError(f'no record of the training split has a text and a label ({problem})')
