"""The teacher of a distillation: found, loaded beside the model or asked once, before the first
step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import precision
from llama_jax.data.config import cache_dir
from llama_jax.data.encoded import Records
from llama_jax.data.loader import Loader
from llama_jax.data.prepare import locked
from llama_jax.data.progress import Progress
from llama_jax.data.recipe import Given
from llama_jax.errors import UserError
from llama_jax.model.tune import Frozen
from llama_jax.objectives.base import EXTRA
from llama_jax.objectives.distill import TEACHER, Distillation, Teacher
from llama_jax.text.files import tokenizer_of
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import restore
from llama_jax.train.base import Identity
from llama_jax.train.experiment import Experiment
from llama_jax.train.place import place
from llama_jax.train.progress import say
from llama_jax.train.start import origin
from llama_jax.train.step import State
from llama_jax.units import size

_VERSION = 1


def check(experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the teacher, where there is one, can teach this model. Reads no
    parameters."""
    objective = experiment.objective
    if not isinstance(objective, Distillation):
        return
    name, model = objective.teacher, experiment.model
    found = origin(name, '--objective.teacher')
    if tokenizer_of(found.tokenizer).digest != tokenizer.whole.digest:
        raise UserError(
            f'--objective.teacher {name} has another vocabulary than the model, whose tokens it '
            f'could not name: give a teacher with the same, or --data.tokenizer.path '
            f'{found.tokenizer}'
        )
    if found.model.vocab > model.vocab:
        raise UserError(
            f'--objective.teacher {name} has {found.model.vocab} rows of embedding, the model '
            f'{model.vocab}: set --model.vocab {found.model.vocab}'
        )
    objective.task.check(found.model)
    longest = max(objective.lengths(experiment.train.seq_len).values())
    if longest > found.model.context:
        raise UserError(
            f'--objective.teacher {name} has a context of {found.model.context}, and rows have '
            f'{longest} positions: lower --train.seq-len'
        )
    if objective.top_k and jax.process_count() > 1:
        raise UserError(
            '--objective.top-k is computed by one process: set 0, which runs the teacher in each '
            'step'
        )


def flops(experiment: Experiment) -> float:
    """FLOPs per position of a row of a teacher that runs in each step, which are those of a forward
    pass; 0 without one. Reads no parameters."""
    objective = experiment.objective
    if not isinstance(objective, Distillation) or objective.top_k:
        return 0.0
    found = origin(objective.teacher, '--objective.teacher').model
    model = dataclasses.replace(found, vocab=experiment.model.vocab)
    return objective.task.flops(model, experiment.train.seq_len) / 3


class Taught:
    """The teacher of a run, where its objective has one.

    Args:
      recorded: the identity of the teacher with which the run began; None where it begins.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, *, recorded: Identity | None) -> None:
        self._experiment, self._mesh, self._recorded = experiment, mesh, recorded
        self._objective = experiment.objective
        self.identity: Identity | None = None

    @property
    def asked(self) -> bool:
        """Whether the teacher is asked before the first step, and not in each."""
        return isinstance(self._objective, Distillation) and self._objective.top_k > 0

    def beside(self, state: State) -> State:
        """`state` with the teacher among what is frozen, where it runs in each step."""
        if not isinstance(self._objective, Distillation) or self.asked:
            return state
        extra = {**state.frozen.get(EXTRA, {}), TEACHER: self._teacher}
        return dataclasses.replace(state, frozen={**state.frozen, EXTRA: extra})

    def said(self, loader: Loader) -> Given:
        """What the teacher says of all that `loader` reads: computed now, where nobody has kept
        it."""
        return tuple(self._of_source(loader, source) for source in range(len(loader.texts)))

    @functools.cached_property
    def _teacher(self) -> Teacher:
        objective, experiment = self._objective, self._experiment
        assert isinstance(objective, Distillation)
        asked = dataclasses.replace(experiment, start=objective.teacher, tune=Frozen())
        params, self.identity, said = restore.base(
            asked,
            self._mesh,
            experiment.compute,
            recorded=self._recorded,
            what='--objective.teacher',
        )
        say(f'the teacher is {objective.teacher}{said}')
        model = experiment.model
        config = dataclasses.replace(
            origin(objective.teacher, '--objective.teacher').model,
            vocab=model.vocab,
            vocab_padding=model.vocab_padding,
            dropout=0.0,
        )
        return Teacher(params, config)

    def _of_source(self, loader: Loader, source: int) -> Said:
        objective, experiment, texts = self._objective, self._experiment, loader.texts[source]
        assert isinstance(objective, Distillation)
        teacher = self._teacher
        ends = not isinstance(texts, Records) and objective.ends
        offsets = np.asarray(texts.offsets) + ends * np.arange(len(texts) + 1)
        width = 2 * objective.top_k + 1
        facts = (
            *(_VERSION, texts.digest, ends, json.dumps(self.identity), experiment.model.ids),
            *(objective.top_k, objective.temperature, experiment.compute.precision),
            *(experiment.train.seq_len, experiment.data.too_long),
        )
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        path = cache_dir() / 'teachers' / f'{key}.npy'
        try:
            with locked(path.with_suffix('.lock')):
                if not path.exists():
                    shape, partial = (int(offsets[-1]), width), path.with_suffix('.partial.npy')
                    try:
                        self._ask(teacher, loader, source, offsets, partial, shape)
                        os.replace(partial, path)
                    finally:  # other settings have another name: nobody would write over it
                        partial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f'cannot keep what the teacher says of {texts.name} in {path.parent} '
                f'({error.strerror}; {size(4 * int(offsets[-1]) * width)}): make room there, set '
                'LLAMA_JAX_CACHE to another directory, or lower --objective.top-k'
            ) from error
        said = Said(path, offsets)
        said.check(width)
        return said

    def _ask(
        self,
        teacher: Teacher,
        loader: Loader,
        source: int,
        offsets: np.ndarray,
        partial: Path,
        shape: tuple[int, int],
    ) -> None:
        """Lets the teacher read all of a source, and keeps what it says of each unit."""
        said = np.lib.format.open_memmap(partial, 'w+', np.float32, shape)
        with partial.open('r+b') as file:  # a disk that is full in the midst ends the process
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        name = loader.texts[source].name
        say(f'the teacher reads {name}')
        # In units, which it counts as bytes: what is left is what matters.
        with Progress(f'teacher of {name}', shape[0]) as progress:
            for batch, blocks in loader.in_order(source):
                with jax.set_mesh(self._mesh):
                    said_BTC = np.asarray(self._step(teacher, place(batch, self._mesh)))
                for row, own in enumerate(blocks):
                    for m, block in enumerate(own):
                        said_NC = said_BTC[row, batch['segments'][row] == m + 1]
                        if np.isnan(said_NC).any():
                            raise UserError(
                                'the teacher computes no numbers of '
                                f'{loader.origin(block)}: its weights are damaged, or set '
                                '--compute.precision float32'
                            )
                        first = offsets[block.document] + block.start
                        said[first : first + len(said_NC)] = said_NC
                progress.add(sum(block.stop - block.start for own in blocks for block in own))
        said.flush()

    @functools.cached_property
    def _step(self) -> Callable[[Teacher, dict[str, jax.Array]], jax.Array]:
        objective, compute = self._objective, self._experiment.compute
        assert isinstance(objective, Distillation)

        def step(teacher: Teacher, batch: dict[str, jax.Array]) -> jax.Array:
            with precision.matmuls(compute.precision):
                top = objective.said(teacher.model(), batch, compute=compute)
            arrays = top.id_BTk.astype(jnp.float32), top.log_p_BTk, top.log_rest_BT[..., None]
            return jnp.concatenate(arrays, axis=-1)

        return jax.jit(step, out_shardings=NamedSharding(self._mesh, PartitionSpec()))


@dataclasses.dataclass(frozen=True)
class Said:
    """What a teacher said, on disk: float32 [units, 2 k + 1], by document. Travels to worker
    processes, where its file is opened anew."""

    path: Path
    offsets: np.ndarray
    """Units before each document, and in all [D + 1]."""

    def __getitem__(self, document: int) -> np.ndarray:
        return self._array[self.offsets[document] : self.offsets[document + 1]]

    @functools.cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode='r')

    def check(self, width: int) -> None:
        """Raise UserError unless the file is whole."""
        try:
            if self._array.shape != (self.offsets[-1], width):
                raise ValueError(f'{list(self._array.shape)}')
        except (OSError, ValueError) as error:
            raise UserError(
                f'{self.path} is damaged ({error}): delete it; the same command asks the teacher '
                'again'
            ) from None

    def __getstate__(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
