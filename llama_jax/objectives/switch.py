"""A schedule of objectives: one after another within a run, such as causal and then masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss, Objective, of_stream
from llama_jax.objectives.weighted import check_parts, own_draw


@dataclass(frozen=True)
class Switch(Base):
    """Part k from step begins[k] on, until the next one begins.

    Every part makes an example of each piece of a document, so that a batch is the same text for
    all of them and its place in the data means the same; each has a row of its own, as long as in a
    run by it alone, of which a step computes one. Arrays of the last part have their own names,
    those of part k before it are in the streams 'k' and 'k/STREAM': the run is validated, asked and
    read as a model of its last part. Metrics are those that all parts have. A curriculum of a part
    counts from where the part begins.
    """

    parts: tuple[Objective, ...]
    begins: tuple[int, ...] = ()
    """Step at which each part begins: 0, and later ones."""

    def __post_init__(self) -> None:
        check_parts(self.parts, 'a schedule')
        if len(self.parts) < 2:
            raise UserError('a schedule of one objective: give two or more, or that one alone')
        steps = self.begins or range(len(self.parts))
        if len(steps) != len(self.parts) or steps[0] or not all(np.diff(steps) > 0):
            raise UserError(
                f'--objective.begins {" ".join(map(str, self.begins))}: give the step at which '
                f'each of {len(self.parts)} parts begins, 0 first, each later than the one before'
            )

    @property
    def _begins(self) -> tuple[int, ...]:
        return self.begins or (0,) * len(self.parts)

    @property
    def last(self) -> Objective:
        return self.parts[-1]

    @property
    def causal(self) -> bool:
        return self.last.causal

    @property
    def reading(self) -> Reading:
        return self.last.reading

    @property
    def has_likelihood(self) -> bool:
        return self.last.has_likelihood

    @property
    def marks(self) -> bool:
        return any(part.marks for part in self.parts)

    @property
    def accumulates(self) -> bool:
        return all(part.accumulates for part in self.parts)

    @property
    def ends(self) -> bool:
        return any(part.ends for part in self.parts)

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Those of each part, of which a step computes one."""
        return {
            self._name(k, stream): length
            for k, part in enumerate(self.parts)
            for stream, length in part.lengths(seq_len).items()
        }

    def segments(self, seq_len: int) -> int:
        limits = [part.segments(seq_len) for part in self.parts]
        return min(filter(None, limits), default=0)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        sizes: Sizes = ()
        for k, part in enumerate(self.parts):
            own = part.sizes(n, seq_len=seq_len, draw=own_draw(draw, k))
            if own is None:
                return None
            sizes += own
        return sizes

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        arrays: Example = {}
        sizes = piece.sizes
        for k, part in enumerate(self.parts):
            n = len(part.lengths(seq_len))
            own = piece._replace(draw=own_draw(piece.draw, k), sizes=sizes[:n])
            sizes = sizes[n:]
            example = part.example(own, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
            if example is None:
                return None
            arrays |= {self._name(k, key): x for key, x in example.items()}
        return arrays

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        """Of all parts, from the first step on."""
        keys = jax.random.split(key, len(self.parts))
        own = [part.extra(model, own_key) for part, own_key in zip(self.parts, keys, strict=True)]
        return {str(k): params for k, params in enumerate(own) if params}

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        for part in self.parts:
            if part.carried(model, params, key):
                raise UserError(
                    f'{type(part).__name__} carries arrays from step to step, and is no part of a '
                    'schedule: train it in a run of its own, with --start'
                )
        return {}

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
        context: Context = ALONE,
    ) -> Loss:
        def of(k: int) -> Loss:
            step = None if context.step is None else context.step - self._begins[k]
            return self.parts[k].loss(
                model,
                self._batch(k, batch),
                extra=extra.get(str(k), {}),
                compute=compute,
                key=key,
                context=context._replace(step=step),
            )

        last = len(self.parts) - 1
        if context.step is None:
            return of(last)
        forms = [jax.eval_shape(lambda k=k: of(k)) for k in range(last + 1)]
        common = [name for name in forms[last].metrics if all(name in f.metrics for f in forms)]

        def branch(k: int) -> Callable[[], Loss]:
            def run() -> Loss:
                loss = of(k)
                metrics = {name: loss.metrics[name] for name in common}
                weights = {name: loss.weights.get(name, loss.weight) for name in common}
                return Loss(loss.total, loss.weight, metrics, weights=weights)

            return run

        begun = context.step >= jnp.array(self._begins)
        return jax.lax.switch(jnp.sum(begun) - 1, [branch(k) for k in range(last + 1)])

    def loss_tokens(self, batch: Batch) -> int:
        """Of the last part."""
        return self.last.loss_tokens(self._batch(len(self.parts) - 1, batch))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """The mean over the parts, whatever the steps of each."""
        return self.flops_of_run(model, seq_len, 0)

    def flops_of_run(self, model: ModelConfig, seq_len: int, steps: int) -> float:
        """Each part by its steps."""
        share_K = np.diff([*self._begins, steps]) if steps else np.ones(len(self.parts))
        own = [
            part.flops_of_run(model, seq_len, int(share_K[k]) if steps else 0)
            for k, part in enumerate(self.parts)
        ]
        return float(np.average(own, weights=share_K))

    def stretched(self, ratio: float) -> Switch:
        begins = [round(begin * ratio) for begin in self.begins]
        for k in range(1, len(begins)):
            begins[k] = max(begins[k], begins[k - 1] + 1)
        parts = tuple(part.stretched(ratio) for part in self.parts)
        return replace(self, parts=parts, begins=tuple(begins))

    def check(self, model: ModelConfig) -> None:
        if not self.begins:
            raise UserError(
                'a schedule does not say when its parts begin: set --objective.begins 0 and a step '
                'for each further one'
            )
        for part in self.parts:
            part.check(model)

    def check_steps(self, steps: int) -> None:
        if max(self.begins) >= steps:
            raise UserError(
                f'{type(self.last).__name__} begins at step {max(self.begins)}, and the run has '
                f'{steps}: lower --objective.begins or raise --train.steps'
            )
        ends = (*self.begins[1:], steps)
        for part, begin, end in zip(self.parts, self.begins, ends, strict=True):
            part.check_steps(end - begin)  # the first of its own is step 0

    def _batch(self, k: int, batch: Batch) -> Batch:
        """The arrays of part k by its own names."""
        if k < len(self.parts) - 1:
            return of_stream(str(k), batch)
        return {key: x for key, x in batch.items() if not key.partition('/')[0].isdigit()}

    def _name(self, k: int, name: str) -> str:
        """An array or stream of part k in the batch of all."""
        if k == len(self.parts) - 1:
            return name
        return f'{k}/{name}' if name else str(k)
