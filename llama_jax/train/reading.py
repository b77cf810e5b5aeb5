"""The data of a run: its tokenizer, the number of its steps, and the loader of its batches."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from llama_jax.data.loader import Loader
from llama_jax.data.recipe import Given
from llama_jax.data.sources import open_sources
from llama_jax.optim.schedule import schedule
from llama_jax.text.chat import ChatFormat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import agreement
from llama_jax.train.experiment import Experiment, rows_read, steps_of, with_tokenizer
from llama_jax.train.place import rows_here
from llama_jax.train.progress import say


def tokenizer_of(experiment: Experiment) -> tuple[Experiment, Tokenizer]:
    """The experiment with its tokenizer, once it is known that every split is there: a tokenizer
    may take minutes to train."""
    if experiment.data.tokenizer.path is not None:  # it is there, and the data may take minutes
        with_tokenizer(experiment)
    for split in ('train', 'validation') if experiment.evaluation.every else ('train',):
        open_sources(experiment.data, split, experiment.objective.reads)
    return with_tokenizer(experiment)


def with_steps(
    experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh, chat: ChatFormat | None
) -> Experiment:
    """The experiment with its number of steps, which is all that the rest of a run knows of its
    length: the schedule, the records, and who goes on with it."""
    train, steps = experiment.train, steps_of(experiment.train)
    if not steps:
        say('counting the steps of an epoch')
        with training_loader(experiment, tokenizer, mesh, cursor=None, chat=chat) as loader:
            agreement.same(content(tokenizer, loader), 'data')
            steps = loader.batches(train.epochs)
        schedule(experiment.optimizer.schedule, steps)
        experiment.objective.check_steps(steps)
    train = dataclasses.replace(train, steps=steps, tokens=0, epochs=0.0)
    return dataclasses.replace(experiment, train=train)


def content(tokenizer: Tokenizer, loader: Loader) -> dict[str, Any]:
    """What decides the batches, short enough to be read in a message."""
    sources = [
        {'name': source.name, 'documents': len(source), 'digest': source.digest[:12]}
        for source in loader.texts
    ]
    return {'sources': sources, 'tokenizer': tokenizer.digest[:12], 'data': loader.digest[:12]}


def training_loader(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    cursor: str | None,
    chat: ChatFormat | None,
    given: Given = None,
) -> Loader:
    return Loader(
        experiment.data,
        split='train',
        tokenizer=tokenizer,
        maker=experiment.objective,
        batch=rows_read(experiment),
        seq_len=experiment.train.seq_len,
        seed=experiment.seed_of('data'),
        masks=experiment.seed_of('masks'),
        rows=rows_here(experiment, mesh),
        cursor=cursor,
        chat=chat,
        given=given,
    )
