"""Everything that defines a run, as one frozen value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from llama_jax import layout, mesh
from llama_jax.data.config import DataConfig
from llama_jax.data.load_tokenizer import check_rows, for_model, load_tokenizer
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers, width
from llama_jax.model import tune as tuning
from llama_jax.model.config import VOCAB_MULTIPLE, Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.tune import Frozen, Full, LoRA, Tune
from llama_jax.objectives.base import EXTRA, Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.optim.adamw import AdamW
from llama_jax.optim.base import OptimizerConfig, optimizer
from llama_jax.optim.muon import Muon
from llama_jax.optim.schedule import schedule
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.plain import from_plain, own_classes, to_plain
from llama_jax.train.rewards import judge


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of a run."""

    steps: int
    """Updates of the parameters. 0: as many as `tokens` or `epochs` ask for."""
    batch: int
    """Rows per step, over all devices and hosts."""
    seq_len: int
    """Tokens per row."""
    accumulate: int = 1
    """Microbatches per step: less memory, the same update."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row whose loss or gradient was not finite."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    tokens: int = 0
    """Instead of `steps`: positions to process, of which a step has batch x seq_len."""
    epochs: float = 0.0
    """Instead of `steps`: how often to read the training text, measured by its packing. Of several
    sources so much in all, in the shares of the mixture."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured during a run."""

    every: int = 1000
    """Steps between validations; one always follows the last step. 0: none."""
    batches: int = 0
    """Batches of the validation split to use. 0: all."""
    prompts: tuple[str, ...] = ()
    """Continued at each validation, as samples for people to read."""
    examples: int = 0
    """Held-out records that are answered at each validation, to be read beside the answers that
    they have; of a classification, texts and their labels."""
    sample_tokens: int = 128
    patience: int = 0
    """End the training after so many validations in a row that are no better than the best before
    them, which RUN@best names; a checkpoint is saved at each validation. 0: train to the end."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep. One is always saved after the last step."""

    every: int = 1000
    """Steps between checkpoints. 0: none by steps."""
    minutes: float = 0.0
    """Minutes between checkpoints, beside those by steps. 0: none by time."""
    keep: int = 3
    """The newest n are kept, and the best of those that were validated."""
    keep_every: int = 0
    """Steps between checkpoints that are saved and kept for ever. 0: none."""


@dataclass(frozen=True)
class Randomness:
    """Seeds of their own for what `seed` decides together: changed one at a time, they tell which
    of them a difference between runs comes from. None: as `seed`."""

    init: int | None = None
    """Of the initial weights."""
    data: int | None = None
    """Of the order of documents."""
    masks: int | None = None
    """Of what an objective draws for each example (masks, spans, crops) and of dropout."""


@dataclass(frozen=True)
class Experiment:
    """A run. Two runs with equal experiments and software are equal bit for bit."""

    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    objective: Objective = field(default_factory=CausalLM)
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: Compute = field(default_factory=Compute)
    seed: int = 0
    randomness: Randomness = field(default_factory=Randomness)
    tune: Tune = field(default_factory=Full)
    """What is trained: Full, all of it; LoRA, adapters beside the weights of `start`; Frozen, the
    parameters of the objective alone."""
    start: str | None = None
    """RUN, RUN@STEP, RUN@best or RUN@mean:N: the parameters of another run, with which this one
    begins: an adaptation from one objective to another (Wang et al. 2022, section 5). Or weights of
    others: smollm2, a .gguf file or the directory of a model. On the command line it also says what
    model and tokenizer are, see train/start.py. None: fresh ones."""

    def seed_of(self, what: Literal['init', 'data', 'masks']) -> int:
        """The seed of initial weights, of the order of documents, or of masks."""
        own: int | None = getattr(self.randomness, what)
        return self.seed if own is None else own


_LEAST = {
    **{f'train.{entry.name}': 1 for entry in dataclasses.fields(TrainConfig)},
    **dict.fromkeys(('train.steps', 'train.tokens', 'train.epochs'), 0),
    'checkpoint.every': 0,
    'checkpoint.minutes': 0,
    'checkpoint.keep': 1,
    'checkpoint.keep_every': 0,
    'evaluation.every': 0,
    'evaluation.batches': 0,
    'evaluation.patience': 0,
    'evaluation.examples': 0,
    'evaluation.sample_tokens': 1,
    'compute.unroll': 0,
    'data.workers': 0,
    'data.prefetch': 0,
    'seed': 0,
    'randomness.init': 0,
    'randomness.data': 0,
    'randomness.masks': 0,
}


def check(experiment: Experiment, device_mesh: Any) -> None:
    """Raise UserError for settings that do not fit each other or the mesh. Costs nothing."""
    model, train = experiment.model, experiment.train
    if not model.vocab:  # a multiple of this: what holds for one holds for all
        _check_multiple(device_mesh)
        model = replace(model, vocab=VOCAB_MULTIPLE)
    for name, least in _LEAST.items():
        value = operator.attrgetter(name)(experiment)
        if value is not None and value < least:
            option = name.replace('_', '-')
            raise UserError(f'--{option} is {value}: it must be {least} or more')
    check_length(train)
    if experiment.evaluation.patience and not experiment.evaluation.every:
        raise UserError(
            f'--evaluation.patience {experiment.evaluation.patience} has no effect without '
            'validations: set --evaluation.every, or leave it out'
        )
    # Of two streams each has a row of its own, and positions from 0.
    streams = experiment.objective.lengths(train.seq_len) if train.seq_len > model.context else {}
    if max(streams.values(), default=0) > model.context:
        raise UserError(
            f'train.seq_len {train.seq_len} is longer than the model context {model.context}: '
            'lower --train.seq-len or raise --model.context'
        )
    if train.batch % train.accumulate:
        raise UserError(
            f'a batch of {train.batch} rows does not divide into {train.accumulate} microbatches: '
            'change --train.batch or --train.accumulate'
        )
    if train.accumulate > 1 and not experiment.objective.accumulates:
        raise UserError(
            f'the loss of {type(experiment.objective).__name__} is no sum over the rows of a '
            'batch, and microbatches would change it: set --train.accumulate 1; to save memory, '
            '--compute.remat full, or --objective.chunks of a contrastive objective'
        )
    width.check(model)
    experiment.objective.check(model)
    if experiment.objective.joins:
        raise UserError(
            f'{type(experiment.objective).__name__} reads the pass of another objective: make it a '
            'part of a sum, --objective weighted --objective.parts causal ...'
        )
    own = own_classes(to_dict(experiment)['objective'])
    if own and experiment.data.workers:
        raise UserError(
            f'--data.workers {experiment.data.workers}: worker processes do not have the file that '
            f'defines {min(own)}; set --data.workers 0'
        )
    if experiment.data.chat is not None and not experiment.objective.chats:
        raise UserError(
            f'--data.chat has no effect where {type(experiment.objective).__name__} writes no '
            'chats: leave it out'
        )
    rows_read(experiment)
    if experiment.objective.rollout is not None:
        judge(experiment.objective.rollout)
    rows = train.batch // train.accumulate
    shards = mesh.batch_shards(device_mesh)
    if rows % shards:
        raise UserError(
            f'{rows} rows (batch {train.batch} / {train.accumulate} microbatches) do not divide '
            f'over the {shards} batch shards of the mesh: make --train.batch a multiple of '
            f'{shards * train.accumulate}, or use more --mesh.tensor'
        )
    layout.check(model.sizes(), device_mesh)
    objective = experiment.objective
    extra = jax.eval_shape(lambda: objective.extra(model, jax.random.key(0)))
    layout.check_params({'objective': extra}, device_mesh)
    _check_carried(experiment, model, extra, device_mesh)
    if objective.needs_adapters and not isinstance(experiment.tune, LoRA):
        raise UserError(
            f'{type(objective).__name__} compares the model with itself without adapters, and '
            'there are none: set tune to LoRA, or --objective.reference start'
        )
    tuning.check(experiment.tune, model, extra=extra, start=experiment.start)
    optimizer(experiment.optimizer)
    _check_effects(experiment)
    rate = experiment.optimizer.schedule
    schedule(rate, steps_of(train) or rate.warmup_steps + 1)
    if steps_of(train):
        experiment.objective.check_steps(steps_of(train))


def _check_carried(
    experiment: Experiment, model: ModelConfig, extra: Params, device_mesh: Any
) -> None:
    """Raise UserError where what the objective carries beside the parameters cannot be."""
    objective = experiment.objective
    params = {**layers.abstract(model), **({EXTRA: extra} if extra else {})}
    try:
        carried = jax.eval_shape(lambda p: objective.carried(model, p, jax.random.key(0)), params)
        layout.check_params({'carried': carried}, device_mesh)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{type(objective).__name__}.carried gives no dict of arrays whose names end in the '
            f'letters of their dimensions: {error}'
        ) from error
    if carried and not isinstance(experiment.tune, Full):
        raise UserError(
            f'{type(objective).__name__} carries a copy of what is trained, and that has to be the '
            'whole model: set --tune Full'
        )


def _check_effects(experiment: Experiment) -> None:
    """Raise UserError for settings of the optimizer that change nothing in this run."""
    config, tune = experiment.optimizer, experiment.tune
    if config.layer_decay != 1 and isinstance(tune, Frozen):
        raise UserError(
            f'--optimizer.layer-decay {config.layer_decay} has no effect where no layer is '
            'trained: leave it out, or set --tune'
        )
    if isinstance(config, Muon) and not isinstance(tune, Full):
        raise UserError(
            f'Muon moves whole matrices of layers, and with --tune {type(tune).__name__} none is '
            'trained: give --optimizer adamw'
        )
    asked = config.weight_decay not in (0, type(config).weight_decay)
    if asked and isinstance(tune, Frozen) and not config.decay_embeddings:
        raise UserError(
            f'--optimizer.weight-decay {config.weight_decay} has no effect on a head, which alone '
            'is trained: leave it out, or set --optimizer.decay-embeddings True as well'
        )
    if config.decay_embeddings and (not config.weight_decay or isinstance(tune, LoRA)):
        why = 'embeddings are not trained' if config.weight_decay else 'there is no weight decay'
        raise UserError(f'--optimizer.decay-embeddings has no effect where {why}: leave it out')


def rows_read(experiment: Experiment) -> int:
    """Rows of the data that a step reads: those of the batch; where the model writes completions,
    one of prompts for each group of them. Raises UserError where that cannot be."""
    rollout, batch = experiment.objective.rollout, experiment.train.batch
    if rollout is None:
        return batch
    if batch % rollout.completions:
        raise UserError(
            f'a batch of {batch} rows does not divide into groups of {rollout.completions} '
            'completions: change --train.batch or --objective.rollout.completions'
        )
    if jax.process_count() > 1:
        raise UserError(
            f'{jax.process_count()} processes: rollouts are drawn by one process, on as many '
            'devices as it has; start one'
        )
    if isinstance(experiment.tune, LoRA) and experiment.tune.dropout:
        raise UserError(
            'completions are drawn without dropout, and a policy with it is another one: set '
            '--tune.dropout 0'
        )
    return batch // rollout.completions


def check_length(train: TrainConfig) -> None:
    """Raise UserError unless one of steps, tokens and epochs is given."""
    lengths = {name: getattr(train, name) for name in ('steps', 'tokens', 'epochs')}
    given = [f'--train.{name} {value}' for name, value in lengths.items() if value]
    if not given:
        raise UserError('a run without an end: set --train.steps, --train.tokens or --train.epochs')
    if len(given) > 1:
        raise UserError(
            f'{" and ".join(given)} are both set, and a run has one length: set all but one to 0'
        )
    if not math.isfinite(train.epochs):
        raise UserError(f'--train.epochs is {train.epochs}: it must be a number')


def steps_of(train: TrainConfig) -> int:
    """Steps of a run; 0 where only the text tells, for epochs."""
    return train.steps or -(-train.tokens // (train.batch * train.seq_len))


def _check_multiple(device_mesh: Any) -> None:
    try:
        layout.check({'V': VOCAB_MULTIPLE}, device_mesh)
    except UserError as error:
        raise UserError(
            f'model.vocab is left to the tokenizer, which makes it a multiple of {VOCAB_MULTIPLE}: '
            f'{error}; or give --model.vocab'
        ) from None


def with_tokenizer(experiment: Experiment) -> tuple[Experiment, Tokenizer]:
    """The `resolved` experiment, and the tokenizer that it trains with. Raises UserError where they
    do not fit each other."""
    tokenizer = for_model(
        load_tokenizer(experiment.data, experiment.objective.reads),
        ids=experiment.model.ids,
        marks=experiment.objective.marks,
    )
    return resolved(experiment, tokenizer.vocab_size), tokenizer


def resolved(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with a model for a tokenizer of so many ids: as many rows as `model.vocab`
    says, or as the tokenizer needs where that is 0, of which the rest is padding.

    Raises UserError where the model has fewer rows.
    """
    model = experiment.model
    check_rows(vocab_size, rows=model.vocab)
    rows = model.vocab or -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if model.vocab_padding not in (0, rows - vocab_size):
        raise UserError(
            f'model.vocab_padding is {model.vocab_padding}, but the tokenizer has {vocab_size} of '
            f'the {rows} ids: leave it out'
        )
    model = replace(model, vocab=rows, vocab_padding=rows - vocab_size)
    return replace(experiment, model=model)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values; the objective's class is recorded by name."""
    return to_plain(experiment)


def from_dict(plain: dict[str, Any]) -> Experiment:
    """The experiment that was recorded as plain values. Raises UserError for another record."""
    try:
        return from_plain(Experiment, plain)
    except (TypeError, AttributeError) as error:  # settings are missing, or of other types
        raise UserError(
            f'the record of the experiment is not whole ({error}): mend run.json or give another '
            '--workdir'
        ) from error


def digest(experiment: Experiment) -> str:
    """Hash of all settings, 16 hexadecimal digits."""
    text = json.dumps(to_dict(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
