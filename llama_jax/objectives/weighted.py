"""A weighted sum of objectives on the same text, such as causal LM and a contrastive loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import FEWEST, Example, Piece, Sizes, longest
from llama_jax.data.record import Text
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import Reading
from llama_jax.objectives.base import (
    ALONE,
    EXTRA,
    Base,
    Batch,
    Context,
    Loss,
    Objective,
    backbone,
    of_stream,
)
from llama_jax.objectives.prediction import TokenPrediction, in_lanes

BITS = 53
"""Of a number in [0, 1)."""


@dataclass(frozen=True)
class Weighted(Base):
    """Sum over parts k of weight_k times the loss of part k, each a mean over its own weight.

    Every part makes one example of each piece of a document: the row of a batch holds the same text
    for all parts, one segment a piece. The end of a document is a unit where it is one for any
    part; the others see the text alone, and a piece without text for one of them is left out. The
    arrays and metrics of the first part keep their names, so that its likelihood is read as if it
    were alone; those of part k are in the streams 'k' and 'k/STREAM'. The first part also says how
    the backbone is read for representations.
    """

    parts: tuple[Objective, ...]
    weights: tuple[float, ...] = ()
    """One per part; none given: 1 each."""
    shares: tuple[float, ...] = ()
    """Shares of the positions of a row, 1 in all: positions that the backbone processes; 0 of a
    part that reads the pass of the first one (InfoNCE of `views` 'shared'). None given: equal
    ones."""

    @property
    def marks(self) -> bool:
        return any(part.marks for part in self.parts)

    def __post_init__(self) -> None:
        n = len(self.parts)
        own = [not part.joins for part in self.parts]
        equal = tuple(float(has) / max(sum(own), 1) for has in own)
        object.__setattr__(self, 'weights', self.weights or (1.0,) * n)
        object.__setattr__(self, 'shares', self.shares or equal)
        if not n or n != len(self.weights) or n != len(self.shares):
            raise UserError(
                f'a weighted sum of {n} parts with {len(self.weights)} weights and '
                f'{len(self.shares)} shares: give one of each per part'
            )
        if not own[0] or (not all(own) and not self.parts[0].lends):
            raise UserError(
                f'{type(self.parts[0]).__name__} as the first part makes no pass that others can '
                'read: begin with one that predicts tokens, such as causal'
            )
        for part, has, share in zip(self.parts, own, self.shares, strict=True):
            if has != (share != 0):
                raise UserError(
                    f'a share {share} of the row for {type(part).__name__}, which '
                    + ('needs positions' if has else 'reads those of the first part: give it 0')
                )
        if min(self.shares) < 0 or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise UserError(
                f'--objective.shares {self.shares}: shares of a row must be positive and 1 in all'
            )
        if min(self.weights) <= 0:
            raise UserError(f'--objective.weights {self.weights}: they must be positive')
        check_parts(self.parts, 'a sum', joining=True)

    @property
    def reading(self) -> Reading:
        """Each question by the first part that can be asked it."""
        asked = [part.reading for part in self.parts]
        return Reading(
            whole=next((one.whole for one in asked if one.whole), None),
            rest=next((one.rest for one in asked if one.rest), None),
            middle=next((one.middle for one in asked if one.middle), None),
            infill=next((one.infill for one in asked if one.infill), None),
            text=any(one.text for one in asked),
            begins=any(part.reading.begins for part in self.parts if not part.joins),
            unmasks=next((one.unmasks for one in asked if one.unmasks), None),
        )

    @property
    def causal(self) -> bool:
        return self.parts[0].causal

    @property
    def accumulates(self) -> bool:
        """Weights of the parts do not stand in one relation in every microbatch."""
        return len(self.parts) == 1 and self.parts[0].accumulates

    @property
    def has_likelihood(self) -> bool:
        return self.parts[0].has_likelihood

    @property
    def ends(self) -> bool:
        return any(part.ends for part in self.parts)

    def lengths(self, seq_len: int) -> dict[str, int]:
        lengths = {
            _name(k, stream): length
            for k, (part, size) in enumerate(zip(self.parts, self._sizes(seq_len), strict=True))
            for stream, length in part.lengths(size).items()
        }
        room = tuple(lengths.values())
        if not longest(self, FEWEST, room=room, seq_len=seq_len, draw=0.5):
            raise UserError(
                f'the shares {self.shares} of a row of {seq_len} give the parts no room for one '
                'text: change them, or raise the sequence length'
            )
        return lengths

    def segments(self, seq_len: int) -> int:
        limits = [
            part.segments(size) for part, size in zip(self.parts, self._sizes(seq_len), strict=True)
        ]
        return min(filter(None, limits), default=0)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        """Those of all parts, each under a draw of its own."""
        sizes: Sizes = ()
        for k, (part, size) in enumerate(zip(self.parts, self._sizes(seq_len), strict=True)):
            own = part.sizes(n, seq_len=size, draw=own_draw(draw, k))
            if own is None:
                return None
            sizes += own
        return sizes

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The examples of all parts in one."""
        arrays: Example = {}
        sizes = piece.sizes
        for k, (part, size) in enumerate(zip(self.parts, self._sizes(seq_len), strict=True)):
            n = len(part.lengths(size))
            own = piece._replace(draw=own_draw(piece.draw, k), sizes=sizes[:n])
            sizes = sizes[n:]
            if part.joins:
                example, name = part.beside(arrays, own, rng=rng), _beside
            else:
                example = part.example(own, tokenizer=tokenizer, seq_len=size, rng=rng)
                name = _name
            if example is None:
                return None
            arrays |= {name(k, key): x for key, x in example.items()}
        return arrays

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        keys = jax.random.split(key, len(self.parts))
        extra = {
            str(k): part.extra(model, part_key)
            for k, (part, part_key) in enumerate(zip(self.parts, keys, strict=True))
        }
        return {k: params for k, params in extra.items() if params}

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        keys = jax.random.split(key, len(self.parts))
        carried = {
            str(k): part.carried(model, _own(k, params), part_key)
            for k, (part, part_key) in enumerate(zip(self.parts, keys, strict=True))
        }
        return {k: arrays for k, arrays in carried.items() if arrays}

    def carry(self, carried: Params, params: Params, kept: Batch, step: jax.Array) -> Params:
        return {
            k: self.parts[int(k)].carry(arrays, _own(int(k), params), of_stream(k, kept), step)
            for k, arrays in carried.items()
        }

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
        n = len(self.parts)
        keys = [None] * n if key is None else list(jax.random.split(key, n))
        if any(part.joins for part in self.parts):
            x_BTD = self.parts[0].read(model, self._batch(0, batch), compute=compute, key=keys[0])  # type: ignore[attr-defined]
            context = context._replace(features=x_BTD)
        losses = [
            part.loss(
                model,
                self._batch(k, batch),
                extra=extra.get(str(k), {}),
                compute=compute,
                key=keys[k],
                context=self._context(k, context),
            )
            for k, part in enumerate(self.parts)
        ]
        weight = losses[0].weight
        total = self.weights[0] * losses[0].total
        for own, loss in zip(self.weights[1:], losses[1:], strict=True):
            # Brings a sum over one part's weight to a sum over the first part's.
            total += own * weight / jnp.maximum(loss.weight, 1) * loss.total
        metrics, weights = {}, {}
        if self.has_likelihood:
            metrics['nll'] = losses[0].metrics['nll']
        for name, loss in zip(self._names(), losses, strict=True):
            for metric, value in {'loss': loss.total, **loss.metrics}.items():
                metrics[f'{name}/{metric}'] = value
                weights[f'{name}/{metric}'] = loss.weights.get(metric, loss.weight)
        kept = {f'{k}/{name}': x for k, loss in enumerate(losses) for name, x in loss.kept.items()}
        return Loss(total, weight, metrics, kept=kept, weights=weights)

    def loss_tokens(self, batch: Batch) -> int:
        return sum(part.loss_tokens(self._batch(k, batch)) for k, part in enumerate(self.parts))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        sizes = self._sizes(seq_len)
        per_row = [n * part.flops(model, n) for part, n in zip(self.parts, sizes, strict=True)]
        first = self.parts[0]
        if isinstance(first, TokenPrediction) and any(part.joins for part in self.parts):
            # Its pass is for others too.
            per_row[0] += sizes[0] * first.skipped_flops(model, sizes[0])
        return sum(per_row) / seq_len

    def check(self, model: ModelConfig) -> None:
        for part in self.parts:
            part.check(model)

    def stretched(self, ratio: float) -> Weighted:
        return replace(self, parts=tuple(part.stretched(ratio) for part in self.parts))

    def check_steps(self, steps: int) -> None:
        for part in self.parts:
            part.check_steps(steps)

    def _sizes(self, seq_len: int) -> list[int]:
        """Positions of a row for each part; even but for the first, since a part may halve its. Of
        a part that reads the pass of the first, those that it reads."""
        rest = [2 * round(share * seq_len / 2) for share in self.shares[1:]]
        rest = [2 * in_lanes(size // 2, seq_len // 2) if size else 0 for size in rest]
        first = seq_len - sum(rest)
        of_rest = zip(self.parts[1:], rest, strict=True)
        sizes = [first, *(first if part.joins else size for part, size in of_rest)]
        if min(sizes) < 2:
            raise UserError(
                f'the shares {self.shares} of a row of {seq_len} leave a part without positions: '
                'raise its share or the sequence length'
            )
        return sizes

    def _batch(self, k: int, batch: Batch) -> Batch:
        """The arrays of part k by its own names."""
        if self.parts[k].joins:
            own = {key: x for key, x in batch.items() if key.partition('.')[2] == str(k)}
            first = {key: x for key, x in batch.items() if '/' not in key and '.' not in key}
            return first | {key.partition('.')[0]: x for key, x in own.items()}
        if k:
            return of_stream(str(k), batch)
        return {
            key: x
            for key, x in batch.items()
            if not key.partition('/')[0].isdigit() and not key.partition('.')[2].isdigit()
        }

    def _context(self, k: int, context: Context) -> Context:
        """That of part k: what it carries, and the pass that it reads, if it does."""
        reads = k == 0 or self.parts[k].joins
        return context._replace(
            carried=context.carried.get(str(k), {}), features=context.features if reads else None
        )

    def _names(self) -> list[str]:
        """What the metrics of each part are called by: its class, and its index if that is not one
        of a kind."""
        names = [type(part).__name__ for part in self.parts]
        count = Counter(names)
        return [f'{name}{k}' if count[name] > 1 else name for k, name in enumerate(names)]


def check_parts(parts: Sequence[Objective], whole: str, *, joining: bool = False) -> None:
    """Raise UserError for an objective that cannot be one of several on the same text."""
    for part in parts:
        if hasattr(part, 'parts'):
            raise UserError(
                f'{type(part).__name__} within {whole}: it has parts itself, whose names would be '
                'those of others; give single objectives'
            )
        alone = part.rollout is not None or part.knows or part.updates > 1
        alone |= hasattr(part, 'teacher')
        if part.reads is not Text or alone or (part.joins and not joining):
            raise UserError(
                f'{type(part).__name__} is no part of {whole}: it needs more than the text that '
                'the other parts read'
            )


def _own(k: int, params: Params) -> Params:
    """Parameters as part k sees them: of the backbone, and of the objective its own."""
    own = params.get(EXTRA, {}).get(str(k))
    return backbone(params) | ({EXTRA: own} if own else {})


def _name(k: int, name: str) -> str:
    """An array or stream of part k in the batch of all."""
    if not k:
        return name
    return f'{k}/{name}' if name else str(k)


def _beside(k: int, name: str) -> str:
    """An array of part k that stands in the stream of the first part."""
    return f'{name}.{k}'


def own_draw(draw: float, k: int) -> float:
    """The draw of part k, in [0, 1): that of the whole for the first part, and for each other one
    independent of it (the finaliser of SplitMix64, Steele et al. 2014)."""
    if not k:
        return draw
    x = int(draw * 2**BITS) + k * 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 64 - BITS) / 2**BITS
