"""The evaluation on text of one's own, set by set."""

from __future__ import annotations

from jax.sharding import Mesh

from llama_jax.data.config import DataConfig, labels
from llama_jax.data.record import Text
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.evaluate.held import OWN, Held
from llama_jax.evaluate.suite import Evaluation, Suite, check, evaluate_texts
from llama_jax.evaluate.texts import TooLittleError, collect
from llama_jax.train.experiment import Experiment
from llama_jax.train.restore import Trained

__all__ = ['TooLittleError', 'evaluate_own']

_OF_TOPICS = ('topics', 'per_topic')
"""Settings of a suite that text without topics has no use for."""


def evaluate_own(
    trained: Trained, experiment: Experiment, data: DataConfig, suite: Suite, mesh: Mesh
) -> dict[str, Evaluation]:
    """What `evaluate_trained` gives, for each validation set of `data` by its label.

    Topics and pairs are n/a where a set lacks their fields, as files of plain text do; so is
    whitening, for which there is no training text. 'set' says which set it was. Raises UserError
    for too little text, and for settings without effect.
    """
    check(suite, experiment)
    usual = Suite()
    for name in ('text', 'pairs'):
        if getattr(suite, name) != OWN:
            raise UserError(
                f'--suite.{name} has no effect on text of your own, which is named already: leave '
                'it out'
            )
    for name in ('tasks', 'task_items'):
        if getattr(suite, name) != getattr(usual, name):
            raise UserError(
                f'--suite.{name.replace("_", "-")} has no effect on text of your own, which is no '
                'task: leave --text out to ask it'
            )
    sets = data.of('validation')
    reads = Text if data.validation else experiment.objective.reads
    documents = open_sources(data, 'validation', reads).sources
    found = [
        collect(suite, Held((one,)), Held((one,)), trained.tokenizer, strict=True, called=name)
        for name, one in zip(labels(sets), documents, strict=True)
    ]
    for name in _OF_TOPICS:
        changed = getattr(suite, name) != getattr(usual, name)
        if changed and not any(texts.topics.names for texts in found):
            raise UserError(
                f'--suite.{name.replace("_", "-")} has no effect on text of your own without '
                f'topics ({found[0].absent["topics"]}): leave it out'
            )
    results = {}
    for name, source, of_set, chosen in zip(labels(sets), sets, documents, found, strict=True):
        evaluation = evaluate_texts(trained, experiment, suite, chosen, mesh)
        about = {
            'set': name,
            'name': source.name,
            'files': list(source.files),
            'split': source.split,
            'documents': len(of_set),
        }
        results[name] = evaluation._replace(result={**evaluation.result, 'text': about})
    return results
