"""A dry run of the data: the first batches or examples of a run as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.text import Text

from llama_jax import mesh as meshes
from llama_jax.data import show
from llama_jax.data.loader import Loader
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment, check, rows_read, with_tokenizer
from llama_jax.train.start import chat_read


def show_batches(experiment: Experiment, n: int) -> None:
    """Print the first `n` global batches that a run of the experiment begins with; train nothing.

    In colours on a terminal, else with brackets.
    """
    _show(experiment, n, '--show-batch', 'batches', show.batches)


def show_examples(experiment: Experiment, n: int) -> None:
    """Like `show_batches`, the first `n` examples, one by one, each with the file and line that it
    is from where it is a record."""
    _show(experiment, n, '--show-examples', 'examples', show.examples)


def _show(
    experiment: Experiment, n: int, option: str, what: str, lines: Callable[..., Iterator[Text]]
) -> None:
    if n < 1:
        raise UserError(f'{option} {n}: give the number of {what} to show, 1 or more')
    experiment, tokenizer = opened(experiment)
    console = Console(file=sys.stdout, highlight=False)
    with loader_of(experiment, tokenizer) as loader:
        for line in lines(loader, tokenizer, n, plain=not console.is_terminal):
            console.print(line, soft_wrap=True)


def opened(experiment: Experiment) -> tuple[Experiment, Tokenizer]:
    """The experiment with its tokenizer, once it is known that all of it fits together and that the
    training split is there."""
    check(experiment, meshes.make(experiment.mesh))
    open_sources(experiment.data, 'train', experiment.objective.reads)
    return with_tokenizer(experiment)


def loader_of(
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    split: Literal['train', 'validation'] = 'train',
    epochs: int | None = None,
) -> Loader:
    """The data of a run from its beginning, all rows on this host."""
    return Loader(
        experiment.data,
        split=split,
        tokenizer=tokenizer,
        maker=experiment.objective,
        batch=rows_read(experiment),
        seq_len=experiment.train.seq_len,
        seed=experiment.seed_of('data'),
        masks=experiment.seed_of('masks'),
        epochs=epochs,
        chat=chat_read(experiment),
    )
