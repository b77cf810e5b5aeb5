"""Rollouts: completions of a batch's prompts by the parameters as they are, and their rewards.

The prompts come from the loader like any text, in its order and with its cursor. What is drawn for
a prompt is keyed by the run's seed, the epoch, the record and the number of the completion, and
depends on nothing else in the batch. So a run that goes on from a checkpoint has the same prompts,
completions and rewards as one that was never interrupted.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import layout, precision
from llama_jax.data import packing
from llama_jax.data.record import Problem
from llama_jax.errors import UserError
from llama_jax.generate.generator import Generator
from llama_jax.model import layers
from llama_jax.model.layers import Params
from llama_jax.model.tune import Full, combined
from llama_jax.objectives.base import backbone
from llama_jax.objectives.grpo import REFERENCE, policy
from llama_jax.objectives.rollout import Drawn, OnPolicy, prompts_of
from llama_jax.text.chat import ChatFormat, end_ids
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.place import HostBatch, figures, place
from llama_jax.train.rewards import Judge, judge
from llama_jax.train.step import State

SEED = 0
"""Of the completions of validations."""
Origin = tuple[int, int, int]
"""Epoch, source and document."""
Records = Callable[[int, int], tuple[Problem, str]]
"""The record of a source and document, and what it is called in messages."""


class Rollouts:
    """Makes a batch to learn from out of a batch of prompts."""

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        chat: ChatFormat | None,
    ) -> None:
        """`chat` is how prompts are written, which says what ends an answer. Raises UserError for
        rewards that are not there."""
        objective: Any = experiment.objective
        self._objective: OnPolicy = objective
        self._rollout = objective.rollout
        self._experiment, self._tokenizer, self._mesh = experiment, tokenizer, mesh
        self._judge: Judge = judge(self._rollout)
        self._refers = REFERENCE in self._objective.blank(1)
        self._ends = end_ids(chat, tokenizer)
        self._generator: Generator | None = None

    def of_training(
        self, documents: Sequence[Any], *, begun: Callable[[], Params]
    ) -> Callable[[HostBatch, State], HostBatch]:
        """What a step of the run learns from, given its prompts, which are of these sources, and
        the state before it. `begun` are the parameters that the run began with: where they are all
        trained, and the objective asks for a reference, a copy of them is kept."""
        records, seed = records_of(documents), self._experiment.seed_of('masks')
        full = isinstance(self._experiment.tune, Full)
        reference = jax.tree.map(jnp.copy, begun()) if full and self._refers else None

        def rollout(prompts: HostBatch, state: State) -> HostBatch:
            params = combined(state.tune, state.params, state.frozen)  # of now, and no average
            batch = self(prompts, params, records=records, seed=seed)
            if self._refers:
                # Adapters lie upon what the run began with.
                asked = state.frozen if reference is None else reference
                batch[REFERENCE] = self._log_probs(asked, batch)
            return batch

        return rollout

    def __call__(
        self, prompts: HostBatch, params: Params, *, records: Records, seed: int
    ) -> HostBatch:
        """The batch of the completions that `params` write, with figures of them. `records` finds
        the records of the prompts, `seed` is of the draws. Raises RewardError."""
        jax.block_until_ready(params)  # the step before may still be at work
        begin = time.perf_counter()
        generator = self._with(params)
        synced = time.perf_counter()
        rows = [prompts_of(prompts, row) for row in range(len(prompts['segments']))]
        asked = [prompt for row in rows for prompt in row]
        drawn = self._draw(generator, asked, seed)
        written = time.perf_counter()
        reward_PG, rewards = self._rewards(asked, drawn, records)
        judged = time.perf_counter()
        examples, more = self._objective.completed(drawn, reward_PG)
        batch, groups, G = self._rows(prompts), iter(examples), self._rollout.completions
        for row, prompts_of_row in enumerate(rows):
            groups_of_row = [next(groups) for _ in prompts_of_row]
            for g in range(G):
                laid = [group[g] for group in groups_of_row]
                packing.lay(batch, row * G + g, laid, lengths=self._lengths)
        times = {
            'seconds_sync': synced - begin,
            'seconds_rollout': written - synced,
            'seconds_rewards': judged - written,
        }
        return {**batch, **rewards, **more, **times, 'cursor': prompts['cursor']}

    def measured(
        self, prompts: Iterable[HostBatch], params: Params, documents: Sequence[Any]
    ) -> dict[str, float]:
        """Sums over the prompts of all batches, which are of these sources: 'weight' is their
        number, 'loss' is less the reward. The draws are the same at every call."""
        records = records_of(documents)
        sums: dict[str, float] = {}
        for batch in prompts:
            made = figures(self(batch, params, records=records, seed=SEED))
            n = float(batch['segments'].max(axis=1).sum())
            told = {name: x for name, x in made.items() if not name.startswith('seconds_')}
            for name, x in {**told, 'loss': -told['reward']}.items():
                sums[name] = sums.get(name, 0.0) + n * x
            sums['weight'] = sums.get('weight', 0.0) + n
        return sums

    def _with(self, params: Params) -> Generator:
        """The generator with these parameters."""
        if self._generator is None:
            self._generator = Generator(
                self._experiment.model,
                params,
                mesh=self._mesh,
                compute=self._experiment.compute,
                eos_ids=self._ends,
                pad_id=self._tokenizer.pad_id,
            )
        else:
            self._generator.programs.renew(params)
        jax.block_until_ready(self._generator.programs.params)
        return self._generator

    @functools.cached_property
    def _log_probs(self) -> Callable[[Params, HostBatch], np.ndarray]:
        """Of the tokens of a batch under some parameters, 0 where no completion is: [B, T]."""
        config, compute = self._experiment.model, self._experiment.compute
        n = self._experiment.train.accumulate
        temperature = self._rollout.temperature

        @jax.jit
        def log_probs(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
            model = layers.bind(config, params)

            def of(part: dict[str, jax.Array]) -> jax.Array:
                log_p_BT, _ = policy(model, part, temperature=temperature, compute=compute)
                return jnp.where(part['shares'] > 0, log_p_BT, 0)

            with precision.matmuls(compute.precision):
                if n == 1:
                    return of(batch)
                parts = {name: layout.interleaved(x, n) for name, x in batch.items()}
                return layout.joined(jax.lax.map(of, parts))

        def on_host(params: Params, batch: HostBatch) -> np.ndarray:
            with jax.set_mesh(self._mesh):
                return np.asarray(log_probs(backbone(params), place(batch, self._mesh)))

        return on_host

    def empty(self, prompts: HostBatch) -> HostBatch:
        """A batch of padding, of the shapes of every batch, with the cursor of `prompts`."""
        return self._rows(prompts) | {'cursor': prompts['cursor']}

    def _rows(self, prompts: HostBatch) -> dict[str, np.ndarray]:
        """Rows of padding for the completions of a batch of prompts."""
        layout = packing.layout_of(self._objective.blank(1), pad_id=self._tokenizer.pad_id)
        rows = len(prompts['segments']) * self._rollout.completions
        return packing.empty_rows(layout, rows=rows, lengths=self._lengths)

    @property
    def _lengths(self) -> dict[str, int]:
        return self._experiment.objective.lengths(self._experiment.train.seq_len)

    def _draw(
        self, generator: Generator, asked: Sequence[tuple[np.ndarray, Origin]], seed: int
    ) -> list[list[Drawn]]:
        """Completions [P][G] of the prompts."""
        G, most = self._rollout.completions, self._rollout.max_tokens
        drawn: Any = generator.draw(
            [prompt.tolist() for prompt, _ in asked for _ in range(G)],
            max_tokens=most,
            temperature=self._rollout.temperature,
            seed=[seed_of(seed, *origin, g) for _, origin in asked for g in range(G)],
            logprobs=0,
        )
        groups = []
        for p, (prompt, _) in enumerate(asked):
            group = []
            for row in range(p * G, (p + 1) * G):
                tokens = drawn.token_BT[row, :most]
                ended = np.flatnonzero(np.isin(tokens, self._ends))
                n = int(ended[0]) + 1 if len(ended) else most
                log_probs = drawn.logprob_BT[row, :n]
                group.append(Drawn(prompt, tokens[:n], log_probs, not len(ended)))
            groups.append(group)
        return groups

    def _rewards(
        self,
        asked: Sequence[tuple[np.ndarray, Origin]],
        drawn: list[list[Drawn]],
        records: Records,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The sum of rewards of each completion [P, G], NaN where one failed; and figures."""
        given = []
        for (_, (_, source, document)), group in zip(asked, drawn, strict=True):
            problem, where = records(source, document)
            for one in group:
                # A last token that ends it is none of its text, whatever a tokenizer makes of it.
                text = one.tokens if one.truncated else one.tokens[:-1]
                given.append(self._judge(self._tokenizer.decode(text), problem, where))
        reward_PG = np.array([self._judge.total(one) for one in given]).reshape(len(asked), -1)
        failed = np.isnan(reward_PG)
        if failed.all():
            raise UserError(
                f'no completion of the batch could be judged '
                f'by {", ".join(self._rollout.rewards)}: '
                'set --objective.rollout.failed stop, which says why'
            )
        counted = reward_PG[~failed]
        told = {'reward': float(counted.mean()), 'reward_std': float(counted.std())}
        for name in self._rollout.rewards if len(self._rollout.rewards) > 1 else ():
            values = [one[name] for one in given if not math.isnan(one[name])]
            if values:
                told[f'reward/{name.rpartition(":")[2]}'] = sum(values) / len(values)
        if self._rollout.failed == 'skip':
            told['rewards_failed'] = float(failed.mean())
        return reward_PG, told


def records_of(documents: Sequence[Any]) -> Records:
    """Finds the records of these sources, `RecordDocuments`."""

    def record(source: int, document: int) -> tuple[Problem, str]:
        found = documents[source]
        return found.record(document, Problem), f'{found.origin(document)} of {found.name}'

    return record


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^32) that follows from these alone."""
    data = ' '.join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), 'little')
