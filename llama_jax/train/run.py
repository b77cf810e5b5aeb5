"""A run made ready: everything that the loop needs, checked and compiled before the first step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llama_jax import layout, trees
from llama_jax import mesh as meshes
from llama_jax.data.loader import Loader
from llama_jax.data.sources import load_tokenizer
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Batch
from llama_jax.optim.adamw import optimizer
from llama_jax.optim.schedule import schedule
from llama_jax.train import resume
from llama_jax.train.checkpoint import Checkpoints, Items
from llama_jax.train.experiment import Experiment, check, check_vocabulary, to_dict
from llama_jax.train.peak import CONVENTION, peak_flops
from llama_jax.train.place import HostBatch, local_rows, place
from llama_jax.train.progress import Progress, say
from llama_jax.train.records import Records
from llama_jax.train.restore import adapted
from llama_jax.train.sample import sampler
from llama_jax.train.step import Metrics, State, abstract_state, initial_state, train_step
from llama_jax.train.validate import Validation

Measure = Callable[[Experiment, Params, Tokenizer, Mesh], dict[str, float]]
"""What a caller wants measured of the parameters during a run, such as evaluate/light.py."""


@dataclass
class Run:
    """What the loop works with."""

    experiment: Experiment
    mesh: Mesh
    state: State
    cursor: str
    """Place in the data after the last step taken."""
    step: Callable[[State, Batch], tuple[State, Metrics]]
    """The compiled training step."""
    loader: Loader
    records: Records
    checkpoints: Checkpoints
    validate: Validation | None
    sample: Callable[[State], Iterator[tuple[str, str]]] | None
    measure: Callable[[State], dict[str, float]] | None
    progress: Progress
    metadata: dict[str, Any]
    workdir: Path

    def place(self, batch: HostBatch) -> dict[str, jax.Array]:
        """The global batch on the devices, of which `batch` is this process's share."""
        return place(batch, self.mesh)

    def largest(self, value: int) -> jax.Array | int:
        """The largest `value` of all processes; they agree behind the step, and none waits here."""
        if jax.process_count() == 1:
            return value
        each = NamedSharding(self.mesh, jax.sharding.PartitionSpec(self.mesh.axis_names))
        mine = np.array([value], np.int32)
        return jnp.max(jax.make_array_from_callback((self.mesh.size,), each, lambda _: mine))

    def save(self, step: int, bits_per_byte: float | None) -> None:
        """Begin to save a checkpoint after `step`."""
        metadata = {**self.metadata, 'step': step, 'cursor': self.cursor}
        items = _items(self.state)
        self.checkpoints.save(step, items, metadata=metadata, bits_per_byte=bits_per_byte)

    def evaluate(self, step: int) -> float | None:
        """Validate and sample after `step`, and record both; bits per byte where defined."""
        assert self.validate is not None
        result = self.validate(self.state.params)
        self.progress.validated(step, result)
        if self.measure is not None:
            self.progress.measured(step, self.measure(self.state))
        for prompt, text in self.sample(self.state) if self.sample else ():
            self.records.write('sample', step, prompt=prompt, text=text)
        bits = result.get('bits_per_byte', math.nan)
        return bits if math.isfinite(bits) else None  # NaN would stay the best for ever

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.ExitStack() as closing:  # every one, also when another fails
            closing.callback(self.checkpoints.close)
            closing.callback(self.records.close)
            closing.callback(self.loader.close)


def prepare(experiment: Experiment, workdir: Path, *, measure: Measure | None = None) -> Run:
    """Check everything, resume or begin, and compile the step.

    Raises UserError for whatever does not fit together, before anything expensive.
    """
    train = experiment.train
    device_mesh = meshes.make(experiment.mesh)
    check(experiment, device_mesh)
    resume.check_workdir(workdir, experiment)
    tokenizer = load_tokenizer(experiment.data)
    check_vocabulary(experiment, tokenizer.vocab_size)

    tx = optimizer(experiment.optimizer)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'cannot write in {workdir} ({error.strerror}): give another --workdir'
        ) from error
    metadata = {
        'experiment': to_dict(experiment),
        'layers': 'stacked',
        'tokenizer': tokenizer.digest,
        'format': resume.FORMAT,
    }
    checkpoints = Checkpoints(workdir / 'checkpoints', keep=experiment.checkpoint.keep)
    restored = checkpoints.restore_newest(
        _abstract_items(experiment, tx, device_mesh),
        check=lambda saved: resume.check_metadata(saved, experiment, tokenizer.digest, workdir),
        set_aside=True,
    )
    ramp = None
    if restored is None:
        state = initial_state(
            experiment.model, experiment.objective, tx, seed=experiment.seed, mesh=device_mesh
        )
        state, notes = adapted(state, experiment, tokenizer, device_mesh)
        cursor, start = None, 0
    else:
        state = State(params=restored.items['params'], **restored.items['rest'])
        cursor, start = restored.metadata['cursor'], restored.step
        ramp, changed = resume.continuation(restored.metadata, experiment, workdir)
        notes = [*restored.damaged, *changed, f'resumed from the checkpoint of step {start}']

    loader = _loader(experiment, tokenizer, device_mesh, cursor)
    validates = experiment.evaluation.every > 0
    validation = Validation(experiment, tokenizer, device_mesh) if validates else None
    if restored is not None:
        try:
            resume.check_data(restored.metadata, loader.digest, experiment, workdir)
        except UserError:
            loader.close()
            raise
    flops = experiment.objective.flops(experiment.model, train.seq_len)
    peak, peak_source = peak_flops(device_mesh.devices.flat[0])
    tokenizer_file = workdir / 'tokenizer.model'
    records = Records(
        workdir,
        experiment,
        {
            'parameters': trees.size(state.params),
            'flops_per_token': flops,
            'peak_flops': peak,
            'peak_convention': f'{CONVENTION}. Peak: {peak_source}',
        },
    )
    if jax.process_index() == 0:
        tokenizer.save(tokenizer_file)
    seconds = records.begin(start)

    lowered = train_step(
        experiment.model,
        experiment.objective,
        tx,
        learning_rate=schedule(experiment.optimizer.schedule, train.steps, ramp),
        accumulate=train.accumulate,
        compute=experiment.compute,
    )
    say('compiling the training step')
    with jax.set_mesh(device_mesh):
        step = lowered.lower(state, place(loader.empty_batch(), device_mesh)).compile()
    progress = Progress(
        experiment,
        records,
        first_step=start,
        seconds=seconds,
        flops_per_token=flops,
        peak_flops=peak,
    )
    for note in notes:
        progress.note(start, note)
    return Run(
        experiment=experiment,
        mesh=device_mesh,
        state=state,
        cursor=loader.empty_batch()['cursor'],
        step=step,
        loader=loader,
        records=records,
        checkpoints=checkpoints,
        validate=validation,
        sample=sampler(experiment, tokenizer, device_mesh),
        measure=measure
        and (lambda state: measure(experiment, state.params, tokenizer, device_mesh)),
        progress=progress,
        metadata={**metadata, 'data': loader.digest, 'ramp': resume.ramp_record(ramp)},
        workdir=workdir,
    )


def _loader(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    cursor: str | None,
) -> Loader:
    return Loader(
        experiment.data,
        split='train',
        tokenizer=tokenizer,
        maker=experiment.objective,
        batch=experiment.train.batch,
        seq_len=experiment.train.seq_len,
        seed=experiment.seed,
        rows=local_rows(mesh, experiment.train.batch),
        cursor=cursor,
    )


def _items(state: Any) -> Items:
    """The state by what is loaded together: generation wants the parameters alone."""
    rest = {
        'optimizer': state.optimizer,
        'step': state.step,
        'key': state.key,
        'skipped': state.skipped,
        'skipped_in_a_row': state.skipped_in_a_row,
    }
    return {'params': state.params, 'rest': rest}


def _abstract_items(experiment: Experiment, tx: Any, mesh: Mesh) -> Items:
    abstract = abstract_state(experiment.model, experiment.objective, tx)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh),
    )
    return _items(placed)
