"""A trained reward model as a function: prompts and answers in, a number for each out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import precision
from llama_jax.data.record import BadRecordError, Prompt
from llama_jax.errors import UserError
from llama_jax.generate.programs import bucket
from llama_jax.mesh import batch_shards
from llama_jax.model import layers
from llama_jax.model.layers import Params
from llama_jax.objectives.pairs import answered
from llama_jax.objectives.reward import RewardModel, rewards
from llama_jax.train import restore
from llama_jax.train.place import local_rows, place
from llama_jax.train.start import chat_of

_ARRAYS = 'inputs', 'segments', 'last'
ROWS = 8
"""Answers at a time, for each shard of the batch."""


class Scorer:
    """The reward model that a run has trained; see `restore.named` for what names it.

    Raises UserError where the run trained something else, or cannot be read.
    """

    def __init__(self, run: str, mesh: Mesh, *, what: str = '--reward') -> None:
        experiment = restore.experiment_of(restore.named(run, what).workdir)
        if not isinstance(experiment.objective, RewardModel):
            raise UserError(
                f'{what} {run} trained {type(experiment.objective).__name__}, which gives no '
                'rewards: name a run of a RewardModel'
            )
        trained = restore.load(run, mesh, what=what)
        self._run, self._mesh, self._trained = run, mesh, trained
        self._chat = chat_of(str(restore.named(run, what).workdir))
        self._rows = ROWS * batch_shards(mesh)
        config, compute = trained.config, experiment.compute

        def score(params: Params, extra: Params, batch: dict[str, Any]) -> jax.Array:
            with precision.matmuls(compute.precision):
                x_BTD, _ = layers.bind(config, params).features(
                    batch['inputs'], segment_BT=batch['segments'], compute=compute
                )
            reward_BT = rewards(x_BTD, extra)
            return jnp.sum(jnp.where(batch['last'] > 0, reward_BT, 0), axis=-1)

        # Whole on every host.
        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, pairs: Sequence[tuple[Prompt, Prompt]]) -> np.ndarray:
        """Rewards float32 [n] of answers, each given after its prompt.

        Raises UserError for one that cannot be written, is longer than the model's context, or has
        a reward that is not finite.
        """
        ids = [self._ids(i, *pair) for i, pair in enumerate(pairs)]
        scores = np.zeros(len(ids), np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            scores[chosen] = self._scored([ids[i] for i in chosen])
        if not np.isfinite(scores).all():
            i = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise UserError(f'{self._run} gives answer {i} the reward {scores[i]}: it is not sound')
        return scores

    def _ids(self, i: int, prompt: Prompt, answer: Prompt) -> np.ndarray:
        try:
            ids, _ = answered(prompt, answer, self._trained.tokenizer, self._chat)
        except (BadRecordError, UserError) as error:
            raise UserError(f'answer {i} cannot be scored: {error}') from None
        context = self._trained.config.context
        if len(ids) > context:
            raise UserError(
                f'answer {i} has {len(ids)} tokens with its prompt, and the context of {self._run} '
                f'is {context}: shorten it'
            )
        return ids

    def _scored(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        T = min(bucket(max(map(len, ids))), self._trained.config.context)
        batch = {name: np.zeros((self._rows, T), np.int32) for name in _ARRAYS}
        for row, own in enumerate(ids):
            batch['inputs'][row, : len(own)] = own
            batch['segments'][row, : len(own)] = 1
            batch['last'][row, len(own) - 1] = 1
        mine = local_rows(self._mesh, self._rows)
        with jax.set_mesh(self._mesh):
            placed = place({name: x[mine] for name, x in batch.items()}, self._mesh)
            scores = self._score(self._trained.params, self._trained.extra, placed)
        return np.asarray(scores)[: len(ids)]
