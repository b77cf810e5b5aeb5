"""Fine-tuned classification: the whole backbone and a linear head, by AdamW, until validation says
that it is enough."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from llama_jax import precision
from llama_jax.evaluate.represent import (
    features,
    host,
    padded,
    padded_rows,
    place,
    pooled,
    round_up,
)
from llama_jax.mesh import batch_shards
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.train.base import merged

DECAY = 0.01
HEAD = 10.0
"""Scale of the head's logits: under AdamW its weights, which begin at 0 and have few steps, then
move this many times as far as the backbone's."""


@dataclass(frozen=True)
class Budget:
    """The same for every arm."""

    steps: int
    """At most. A run ends when the validation loss has not fallen `patience` times in a row."""
    batch: int
    rates: tuple[float, ...]
    """Learning rates: each is tried under the first seed, and the one of the least validation loss
    is taken for all seeds."""
    seeds: int
    """Of the order of the training texts."""
    every: int = 20
    """Steps between two looks at validation. The rate rises over the first of them, and stays."""
    patience: int = 2


class Texts(NamedTuple):
    """Texts as tokens, and what they are."""

    tokens: Sequence[np.ndarray]
    label_N: np.ndarray


class Tuned(NamedTuple):
    right_SN: np.ndarray
    """Whether each test text is classified rightly, under each seed."""
    rate: float
    """The one that was chosen."""
    validation: dict[float, float]
    """Least validation loss at each rate, in nats."""
    steps: list[int]
    """At which each seed's run was best on validation."""
    most: int
    """Steps of the budget."""

    def about(self) -> dict[str, Any]:
        """For the record; 'edge': whether the rate is the first or last of several, so that one
        beyond could be better; 'cut': in how many runs the last step was the best."""
        rates = sorted(self.validation)
        return {
            'rate': self.rate,
            'edge': len(rates) > 1 and self.rate in (rates[0], rates[-1]),
            'validation_loss': {f'{rate:g}': loss for rate, loss in self.validation.items()},
            'steps': self.steps,
            'cut': sum(step == self.most for step in self.steps),
            'accuracy_of_seeds': self.right_SN.mean(axis=1).tolist(),
        }


class _Programs(NamedTuple):
    optimizer: optax.GradientTransformation
    step: Any
    log_probabilities: Any


def finetune(
    config: ModelConfig,
    params: Params,
    train: Texts,
    validation: Texts,
    test: Texts,
    *,
    n_classes: int,
    budget: Budget,
    causal: bool,
    compute: Compute,
    seed: int,
    mesh: Mesh,
) -> Tuned:
    """Fine-tune copies of `params`: rate and steps chosen on validation, figures on test.

    `seed` decides the order of the training texts; the head begins at 0.
    """
    run = _Run(config, params, train, validation, test, n_classes, budget, causal, compute, mesh)
    first = {rate: run(rate, seed) for rate in budget.rates}
    rate = min(first, key=lambda rate: first[rate].loss)
    runs = [first[rate], *(run(rate, seed + i) for i in range(1, budget.seeds))]
    return Tuned(
        np.array([one.right_N for one in runs]),
        rate,
        {rate: one.loss for rate, one in first.items()},
        [one.step for one in runs],
        budget.steps,
    )


class _Best(NamedTuple):
    """A run where it was best on validation."""

    loss: float
    step: int
    right_N: np.ndarray


class _Run:
    """One fine-tuning after another of the same parameters."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        train: Texts,
        validation: Texts,
        test: Texts,
        n_classes: int,
        budget: Budget,
        causal: bool,
        compute: Compute,
        mesh: Mesh,
    ):
        self._programs = _programs(config, causal=causal, compute=compute)
        self._train, self._validation, self._test = train, validation, test
        self._params = merged(params, mesh)  # adapters of a run are part of what is tuned
        self._head = np.zeros((config.dim, n_classes), np.float32)
        self._budget, self._mesh = budget, mesh
        self._rows = round_up(budget.batch, batch_shards(mesh))
        texts = [text for part in (train, validation, test) for text in part.tokens]
        self._length = padded(max(map(len, texts)), config.context)

    def __call__(self, rate: float, seed: int) -> _Best:
        budget, programs, train = self._budget, self._programs, self._train
        rng = np.random.default_rng(seed)
        best: _Best | None = None
        kept: Params = {}
        with jax.set_mesh(self._mesh):
            head_DC = jax.device_put(self._head, PartitionSpec())
            tuned = {'backbone': self._params, 'head': head_DC}
            state = programs.optimizer.init(tuned)
            order: list[int] = []
            for step in range(1, budget.steps + 1):
                while len(order) < budget.batch:
                    order.extend(rng.permutation(len(train.tokens)).tolist())
                index, order = order[: budget.batch], order[budget.batch :]
                part = Texts([train.tokens[i] for i in index], train.label_N[index])
                now = np.float32(rate * min(1.0, step / budget.every))
                tuned, state = programs.step(tuned, state, now, *self._placed(part))
                if step % budget.every and step < budget.steps:
                    continue
                loss = -float(self._log_p(tuned, self._validation).mean())
                loss = loss if math.isfinite(loss) else math.inf  # the rate was too high
                if best is None or loss < best.loss:
                    best, kept = _Best(loss, step, np.zeros(0)), tuned
                elif step - best.step >= budget.patience * budget.every:
                    break
            assert best is not None
            return best._replace(right_N=self._log_p(kept, self._test, right=True))

    def _log_p(self, tuned: Params, texts: Texts, *, right: bool = False) -> np.ndarray:
        """log p of each text's label [n]; `right`: whether it is the most likely one."""
        found = []
        for start in range(0, len(texts.tokens), self._rows):
            these = slice(start, start + self._rows)
            part = Texts(texts.tokens[these], texts.label_N[these])
            token_BT, segment_BT, label_B, _ = self._placed(part)
            log_BC = host(self._programs.log_probabilities(tuned, token_BT, segment_BT))
            log_BC = log_BC[: len(part.tokens)]
            of_label_B = log_BC[np.arange(len(log_BC)), part.label_N]
            found.append(log_BC.argmax(axis=1) == part.label_N if right else of_label_B)
        return np.concatenate(found)

    def _placed(self, texts: Texts) -> list[jax.Array]:
        batch = _batch(texts.tokens, texts.label_N, self._rows, self._length)
        return [place(x, self._mesh) for x in batch]


@functools.lru_cache(maxsize=8)
def _programs(config: ModelConfig, *, causal: bool, compute: Compute) -> _Programs:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

    def log_probabilities(
        tuned: Params, token_BT: Int[Array, 'B T'], segment_BT: Int[Array, 'B T']
    ) -> Float[Array, 'B C']:
        x_BTD = features(
            config, tuned['backbone'], token_BT, segment_BT, causal=causal, compute=compute
        )
        logit_BC = HEAD * jnp.einsum('BD,DC->BC', pooled(x_BTD, segment_BT), tuned['head'])
        return jax.nn.log_softmax(logit_BC)

    def loss(tuned: Params, token_BT: Any, segment_BT: Any, label_B: Any, weight_B: Any) -> Any:
        log_BC = log_probabilities(tuned, token_BT, segment_BT)
        chosen_BC = label_B[:, None] == jnp.arange(log_BC.shape[1])
        nll_B = -jnp.sum(jnp.where(chosen_BC, log_BC, 0), axis=1)
        return jnp.sum(nll_B * weight_B) / jnp.sum(weight_B)

    def step(
        tuned: Params, state: Any, rate: Float[Array, ''], *batch: jax.Array
    ) -> tuple[Params, Any]:
        with precision.matmuls(compute.precision):
            grads = jax.grad(loss)(tuned, *batch)
        updates, state = optimizer.update(grads, state, tuned)
        # AdamW (Loshchilov & Hutter 2019); the rate is an argument: one program for all rates.
        updated = jax.tree.map(
            lambda p, u: (p - rate * (u + DECAY * p)).astype(p.dtype), tuned, updates
        )
        return updated, state

    def replicated(tuned: Params, token_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
        return jax.reshard(log_probabilities(tuned, token_BT, segment_BT), PartitionSpec())

    return _Programs(optimizer, jax.jit(step), jax.jit(replicated))


def _batch(
    texts: Sequence[np.ndarray], labels: np.ndarray, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, segments [rows, T], labels, weights [rows]); rows beyond the texts weigh 0."""
    label_B, weight_B = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    label_B[: len(texts)], weight_B[: len(texts)] = labels, 1
    return *padded_rows(texts, rows=rows, length=length), label_B, weight_B
