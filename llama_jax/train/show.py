"""A dry run of the data: the first batches of a run as text."""

from __future__ import annotations

import sys

from rich.console import Console

from llama_jax import mesh as meshes
from llama_jax.data import show
from llama_jax.data.loader import Loader
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.train.experiment import Experiment, check, with_tokenizer
from llama_jax.train.start import chat_read


def show_batches(experiment: Experiment, n: int) -> None:
    """Print the first `n` global batches that a run of the experiment begins with; train nothing.

    In colours on a terminal, else with brackets.
    """
    if n < 1:
        raise UserError(f'--show-batch {n}: give the number of batches to show, 1 or more')
    check(experiment, meshes.make(experiment.mesh))
    open_sources(experiment.data, 'train', experiment.objective.reads)
    experiment, tokenizer = with_tokenizer(experiment)
    console = Console(file=sys.stdout, highlight=False)
    with Loader(
        experiment.data,
        split='train',
        tokenizer=tokenizer,
        maker=experiment.objective,
        batch=experiment.train.batch,
        seq_len=experiment.train.seq_len,
        seed=experiment.seed,
        chat=chat_read(experiment),
    ) as loader:
        for line in show.batches(loader, tokenizer, n, plain=not console.is_terminal):
            console.print(line, soft_wrap=True)
