"""A run made ready: everything that the loop needs, checked and compiled before the first step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from llama_jax import layout, trees
from llama_jax import mesh as meshes
from llama_jax.data.load_tokenizer import check as check_tokenizer
from llama_jax.data.loader import Loader
from llama_jax.data.record import Text
from llama_jax.generate.finite import NotFiniteError
from llama_jax.model.layers import Params
from llama_jax.model.width import width_of
from llama_jax.objectives.base import Batch
from llama_jax.optim.base import optimizer
from llama_jax.optim.schedule import schedule
from llama_jax.text import template_files
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import agreement, reading, resume, teacher
from llama_jax.train.checkpoint import Checkpoints, Items, Restored
from llama_jax.train.config_file import ConfigFile, edited
from llama_jax.train.experiment import Experiment, check, to_dict
from llama_jax.train.flops import flops_per_token
from llama_jax.train.peak import CONVENTION, peak_flops
from llama_jax.train.place import HostBatch, place
from llama_jax.train.profile import Profile, Steps
from llama_jax.train.progress import Progress, say
from llama_jax.train.records import Records, read_run
from llama_jax.train.reference import References
from llama_jax.train.rollouts import Rollouts
from llama_jax.train.sample import Sampler, sampler
from llama_jax.train.start import adapted, chat_format, chat_read, refrozen
from llama_jax.train.step import (
    Metrics,
    State,
    abstract_state,
    averaging,
    carrying,
    initial_state,
    train_step,
)
from llama_jax.train.teacher import Taught
from llama_jax.train.validate import Stop, Validation, score
from llama_jax.train.wandb import package
from llama_jax.train.workdir import forget_unsaved, held, holder

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
    rollout: Callable[[HostBatch, State], HostBatch] | None
    """Makes the batch of the rows that were read, where the objective is on policy."""
    records: Records
    checkpoints: Checkpoints
    validate: Validation | None
    sample: Sampler | None
    measure: Callable[[State], dict[str, float]] | None
    progress: Progress
    profile: Profile
    metadata: dict[str, Any]
    workdir: Path
    opened: contextlib.ExitStack
    """What is to be closed in the end."""
    saved: int
    """Step of the newest checkpoint, 0 before the first."""

    def read(self) -> HostBatch:
        """The next batch: of the data, or of what the parameters write to its prompts."""
        batch = next(self.loader)
        return batch if self.rollout is None else self.rollout(batch, self.state)

    def place(self, batch: HostBatch) -> dict[str, jax.Array]:
        """The global batch on the devices, of which `batch` is this process's share."""
        return place(batch, self.mesh)

    def save(self, step: int) -> None:
        """Begin to save a checkpoint after `step`."""
        metadata = {**self.metadata, 'step': step, 'cursor': self.cursor}
        self.checkpoints.save(step, _items(self.state), metadata=metadata)
        self.saved = step

    def evaluate(self, step: int, stop: Stop) -> None:
        """Validate and sample after `step`, and record both; nothing more once `stop` says so."""
        assert self.validate is not None
        result = self.validate(self.state.evaluated, stop, carried=self.state.carried)
        if stop():
            return
        self.progress.validated(step, result)
        try:
            if self.measure is not None:
                self.progress.measured(step, self.measure(self.state))
            for one in self.sample(self.state) if self.sample else ():
                wanted = {} if one.reference is None else {'reference': one.reference}
                self.records.write('sample', step, prompt=one.prompt, text=one.text, **wanted)
        except NotFiniteError as error:  # the steps tell whether training can go on
            self.progress.note(step, f'no samples: {error}')
        self.checkpoints.validated(step, score(result))

    def out_of_patience(self, step: int) -> bool:
        """Whether training ends after the validation of `step`: none of the last
        `evaluation.patience` validations was better than the best before them."""
        patience = self.experiment.evaluation.patience
        return 0 < patience <= self.checkpoints.bad_validations(step)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()


def prepare(
    experiment: Experiment,
    workdir: Path,
    *,
    measure: Measure | None = None,
    profile: Steps | None = None,
    wandb: str | None = None,
    config_file: ConfigFile | None = None,
) -> Run:
    """Check everything, resume or begin, and compile the step.

    What costs nothing is checked before what costs minutes, and everything before a step is taken.
    Raises UserError for whatever does not fit together.
    """
    if wandb is not None:
        package(wandb)
    agreement.same({'experiment': to_dict(experiment), 'workdir': str(workdir)}, 'settings')
    agreement.same(agreement.code(), 'code')
    device_mesh = meshes.make(experiment.mesh)
    check(experiment, device_mesh)
    check_tokenizer(
        experiment.data.tokenizer, rows=experiment.model.vocab, marks=experiment.objective.marks
    )
    with contextlib.ExitStack() as opened:
        opened.enter_context(held(workdir))
        agreement.same({}, 'start')  # no process reads on before process 0 holds the directory
        shared = f'All of them must see the same {workdir}, on a file system that they share'
        agreement.same({'run.lock': holder(workdir)}, 'working directory', shared)
        return _prepare(
            experiment, workdir, device_mesh, measure, profile, wandb, config_file, opened
        )


def _prepare(
    experiment: Experiment,
    workdir: Path,
    device_mesh: Mesh,
    measure: Measure | None,
    traced: Steps | None,
    wandb: str | None,
    config_file: ConfigFile | None,
    opened: contextlib.ExitStack,
) -> Run:
    notes = forget_unsaved(workdir)
    resume.check_workdir(workdir, experiment)
    experiment, tokenizer = reading.tokenizer_of(experiment)
    chat = chat_read(experiment, workdir)
    if experiment.objective.reads is not Text:  # what it refuses, before weights are read
        reading.training_loader(experiment, tokenizer, device_mesh, None, chat).close()
    teacher.check(experiment, tokenizer)
    validates = experiment.evaluation.every > 0
    rollouts = None
    if experiment.objective.rollout is not None:
        rollouts = Rollouts(experiment, tokenizer, device_mesh, chat=chat)
    validation = None
    if validates:
        validation = Validation(experiment, tokenizer, device_mesh, rollouts, chat=chat)
    held_out = None if validation is None else functools.partial(validation.open, 0)
    sample = sampler(experiment, tokenizer, device_mesh, chat=chat, held_out=held_out)
    length, experiment = (
        experiment.train,
        reading.with_steps(experiment, tokenizer, device_mesh, chat),
    )
    train = experiment.train
    if train != length:
        wanted = f'--train.epochs {length.epochs:g}' if length.epochs else ''
        notes.append(f'{wanted or f"--train.tokens {length.tokens:,}"}: {train.steps:,} steps')

    tx = optimizer(experiment.optimizer, width_of(experiment.model))
    metadata = {
        'experiment': to_dict(experiment),
        'layers': 'stacked',
        'tokenizer': tokenizer.digest,
        'format': resume.FORMAT,
    }
    keep = experiment.checkpoint
    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        keep=keep.keep,
        keep_every=keep.keep_every,
        validated_on=None if validation is None else validation.digest,
    )
    opened.callback(checkpoints.close)
    if checkpoints.forgotten:
        notes.append(
            'the validation reads something else than before: the scores of steps '
            f'{", ".join(map(str, checkpoints.forgotten))} are given up, the best is found anew'
        )
    restored = checkpoints.restore_newest(
        _abstract_items(experiment, tx, device_mesh),
        check=lambda saved: resume.check_metadata(saved, experiment, tokenizer.digest, workdir),
        set_aside=True,
    )
    state, identity = _state(experiment, tokenizer, tx, device_mesh, restored, notes)
    cursor, start, ramp = None, 0, None
    if restored is not None:
        cursor, start = restored.metadata['cursor'], restored.step
        ramp, changed = resume.continuation(restored.metadata, experiment, workdir)
        notes += [*restored.damaged, *changed, *edited(read_run(workdir) or {}, config_file)]
        notes += [f'resumed from the checkpoint of step {start}']
    agreement.same({'start': identity}, 'weights of --start')
    taught = Taught(experiment, device_mesh, recorded=restored and restored.metadata.get('teacher'))

    profile = Profile(traced, workdir, taken=start, last=train.steps)
    opened.callback(profile.close)

    def begun() -> Params:
        return _begun(experiment, tokenizer, device_mesh) if restored else state.evaluated

    references = References(
        *(experiment, tokenizer, device_mesh, workdir, chat, taught),
        begun=begun,
        anew=restored is None,
    )
    given = references.training()
    loader = reading.training_loader(experiment, tokenizer, device_mesh, cursor, chat, given)
    if validation is not None:
        validation.given = references.validation()
    opened.callback(loader.close)
    agreement.same(reading.content(tokenizer, loader), 'data')
    if validation is not None:
        agreement.same({'validation': validation.digest}, 'validation data')
    if restored is not None:
        resume.check_data(restored.metadata, loader.digest, experiment, workdir)
        references.check(given, restored.metadata.get('reference'), workdir)
    flops = flops_per_token(experiment)
    peak, peak_source = peak_flops(device_mesh.devices.flat[0])
    records = Records(
        workdir,
        experiment,
        {
            'parameters': trees.size(state.params) + trees.size(state.frozen),
            'parameters_trained': trees.size(state.params),
            'flops_per_token': flops,
            'peak_flops': peak,
            'peak_convention': f'{CONVENTION}. Peak: {peak_source}',
            **({} if config_file is None else {'configuration': config_file.facts()}),
        },
        wandb=wandb,
    )
    opened.callback(records.close)
    if jax.process_index() == 0:
        if config_file is not None:
            config_file.keep(workdir)
        tokenizer.save_to(workdir)
        if restored is None:
            template_files.keep(chat_format(experiment), workdir)
    seconds = records.begin(start)

    state = taught.beside(state)
    lowered = train_step(
        experiment.model,
        experiment.objective,
        tx,
        learning_rate=schedule(experiment.optimizer.schedule, train.steps, ramp),
        accumulate=train.accumulate,
        compute=experiment.compute,
        average=experiment.optimizer.average,
    )
    say('compiling the training step')
    empty, rollout = loader.empty_batch(), None
    if rollouts is not None:
        rollout = rollouts.of_training(loader.documents, begun=begun)
    with jax.set_mesh(device_mesh):
        blank = empty if rollouts is None else rollouts.empty(empty)
        step = lowered.lower(state, place(blank, device_mesh)).compile()
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
        cursor=cursor or empty['cursor'],
        step=step,
        loader=loader,
        rollout=rollout,
        records=records,
        checkpoints=checkpoints,
        validate=validation,
        sample=sample,
        measure=measure
        and (lambda state: measure(experiment, state.evaluated, tokenizer, device_mesh)),
        progress=progress,
        profile=profile,
        metadata={
            **{**metadata, 'data': loader.digest, 'ramp': resume.ramp_record(ramp)},
            'start': identity,
            'reference': references.mean(given),
            'teacher': taught.identity,
        },
        workdir=workdir,
        opened=opened.pop_all(),
        saved=start,
    )


def _state(
    experiment: Experiment,
    tokenizer: Tokenizer,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    restored: Restored | None,
    notes: list[str],
) -> tuple[State, Any]:
    """The state to go on from, and what tells the weights of its start from others; what is to be
    said of them is added to `notes`."""
    if restored is not None:
        arrays = {name: restored.items[name] for name in restored.items if name != 'rest'}
        state = State(**arrays, **restored.items['rest'], tune=experiment.tune)
        return refrozen(state, experiment, restored.metadata, mesh)
    state, identity, told = adapted(_fresh(experiment, tx, mesh), experiment, tokenizer, mesh)
    notes += told
    state = carrying(experiment.model, experiment.objective, state)
    return averaging(state) if experiment.optimizer.average else state, identity


def _fresh(experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    return initial_state(
        *(experiment.model, experiment.objective, tx),
        seed=experiment.seed_of('init'),
        mesh=mesh,
        tune=experiment.tune,
        masks=experiment.seed_of('masks'),
    )


def _begun(experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh) -> Params:
    """The parameters that a run began with, for one that goes on."""
    state = _fresh(experiment, optax.identity(), mesh)
    return adapted(state, experiment, tokenizer, mesh)[0].evaluated


def _items(state: Any) -> Items:
    """The state by what is loaded together: generation wants the parameters alone."""
    rest = {
        'optimizer': state.optimizer,
        'step': state.step,
        'key': state.key,
        'skipped': state.skipped,
        'skipped_in_a_row': state.skipped_in_a_row,
    }
    more = {'average': state.average, 'carried': state.carried}
    kept = {name: arrays for name, arrays in more.items() if arrays}
    return {'params': state.params, **kept, 'rest': rest}


def _abstract_items(experiment: Experiment, tx: Any, mesh: Mesh) -> Items:
    abstract = abstract_state(experiment.model, experiment.objective, tx, experiment.tune)
    if experiment.optimizer.average:
        abstract = jax.eval_shape(averaging, abstract)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        layout.shardings(abstract, mesh),
    )
    return _items(placed)
