"""Models of others as trained ones, and the likelihood of whole texts, as everybody reports it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.convert import pretrained
from llama_jax.data.config import DataConfig
from llama_jax.data.documents import Documents
from llama_jax.data.load_tokenizer import for_model, warn_of_losses
from llama_jax.errors import UserError
from llama_jax.evaluate.represent import place, round_up
from llama_jax.generate import finite
from llama_jax.mesh import batch_shards
from llama_jax.objectives.causal import CausalLM
from llama_jax.text.files import tokenizer_of
from llama_jax.train.experiment import Experiment, TrainConfig
from llama_jax.train.restore import Trained
from llama_jax.train.validate import figures, loss_step, loss_sums

TOKENS = 32_768
"""That are read of a set, at most: documents spread evenly over it."""
LENGTH = 1024
"""Tokens that are read at once, or the context where it is shorter."""
ROWS = 4


def of_others(name: str, mesh: Mesh, what: str) -> tuple[Trained, tuple[int, ...]]:
    """Weights of others as a trained causal model, and the ids that begin a text for it; see
    `pretrained.find`, also for the errors."""
    found = pretrained.find(name, what)
    begin = found.text().begin
    layout.check(found.config.sizes(), mesh)
    experiment = Experiment(
        name=found.name,
        model=found.config,
        data=DataConfig(),
        train=TrainConfig(steps=1, batch=1, seq_len=min(LENGTH, found.config.context)),
    )
    tokenizer = for_model(tokenizer_of(found.tokenizer), ids=found.config.ids, marks=False)
    if tokenizer.vocab_size > found.config.ids:
        raise UserError(
            f'{found.name}: the embedding has {found.config.ids} rows and the vocabulary '
            f'{tokenizer.vocab_size} tokens: they are of different models'
        )
    warn_of_losses(found.name, tokenizer.losses)
    return Trained(experiment, found.params(mesh), {}, tokenizer, 0), begin


def likelihood_of_text(
    trained: Trained, documents: Documents, mesh: Mesh, *, begin: Sequence[int]
) -> dict[str, Any] | None:
    """'bits_per_byte' and 'nats_per_token' of documents, each by itself after `begin`; 'tokens',
    'bytes' and 'documents' say of how many. Without `begin` a document's first token is given, not
    asked for. None where the objective has no likelihood of text from its beginning.

    A document that is longer than what is read at once goes on with its last token: the mean over
    these tokens is what `transformers` reports as the loss of each part.
    """
    whole = trained.experiment.objective.reading.whole
    if whole is None or whole.kind != 'exact' or whole.read is not None:
        return None
    n, taken = len(documents), 0
    ids: list[np.ndarray] = []
    while len(ids) < n and taken < TOKENS:
        # Halves first: evenly spread, wherever it ends.
        tokens = trained.tokenizer.encode(documents[_spread(len(ids), n)])[: TOKENS - taken]
        ids.append(np.concatenate([np.array(begin, np.int32), tokens]))
        taken += len(tokens)
    length = min(LENGTH, trained.config.context)
    rows = round_up(ROWS, batch_shards(mesh))
    step = loss_step(trained.config, CausalLM(), trained.experiment.compute)
    with jax.set_mesh(mesh):
        sums = loss_sums(
            step,
            trained.params,
            _batches(ids, length, rows),
            place=lambda batch: {name: place(x, mesh) for name, x in batch.items()},
            byte_lengths=trained.tokenizer.byte_lengths,
        )
    if not sums.get('weight'):
        raise UserError('the text has no token whose likelihood could be asked for: give more')
    if not math.isfinite(sums['nll']):
        raise finite.error('the model gives', trained.params, trained.experiment.compute.precision)
    if trained.tokenizer.dummy_prefix and begin:  # a space that is in no text
        sums['bytes'] -= sum(len(text) > len(begin) for text in ids)
    return {
        'bits_per_byte': figures(sums).get('bits_per_byte'),
        'nats_per_token': sums['nll'] / sums['weight'],
        'tokens': int(sums['weight']),
        'bytes': int(sums['bytes']),
        'documents': len(ids),
    }


def _spread(i: int, n: int) -> int:
    """The i-th of n places, each once, in an order whose every beginning is spread evenly."""
    stride = max(1, int(n * 0.618))
    while math.gcd(stride, n) > 1:
        stride += 1
    return i * stride % n


def _batches(ids: Sequence[np.ndarray], length: int, rows: int) -> Iterator[dict[str, np.ndarray]]:
    windows = [
        text[i : i + length + 1] for text in ids for i in range(0, max(len(text) - 1, 0), length)
    ]
    longest = max((len(window) - 1 for window in windows), default=0)
    padded = min(length, round_up(longest, 64))
    for start in range(0, len(windows), rows):
        batch = {
            name: np.zeros((rows, padded), np.int32)
            for name in ('inputs', 'targets', 'segments', 'positions')
        }
        batch['positions'][:] = np.arange(padded)
        batch['weights'] = np.zeros((rows, padded), np.float32)
        for row, window in enumerate(windows[start : start + rows]):
            n = len(window) - 1
            batch['inputs'][row, :n], batch['targets'][row, :n] = window[:-1], window[1:]
            batch['segments'][row, :n], batch['weights'][row, :n] = 1, 1
        yield batch
