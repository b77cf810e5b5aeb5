"""The training step: loss sums, gradients, update. Pure; compiled once per run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llama_jax import layout, precision
from llama_jax.keys import named_key
from llama_jax.model import layers
from llama_jax.model import tune as tuning
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.tune import FULL, Tune
from llama_jax.objectives.base import ALONE, EXTRA, Batch, Context, Loss, Objective, backbone
from llama_jax.objectives.contract import checked
from llama_jax.optim.average import averaged
from llama_jax.optim.spikes import SpikeState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that a run carries from step to step, besides its place in the data."""

    params: Params
    optimizer: Any
    step: jax.Array
    """Steps taken, int32 []."""
    key: jax.Array
    """Root of all randomness on devices, a typed key []; each step folds its number into it."""
    skipped: jax.Array
    """Steps whose loss or gradient was not finite, int32 []."""
    skipped_in_a_row: jax.Array
    average: Params = field(default_factory=dict)
    """Of `params` over the run, see `averaging`; {} where none is kept."""
    frozen: Params = field(default_factory=dict)
    """What is not trained, where `Experiment.tune` says so: placed as parameters are, in no
    checkpoint, and read again from `start`."""
    carried: Params = field(default_factory=dict)
    """What the objective carries from step to step, see there; {} where it carries nothing."""
    tune: Tune = field(default=FULL, metadata={'static': True})

    @property
    def evaluated(self) -> Params:
        """What validations and samples read, and whoever loads the run: all parameters as one tree,
        of those that are trained the average, where one is kept."""
        return tuning.combined(self.tune, self.average or self.params, self.frozen)


Metrics = dict[str, jax.Array]


def loss_of(
    config: ModelConfig,
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    compute: Compute,
    key: jax.Array | None,
    context: Context = ALONE,
) -> Loss:
    """The objective's loss sums under `params`, its own parameters among them, and all that is
    frozen as well; see `tune.combined`."""
    model, extra = layers.bind(config, backbone(params)), params.get(EXTRA, {})
    loss = objective.loss(model, batch, extra=extra, compute=compute, key=key, context=context)
    return checked(loss, objective)


def initial_state(
    config: ModelConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh,
    tune: Tune = FULL,
    masks: int | None = None,
) -> State:
    """The state before the first step, made in its final placement. What is frozen is missing.

    `masks` is the seed of what steps draw, where that is not `seed`."""
    placed = layout.shardings(abstract_state(config, objective, optimizer, tune), mesh)

    # No mesh in scope: under one, random numbers are of replicated type, so drawn whole everywhere.
    def fresh() -> State:
        return _fresh(config, objective, optimizer, seed, tune, masks)

    return jax.jit(fresh, out_shardings=placed)()


def abstract_state(
    config: ModelConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    tune: Tune = FULL,
) -> State:
    """Shapes and types of the state, at no cost. What is frozen is missing."""
    return jax.eval_shape(lambda: _fresh(config, objective, optimizer, 0, tune))


def _fresh(
    config: ModelConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int,
    tune: Tune,
    masks: int | None = None,
) -> State:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    if masks is not None:
        _, run_key = jax.random.split(jax.random.key(masks))
    params = initial_params(config, objective, init_key, tune)
    zero = jnp.zeros((), jnp.int32)
    carried = _carried(config, objective, params, run_key)
    state = State(params, optimizer.init(params), zero, run_key, zero, zero, tune=tune)
    return replace(state, carried=carried)


def _carried(config: ModelConfig, objective: Objective, params: Params, key: jax.Array) -> Params:
    # Copies: a step reuses the memory of both.
    carried = objective.carried(config, params, named_key(key, 'carried'))
    return jax.tree.map(jnp.copy, carried)


def carrying(config: ModelConfig, objective: Objective, state: State) -> State:
    """`state` with what the objective carries, as it begins with the parameters of now."""
    if not state.carried:
        return state
    placed = jax.tree.map(lambda x: x.sharding, state.carried)
    begin = jax.jit(functools.partial(_carried, config, objective), out_shardings=placed)
    return replace(state, carried=begin(state.params, state.key))


def initial_params(
    config: ModelConfig, objective: Objective, key: jax.Array, tune: Tune = FULL
) -> Params:
    """What is trained: of the backbone, and under EXTRA those of the objective where it has any."""
    whole = layers.split(layers.Transformer(config, key=key))
    params = tuning.trained(tune, whole, config, named_key(key, 'adapters'))
    # A key of its own: the backbone begins with the same values under every objective.
    extra = objective.extra(config, named_key(key, 'objective'))
    return {**params, EXTRA: extra} if extra else params


def averaging(state: State) -> State:
    """`state` with an average of its parameters, which begins as they are now."""
    return replace(state, average=jax.tree.map(jnp.copy, state.params))


def train_step(
    config: ModelConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: optax.Schedule,
    accumulate: int,
    compute: Compute,
    average: float = 0.0,
) -> jax.stages.Wrapped:
    """A compiled step (state, batch) -> (state, metrics) which reuses the memory of `state`; what
    is frozen in it stays where it is.

    It subtracts `learning_rate(steps taken)` times what the optimizer makes of the gradient, and
    moves the average of the parameters, where `state` has one, with the decay `average`.

    The loss is the sum over the global batch divided by its global weight, whatever the number of
    devices and microbatches. An update whose loss or gradient is not finite changes no parameter.

    Where the objective makes several updates by one batch, all are of one step and one learning
    rate; metrics are means over them, and `grad_norm` is the largest.
    """

    moves = optax.with_extra_args_support(optimizer)

    def accumulated(state: State, batch: Batch, key: jax.Array) -> tuple[Loss, Params]:
        params = state.params

        def loss_sum(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Loss]:
            # A key of its own: the draws of model and objective are those of a full run.
            own = named_key(key, 'adapters')
            whole = tuning.combined(state.tune, params, state.frozen, own)
            context = Context(state.step, state.carried)
            loss = loss_of(
                config, objective, whole, batch, compute=compute, key=key, context=context
            )
            return loss.total, loss

        gradient = jax.value_and_grad(loss_sum, has_aux=True)
        if accumulate == 1:
            (_, loss), grads = gradient(params, batch, key)
            return loss, grads

        def add(sums, microbatch_and_key):
            (_, more), grads = gradient(params, *microbatch_and_key)
            return (sums[0].plus(more), jax.tree.map(jnp.add, sums[1], grads)), more.kept

        microbatches = {name: layout.interleaved(x, accumulate) for name, x in batch.items()}
        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], (microbatches, keys))
        (_, loss), grads = gradient(params, *first)
        rest = jax.tree.map(lambda x: x[1:], (microbatches, keys))
        (sums, grads), kept = jax.lax.scan(add, (loss._replace(kept={}), grads), rest)
        if objective.updates > 1 or state.carried:
            whole = jax.tree.map(
                lambda x, xs: layout.joined(jnp.concatenate([x[None], xs])), loss.kept, kept
            )
            sums = sums._replace(kept=whole)
        return sums, grads

    def update(state: State, batch: Batch, key: jax.Array) -> tuple[State, Loss, jax.Array]:
        """The state after one update, its loss sums, and the norm of the gradient."""
        with precision.matmuls(compute.precision):
            loss, grads = accumulated(state, batch, key)
        weight = jnp.maximum(loss.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)

        rate = learning_rate(state.step)
        directions, optimizer_state = moves.update(
            grads, state.optimizer, state.params, value=loss.total / weight
        )
        params = jax.tree.map(lambda p, d: p - rate * d, state.params, directions)
        mean = state.average and averaged(state.average, params, decay=average, taken=state.step)
        mean = _where(finite & ~_is_spike(optimizer_state, state.optimizer), mean, state.average)
        params, optimizer_state = _where(
            finite, (params, optimizer_state), (state.params, state.optimizer)
        )
        skipped = 1 - finite.astype(jnp.int32)
        new_state = replace(
            state,
            params=params,
            optimizer=optimizer_state,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
            average=mean,
        )
        return new_state, loss, grad_norm

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        rate = learning_rate(state.step)
        new_state, loss, grad_norm = update(state, batch, key)
        kept = loss.kept
        if objective.updates > 1:
            batch = {**batch, **loss.kept}

            def again(carry, key):
                moved, sums, most = carry
                whole = replace(moved, frozen=state.frozen)
                whole, loss, grad_norm = update(whole, batch, key)
                moved = replace(whole, frozen={})
                return (moved, sums.plus(loss), jnp.maximum(most, grad_norm)), None

            first = replace(new_state, frozen={}), loss._replace(kept={}), grad_norm
            keys = jax.random.split(key, objective.updates - 1)
            (new_state, loss, grad_norm), _ = jax.lax.scan(again, first, keys)
            new_state = replace(new_state, frozen=state.frozen)
        metrics = {
            **loss.means(),
            **loss.largest,
            'weight': loss.weight / objective.updates,
            'grad_norm': grad_norm,
            'learning_rate': rate,
            'skipped': new_state.skipped,
            'skipped_in_a_row': new_state.skipped_in_a_row,
        }
        if isinstance(new_state.optimizer, SpikeState):
            metrics['spikes'] = new_state.optimizer.spikes
        if state.carried:
            is_taken = new_state.skipped == state.skipped
            is_taken &= ~_is_spike(new_state.optimizer, state.optimizer)
            carried = objective.carry(state.carried, new_state.params, kept, state.step)
            carried = layout.at_rest(carried)
            carried = _where(is_taken, carried, state.carried)
            new_state = replace(new_state, carried=carried)
        return replace(new_state, step=state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _is_spike(new: Any, old: Any) -> jax.Array:
    """Whether an update from the optimizer's state `old` to `new` was skipped as a spike."""
    return new.spikes > old.spikes if isinstance(new, SpikeState) else jnp.array(False)


def _where(taken: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` if `taken`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)
