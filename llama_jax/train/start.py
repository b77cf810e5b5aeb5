"""What a run begins with that `start` names: the parameters of another run, or weights of others.

Their model and their tokenizer become those of the run (`started`), but for settings of which the
arrays do not depend, and for more rows of the embedding.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.convert import pretrained
from llama_jax.convert.pretrained import Weights
from llama_jax.data.record import Text
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.tune import Full
from llama_jax.objectives.base import backbone
from llama_jax.paths import local
from llama_jax.text import template_files
from llama_jax.text.chat import FORMATS, ChatFormat
from llama_jax.text.files import tokenizer_of
from llama_jax.text.tokenizer import Tokenizer, TokenizerConfig
from llama_jax.train import restore
from llama_jax.train.base import Identity, merged
from llama_jax.train.checkpoint import difference, present
from llama_jax.train.config_file import know_objectives
from llama_jax.train.experiment import Experiment, from_dict
from llama_jax.train.plain import to_plain
from llama_jax.train.records import read_run
from llama_jax.train.step import State

log = logging.getLogger(__name__)

_SETTINGS = ('config.json', 'params.json')
"""One of them is in the directory of a model."""
START_MAY_CHANGE = ('context', 'rope_theta', 'rope_scaling', 'dropout')
"""Settings of a model that has the same arrays whatever they are: a run may have others than what
it begins with."""
_ROWS = ('vocab', 'vocab_padding')


@dataclass(frozen=True)
class Origin:
    """What `start` names."""

    name: str
    model: ModelConfig
    tokenizer: Path
    """The file or directory that holds it."""
    weights: Weights | None = None
    """Of others; None: it is a run."""

    def chat(self) -> ChatFormat | None:
        """The format of its chats; None where it has none."""
        if self.weights is None:
            return template_files.kept(self.tokenizer)
        return self.weights.text().chat


def origin(start: str, what: str = '--start') -> Origin:
    """Finds it; reads no parameters. Raises UserError when there is neither a run nor a model.
    `what` is the option that names it."""
    workdir, _ = restore.named(start, what)
    if read_run(workdir) is not None:
        return Origin(start, restore.experiment_of(workdir).model, workdir)
    if not pretrained.is_there(start, what):
        raise UserError(
            f'{workdir} holds no run, and no model of others is there: give {what} a RUN, '
            f'RUN@STEP, RUN@best or RUN@mean:N, {", ".join(pretrained.PACKAGES)}, a .gguf file or '
            'the directory of a model'
        )
    try:
        weights = _weights(start, what)
    except UserError as error:
        if workdir.is_dir() and not any((workdir / name).exists() for name in _SETTINGS):
            raise UserError(f'{workdir} holds no run, and is no model: {error}') from None
        raise
    return Origin(start, weights.config, weights.tokenizer, weights)


def chat_of(start: str | None) -> ChatFormat | None:
    """The format of chats of what `start` names."""
    return None if start is None else origin(start).chat()


def chat_format(experiment: Experiment, workdir: Path | None = None) -> ChatFormat | None:
    """How a run writes chats: as `data.chat` says, else as what it begins with; None where neither
    is there. A run that has begun in `workdir` has kept it, wherever it came from.

    Raises UserError for a format that is not.
    """
    given = experiment.data.chat
    there = given is not None and (given in FORMATS or local(given, '--data.chat').is_file())
    if not there and workdir is not None and _begun(workdir) is not None:
        return template_files.kept(workdir)
    if given is not None:
        return template_files.chosen(given, '--data.chat')
    return chat_of(experiment.start)


def chat_read(experiment: Experiment, workdir: Path | None = None) -> ChatFormat | None:
    """`chat_format` for the records of the objective; None where it reads texts."""
    return None if experiment.objective.reads is Text else chat_format(experiment, workdir)


@functools.lru_cache(maxsize=2)  # asked for several times; what there is to warn of is told once
def _weights(start: str, what: str) -> Weights:
    return pretrained.find(start, what)


def started(experiment: Experiment, workdir: Path | None = None) -> Experiment:
    """The experiment with the model and the tokenizer of its start, but for dropout, which is a
    matter of training; of the run in `workdir`, where it has begun with the same."""
    if experiment.start is None:
        return experiment
    before = _begun(workdir) if workdir is not None else None
    if before is not None and before.start == experiment.start:
        model, tokenizer = before.model, before.data.tokenizer
        if tokenizer.path is not None and not Path(tokenizer.path).exists():
            tokenizer = replace(tokenizer, path=str(workdir))
    else:
        found = origin(experiment.start)
        model = replace(found.model, dropout=experiment.model.dropout)
        tokenizer = TokenizerConfig(path=str(found.tokenizer))
        log.info(
            'the model of %s: %d layers of %d, a vocabulary of %s, a context of %s, its tokenizer',
            *(found.name, model.layers, model.dim, f'{model.vocab:,}', f'{model.context:,}'),
        )
    data = replace(experiment.data, tokenizer=tokenizer)
    return replace(experiment, model=model, data=data)


def settled(experiment: Experiment, default: Experiment) -> Experiment:
    """The `started` experiment `default`, as it was overridden: with rows for the control tokens of
    an objective that has any, where no number of rows is given.

    Raises UserError for settings that its tokenizer leaves without effect.
    """
    recipe = experiment.data.tokenizer
    for field in dataclasses.fields(recipe):
        if field.name != 'path' and getattr(recipe, field.name) != field.default:
            option = f'--data.tokenizer.{field.name}'.replace('_', '-')
            raise UserError(
                f'{option} has no effect with --start {experiment.start}, whose tokenizer is used: '
                'leave it out'
            )
    model = experiment.model
    if experiment.objective.marks and model.vocab == default.model.vocab:
        if tokenizer_of(recipe.path or '').vocab_size > model.ids:
            model = replace(model, vocab=0, vocab_padding=0)
    elif model.vocab != default.model.vocab:
        model = replace(model, vocab_padding=0)
    return replace(experiment, model=model)


def _begun(workdir: Path) -> Experiment | None:
    """The experiment of a run that has saved a checkpoint."""
    run = read_run(workdir) if present(workdir / 'checkpoints') else None
    if run is None:
        return None
    know_objectives(workdir, run, run['experiment'])
    return from_dict(run['experiment'])


def check_start(experiment: Experiment) -> None:
    """Raise UserError unless `experiment` can begin with what `start` names, where it names
    something. Reads no parameters."""
    if experiment.start is None:
        return
    found, name = origin(experiment.start), experiment.start
    _, fixed = model_differences(found.model, experiment.model)
    if fixed:
        options = ', '.join(f'--model.{line.split(":")[0]}'.replace('_', '-') for line in fixed)
        raise UserError(
            f'--start {name} has another architecture; it differs in {"; ".join(fixed)}: give '
            f'{options} as it has'
        )
    if found.model.positions == 'learned' and found.model.context != experiment.model.context:
        raise UserError(
            f'--start {name} has learned positions, a table of {found.model.context} rows: set '
            f'--model.context {found.model.context}, for only rotary and sinusoidal positions go '
            'further'
        )
    if found.weights is None:
        restore.check_checkpoint(name, '--start')
    elif experiment.data.tokenizer.path is None:
        raise _another_tokenizer(found)
    else:
        found.weights.text()  # or rows would be added for the tokens of another model


def adapted(
    state: State, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[State, Identity | None, list[str]]:
    """`state` with the backbone that `experiment.start` names, where it names one, which
    `check_start` has looked at: among the parameters, or frozen, and its identity then; and what to
    say of it.

    Raises UserError when that has another tokenizer.
    """
    if experiment.start is None:
        return state, None, []
    found = origin(experiment.start)
    if tokenizer_of(found.tokenizer).digest != tokenizer.whole.digest:
        raise _another_tokenizer(found)
    rows, there = experiment.model.vocab, found.model.vocab
    changed, _ = model_differences(found.model, experiment.model)
    notes = [f'another setting than there: model.{line}' for line in changed]
    if rows > there:
        notes.append(
            f'{rows - there} rows are added to the {there} of the embedding, each the mean of those'
        )
    if not isinstance(experiment.tune, Full):
        frozen, identity, said = restore.base(experiment, mesh, experiment.compute, recorded=None)
        notes.insert(0, f'begun upon the parameters of {experiment.start}{said}, which stay')
        return replace(state, frozen=frozen), identity, notes
    for leaf in jax.tree.leaves(backbone(state.params)):
        leaf.delete()  # or there would be room for two models
    if found.weights is not None:
        params, said = found.weights.params(mesh, rows=rows), ''
    else:
        run = restore.load(experiment.start, mesh, what='--start')
        params, said = merged(run.params, mesh), f', step {run.step}'
        if rows > there:
            params = restore.grown(params, rows, ids=found.model.ids, mesh=mesh)
    notes.insert(0, f'begun with the parameters of {experiment.start}{said}')
    return replace(state, params={**state.params, **params}), None, notes


def refrozen(
    state: State, experiment: Experiment, metadata: dict[str, Any], mesh: Mesh
) -> tuple[State, Identity | None]:
    """`state` of a checkpoint with this metadata, and what it leaves out: what the run does not
    train. Raises UserError where `start` is no longer what it was."""
    if isinstance(experiment.tune, Full):
        return state, None
    frozen, identity, _ = restore.base(
        experiment, mesh, experiment.compute, recorded=metadata['start']
    )
    return replace(state, frozen=frozen), identity


def _another_tokenizer(found: Origin) -> UserError:
    return UserError(
        f'--start {found.name} has another tokenizer: set --data.tokenizer.path {found.tokenizer}'
    )


def model_differences(before: ModelConfig, after: ModelConfig) -> tuple[list[str], list[str]]:
    """Fields that differ: those of which the arrays do not depend, and the others. The number of
    rows may grow, and may be left to the tokenizer."""
    one, other = to_plain(before), to_plain(after)
    if not 0 < after.vocab < before.vocab:
        other |= {name: one[name] for name in _ROWS}
    other |= {'vocab_padding': one['vocab_padding']}
    lines = difference(one, other)
    free = [line for line in lines if line.split(':')[0].split('.')[0] in START_MAY_CHANGE]
    return free, [line for line in lines if line not in free]
