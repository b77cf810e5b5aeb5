"""What an objective wants to know of all data before the first step: of records, such as
log-probabilities under the parameters that a run begins with; or what a teacher says (teacher.py).

It is computed once, and kept in the workdir, where a run that goes on finds it. Letters of this
file: R records of a source, C figures of each.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import precision
from llama_jax.data.documents import RecordDocuments
from llama_jax.data.loader import Loader
from llama_jax.data.progress import Progress
from llama_jax.data.recipe import Given
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.layers import Params
from llama_jax.objectives.base import backbone
from llama_jax.text.chat import ChatFormat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.place import local_rows, place
from llama_jax.train.progress import say
from llama_jax.train.teacher import Taught

DIRECTORY = 'reference'
"""In the workdir."""


class References:
    """The figures of all records of a run, or what its teacher said of them.

    Args:
      begun: the parameters that the run begins with; asked for where something is to be computed.
      anew: nothing was trained yet, so that what is in the workdir is not of this run.
    """

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        mesh: Mesh,
        workdir: Path,
        chat: ChatFormat | None,
        taught: Taught,
        *,
        begun: Callable[[], Params],
        anew: bool,
    ) -> None:
        self._experiment, self._tokenizer, self._mesh = experiment, tokenizer, mesh
        self._chat, self._taught = chat, taught
        self._directory = workdir / DIRECTORY
        self._begun = functools.cache(begun)
        if anew and jax.process_index() == 0:
            shutil.rmtree(self._directory, ignore_errors=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('references')

    def training(self) -> Given:
        return self._of('train', self._experiment)

    def mean(self, given: Given) -> float | None:
        """What a checkpoint keeps of the figures: a run that goes on has to have the same."""
        if given is None or not self._experiment.objective.knows:
            return None
        known = np.concatenate([np.asarray(known_RC).ravel() for known_RC in given])
        return float(np.nanmean(known, dtype=np.float64))

    def check(self, given: Given, recorded: float | None, workdir: Path) -> None:
        """Raise UserError unless the run began with these figures: where they were computed again,
        what `start` names may have changed since."""
        mean = self.mean(given)
        if mean is None or recorded is None or math.isclose(mean, recorded, rel_tol=1e-3):
            return
        raise UserError(
            f'the reference is not that with which the run in {workdir} began (log-probabilities '
            f'are {mean:.4g} in the mean, and were {recorded:.4g}): --start '
            f'{self._experiment.start} has changed since; restore it, or give another --workdir'
        )

    def validation(self) -> tuple[Given, ...]:
        """Of each validation set."""
        data = self._experiment.data
        return tuple(
            self._of(
                'validation',
                dataclasses.replace(
                    self._experiment,
                    data=dataclasses.replace(data, sources=(source,), validation=()),
                ),
            )
            for source in data.of('validation')
        )

    def _of(self, split: Any, experiment: Experiment) -> Given:
        if not experiment.objective.knows and not self._taught.asked:
            return None
        train = experiment.train
        with Loader(
            dataclasses.replace(experiment.data, workers=0),
            split=split,
            tokenizer=self._tokenizer,
            maker=experiment.objective,
            batch=train.batch // train.accumulate,
            seq_len=train.seq_len,
            seed=0,
            rows=local_rows(self._mesh, train.batch // train.accumulate),
            epochs=1,
            chat=self._chat,
        ) as loader:
            if self._taught.asked:
                return self._taught.said(loader)
            return tuple(self._source(loader, source) for source in range(len(loader.texts)))

    def _source(self, loader: Loader, source: int) -> np.ndarray:
        experiment, texts = self._experiment, loader.texts[source]
        facts = (texts.digest, experiment.start, experiment.train.seq_len, experiment.data.too_long)
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        path = self._directory / f'{key}.npy'
        if path.exists():
            return _read(path, len(texts))
        known_RC = self._computed(loader, source)
        if jax.process_index() == 0:
            self._directory.mkdir(exist_ok=True)
            partial = path.with_suffix('.partial.npy')
            np.save(partial, known_RC)
            os.replace(partial, path)
        return known_RC

    def _computed(self, loader: Loader, source: int) -> np.ndarray:
        """Figures of the records of a source; NaN for those that give no example."""
        params, known, held = self._begun(), self._step, loader.documents[source]
        assert isinstance(held, RecordDocuments)
        found: dict[int, np.ndarray] = {}
        say(f'reading {len(held):,} records of {held.name} with the reference')
        # In tokens, which it counts as bytes: what is left is what matters.
        with Progress(f'reference of {held.name}', loader.texts[source].tokens) as progress:
            for batch, blocks in loader.in_order(source):
                with jax.set_mesh(self._mesh):
                    known_BMC = np.asarray(known(params, place(batch, self._mesh)))
                for row, own in zip(self._rows, blocks, strict=True):
                    found |= {block.document: known_BMC[row, m] for m, block in enumerate(own)}
                progress.add(sum(block.stop - block.start for own in blocks for block in own))
        for number, known_C in found.items():
            if not np.isfinite(known_C).all():
                raise UserError(
                    f'the parameters that the run begins with compute no numbers ({known_C[0]}) of '
                    f'{held.origin(number)}: their weights are damaged, or set '
                    '--compute.precision float32'
                )
        width = len(next(iter(found.values()), np.zeros(0)))
        known_RC = np.full((len(held), width), np.nan, np.float32)
        for number, known_C in found.items():
            known_RC[number] = known_C
        if jax.process_count() > 1:  # each has read its own rows
            of_all = multihost_utils.process_allgather(known_RC)
            known_RC = np.fmax.reduce(np.asarray(of_all), axis=0)
        return known_RC

    @functools.cached_property
    def _rows(self) -> list[int]:
        train = self._experiment.train
        return local_rows(self._mesh, train.batch // train.accumulate)

    @functools.cached_property
    def _step(self) -> Callable[[Params, dict[str, jax.Array]], jax.Array]:
        model_config, objective = self._experiment.model, self._experiment.objective
        compute = self._experiment.compute

        def known(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            with precision.matmuls(compute.precision):
                return objective.know(
                    layers.bind(model_config, backbone(params)), batch, compute=compute
                )

        return jax.jit(known, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


def _read(path: Path, records: int) -> np.ndarray:
    try:
        known_RC = np.load(path)
        if known_RC.ndim != 2 or len(known_RC) != records or known_RC.dtype != np.float32:
            raise ValueError(f'{known_RC.dtype} {list(known_RC.shape)} for {records} records')
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f'{path} is damaged ({error}): delete it; the same command computes it anew'
        ) from None
    return known_RC
