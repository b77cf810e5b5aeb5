"""A weighted sum of objectives on the same text, such as causal LM and a contrastive loss."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.base import Base, Batch, Loss, of_stream, stream_of
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import DOCUMENT, InfoNCE, document_id
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prefix import PrefixLM
from llama_jax.objectives.rtd import ReplacedTokens
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.objectives.ul2 import UL2

Part = (
    CausalLM
    | PrefixLM
    | SpanCorruption
    | UL2
    | Bart
    | MaskedLM
    | FillInMiddle
    | InfoNCE
    | ReplacedTokens
)
"""Every objective that stands for itself."""
CONTROL = 2
"""Tokens that parts add to a piece, such as begin and end: the first size tried leaves room."""


@dataclass(frozen=True)
class Weighted(Base):
    """Sum over parts k of weight_k times the loss of part k, each a mean over its own weight.

    A document is cut into pieces, and every part makes one example of each piece: the row of a
    batch holds the same text for all parts, one segment a piece. The arrays and metrics of the
    first part keep their names, so that its likelihood is read as if it were alone; those of part
    k are in the streams 'k' and 'k/STREAM'. The first part also says how the backbone is read for
    representations.
    """

    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    shares: tuple[float, ...]
    """Shares of the positions of a row, 1 in all: positions that the backbone processes."""

    def __post_init__(self) -> None:
        n = len(self.parts)
        if not n or n != len(self.weights) or n != len(self.shares):
            raise UserError(
                f'a weighted sum of {n} parts with {len(self.weights)} weights and '
                f'{len(self.shares)} shares: give one of each per part'
            )
        if min(self.shares) <= 0 or not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise UserError(f'the shares {self.shares} of a row must be positive and 1 in all')
        if min(self.weights) <= 0:
            raise UserError(f'the weights {self.weights} of a sum must be positive')
        if any(isinstance(part, Weighted) for part in self.parts):
            raise UserError('a weighted sum within a weighted sum: give its parts to the outer one')

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

    def lengths(self, seq_len: int) -> dict[str, int]:
        return {
            _name(k, stream): length
            for k, (part, size) in enumerate(zip(self.parts, self._sizes(seq_len), strict=True))
            for stream, length in part.lengths(size).items()
        }

    def segments(self, seq_len: int) -> int:
        limits = [
            part.segments(size) for part, size in zip(self.parts, self._sizes(seq_len), strict=True)
        ]
        return min(filter(None, limits), default=0)

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """One example of every part for each piece of the document, in one.

        Pieces are about as long as every part can take; one too short for a part is left out.
        """
        sizes = self._sizes(seq_len)
        identity = document_id(tokens)
        made: list[dict[str, np.ndarray]] = []
        start, size = 0, max(1, max(sizes) - CONTROL)
        while start < len(tokens):
            left = len(tokens) - start
            piece = tokens[start : start + -(-left // -(-left // size))]  # as equal as can be
            arrays: dict[str, np.ndarray] = {}
            made_by_all = True
            for k, (part, n) in enumerate(zip(self.parts, sizes, strict=True)):
                examples = part.example(piece, tokenizer=tokenizer, seq_len=n, rng=rng)
                share = _fitting(examples, part.lengths(n))
                if share < 1:
                    size = min(len(piece) - 1, int(len(piece) * share))
                    break
                made_by_all &= bool(examples)
                for example in examples:
                    arrays |= {_name(k, key): x for key, x in example.items()}
            if size < 1:
                raise UserError(
                    f'{type(part).__name__} needs more than its {n} positions for an example of '
                    'one token: raise its share or the sequence length'
                )
            if share < 1:
                continue
            start += len(piece)
            if made_by_all:
                # Pieces of one document are no negatives of each other.
                made.append({key: _identified(key, x, identity) for key, x in arrays.items()})
        return made

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        keys = jax.random.split(key, len(self.parts))
        extra = {
            str(k): part.extra(model, part_key)
            for k, (part, part_key) in enumerate(zip(self.parts, keys, strict=True))
        }
        return {k: params for k, params in extra.items() if params}

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
    ) -> Loss:
        n = len(self.parts)
        keys = [None] * n if key is None else list(jax.random.split(key, n))
        losses = [
            part.loss(
                model,
                self._batch(k, batch),
                extra=extra.get(str(k), {}),
                compute=compute,
                key=keys[k],
            )
            for k, part in enumerate(self.parts)
        ]
        weight = losses[0].weight
        total = self.weights[0] * losses[0].total
        metrics = {}
        if self.has_likelihood:
            metrics['nll'] = losses[0].metrics['nll']
        for k, (name, loss) in enumerate(zip(self._names(), losses, strict=True)):
            # Brings a sum over one part's weight to a sum over the first part's.
            ratio = weight / jnp.maximum(loss.weight, 1) if k else jnp.float32(1)
            if k:
                total += self.weights[k] * ratio * loss.total
            sums = {'loss': loss.total, **loss.metrics}
            metrics |= {f'{name}/{metric}': ratio * value for metric, value in sums.items()}
        return Loss(total, weight, metrics)

    def loss_tokens(self, batch: Batch) -> int:
        return sum(part.loss_tokens(self._batch(k, batch)) for k, part in enumerate(self.parts))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        sizes = self._sizes(seq_len)
        per_row = [n * part.flops(model, n) for part, n in zip(self.parts, sizes, strict=True)]
        return sum(per_row) / seq_len

    def check(self, model: ModelConfig) -> None:
        for part in self.parts:
            part.check(model)

    def _sizes(self, seq_len: int) -> list[int]:
        """Positions of a row for each part; even but for the first, since a part may halve its."""
        rest = [2 * round(share * seq_len / 2) for share in self.shares[1:]]
        sizes = [seq_len - sum(rest), *rest]
        if min(sizes) < 2:
            raise UserError(
                f'the shares {self.shares} of a row of {seq_len} leave a part without positions: '
                'raise its share or the sequence length'
            )
        return sizes

    def _batch(self, k: int, batch: Batch) -> Batch:
        """The arrays of part k by its own names."""
        if k:
            return of_stream(str(k), batch)
        return {key: x for key, x in batch.items() if not key.partition('/')[0].isdigit()}

    def _names(self) -> list[str]:
        """What the metrics of each part are called by: its class, and its index if that is not one
        of a kind."""
        names = [type(part).__name__ for part in self.parts]
        count = Counter(names)
        return [f'{name}{k}' if count[name] > 1 else name for k, name in enumerate(names)]


def _name(k: int, name: str) -> str:
    """An array or stream of part k in the batch of all."""
    if not k:
        return name
    return f'{k}/{name}' if name else str(k)


def _fitting(examples: list[dict[str, np.ndarray]], lengths: dict[str, int]) -> float:
    """1 where there is one example and it fits in a row (or none, which always does).

    Else the share of its text to try next: a little less, but no more than one could be made of.
    """
    if not examples:
        return 1.0
    if len(examples) > 1:
        return min(15 / 16, 1 / (len(examples) - 1))
    return min(1.0, *(lengths[stream_of(key)] / len(x) for key, x in examples[0].items()))


def _identified(key: str, x: np.ndarray, identity: int) -> np.ndarray:
    return np.full_like(x, identity) if key.rpartition('/')[2] == DOCUMENT else x
