"""Block diffusion (BD3-LM, Arriola et al. 2025): causal between blocks, diffusion within."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.patterns import Dense
from llama_jax.model.transformer import Transformer
from llama_jax.model.wanted import Wanted
from llama_jax.objectives.asked import Kind, Middle, Question, Reading, Unmasking
from llama_jax.objectives.base import Batch
from llama_jax.objectives.diffusion import DRAWS, MaskedDiffusion
from llama_jax.objectives.flops import TRAINING, head, layer

LAST = 2**30
"""No place comes behind it."""


@dataclass(frozen=True)
class BlockDiffusion(MaskedDiffusion):
    """The tokens of a block given all blocks before it and those of its own that are not masked; a
    bound of the likelihood, and with blocks of one token the likelihood itself (section 3).

    A text stands in a row twice, side by side: with masks, and clean. A token of the first sees its
    own block there, and of the second the blocks before its own; a clean one sees the clean blocks
    up to its own, in one pass of the model. Blocks count from the begin token, which is one of the
    first block's and never masked. Each block has masks of its own. The last block of a document is
    filled with end tokens, which are learnt: every block is shown whole, as it is when a text is
    written, or the number of its masks would tell where the text ends. Of a text that is cut within
    a block the rest of the block is masked and not learnt.
    """

    block: int = 4
    """Tokens of a block. 1: as a causal model, which reads a token off a mask in its place; as long
    as a text: masked diffusion."""

    sees_all: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f'blocks of {self.block} tokens: give 1 or more')
        if self.read_previous:
            raise UserError(
                'read_previous has no effect on blocks, whose first token would be read off the '
                'block before: leave it out, or take masked diffusion'
            )

    @property
    def causal(self) -> bool:
        """A clean text sees what is before it and a few tokens of its own block, never all."""
        return True

    @property
    def reading(self) -> Reading:
        """A suffix is not given: what a token sees ends with its block."""
        kind: Kind = 'exact' if self.block == 1 else 'bound'
        draws = 1 if self.block == 1 else DRAWS
        whole = Question(kind, self._bound, read=self.read, draws=draws)
        begun = whole._replace(examples=functools.partial(self._bound, begin=True))
        unmasks = Unmasking(block=self.block)
        return Reading(whole=whole, rest=begun, middle=begun, text=False, unmasks=unmasks)

    def lengths(self, seq_len: int) -> dict[str, int]:
        if seq_len < 4:
            raise UserError(
                f'a row of {seq_len} positions has no room for a text that stands there twice, '
                'after begin tokens: raise the sequence length'
            )
        if 2 * self.block > seq_len:
            raise UserError(
                f'--objective.block {self.block}: a row of {seq_len} positions holds a text twice, '
                f'in blocks of {seq_len // 2} at most; lower it or raise the sequence length'
            )
        return {'': seq_len}

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (2 * (n + 1 + self._missing(n + 1)),)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The piece twice; 'at' is the place in the piece, and 'masks' 1 where masks may stand."""
        before, units = piece.predicted(tokenizer)
        if piece.stop > len(piece.tokens):
            units = self._filled(units, 1, tokenizer)
        n = 1 + len(units)
        rest = np.full(self._missing(n), tokenizer.mask_id)
        clean = self.unmasked(before[:1], np.append(units, rest), tokenizer)
        clean['weights'][n:] = 0
        return self.twice(clean, clean)

    def _filled(self, ids: np.ndarray, before: int, tokenizer: Any) -> np.ndarray:
        """With end tokens to the end of the block; so many tokens stand before."""
        ends = np.full(self._missing(before + len(ids)), tokenizer.eos_id)
        return np.concatenate([ids, ends]).astype(np.int32)

    def _missing(self, n: int) -> int:
        """Tokens to the end of the block behind n."""
        return -n % self.block

    def twice(self, masked: Example, clean: Example) -> Example:
        """An example of masked diffusion with the clean text behind it."""
        n = len(clean['inputs'])
        nothing = {'weights': np.zeros(n, np.float32), 'hidden': clean['inputs']}
        second = {**clean, **nothing}
        both = {key: np.concatenate([masked[key], second[key]]) for key in masked}
        both['at'] = np.tile(np.arange(n, dtype=np.int32), 2)
        both['masks'] = np.repeat(np.array([1, 0], np.int32), n)
        return both

    def groups(self, batch: Batch) -> Int[Array, 'B T']:
        """The blocks of each text are masked one by one; what is clean is of none."""
        T = batch['inputs'].shape[1]
        return jnp.where(batch['masks'] > 0, batch['segments'] * T + self._blocks(batch), 0)

    def tokens(self, batch: Batch) -> jax.Array:
        return (batch['masks'] > 0) & (batch['weights'] > 0)

    def read(
        self,
        model: Transformer,
        batch: Batch,
        *,
        compute: Compute,
        key: jax.Array | None = None,
        wanted: Wanted | None = None,
    ) -> jax.Array:
        place_BT, until_BT = self.places(batch)
        x_BTD, _ = model.features(
            batch['inputs'],
            position_BT=batch['at'],
            segment_BT=batch['segments'],
            place_BT=place_BT,
            until_BS=until_BT,
            compute=compute,
            key=key,
            wanted=wanted,
        )
        return x_BTD

    def places(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Places in the order of what is seen, and the first that does not see each: the masks of
        block b at 2b, seen from there alone, and the clean block at 2b + 1."""
        first_BT = 2 * self._blocks(batch)
        masks_BT = batch['masks'] > 0
        return (
            jnp.where(masks_BT, first_BT, first_BT + 1),
            jnp.where(masks_BT, first_BT + 1, LAST),
        )

    def _blocks(self, batch: Batch) -> jax.Array:
        return batch['at'] // self.block

    def loss_tokens(self, batch: Batch) -> int:
        """Of a block of L tokens (L + 1) / 2 are masked on average."""
        token = batch['weights'] > 0
        begins = token & ((batch['at'] % self.block == 0) | (batch['at'] == 1))
        return int(np.count_nonzero(token) + np.count_nonzero(begins)) // 2

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills."""
        at = np.arange(seq_len // 2)
        block, n = at // self.block, len(at)
        before = block * self.block  # clean, and as many for both streams
        keys = float(np.mean(before + np.minimum(self.block, n - before)))
        tokens = np.bincount(block[1:])
        predicted = float(np.sum((tokens[tokens > 0] + 1) / 2))
        return TRAINING * (model.layers * layer(model, keys) + head(model) * predicted / seq_len)

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        if model.pattern != Dense():
            raise UserError(
                'block diffusion says itself what a token sees: leave --model.pattern out'
            )

    def _bound(
        self, text: Middle, tokenizer: Any, rng: np.random.Generator, *, begin: bool = False
    ) -> list[Example]:
        """Examples under as many masks, of which the sum is a draw of the bound: in each block the
        number of masks is stratified over them. A text that ends is asked for with all of its last
        block, as it is learnt: the bound is of that, which is no more likely than the text. Of one
        that is cut the rest of the last block is masked and not asked for."""
        before = np.concatenate([[tokenizer.bos_id] if begin else [], text.prefix])
        middle = text.middle
        if len(middle) and middle[-1] == tokenizer.eos_id:
            middle = self._filled(middle, len(before), tokenizer)
        place = np.arange(len(before), len(before) + len(middle))
        rest = np.full(self._missing(len(before) + len(middle)), tokenizer.mask_id)
        ids = np.concatenate([before, middle, rest])
        blocks = [place[place // self.block == b] for b in np.unique(place // self.block)]
        draws = 1 if self.block == 1 else DRAWS
        strata = rng.permuted(np.tile(np.arange(draws), (len(blocks), 1)), axis=1)
        times = (strata + rng.random(strata.shape)) / draws
        clean = self.unmasked(ids[:1], ids[1:], tokenizer)
        made = []
        for j in range(draws):
            inputs, weights = clean['inputs'].copy(), np.zeros(len(ids), np.float32)
            for of_block, time in zip(blocks, times[:, j], strict=True):
                n = len(of_block)
                at = rng.choice(of_block, 1 + int(time * n), replace=False)
                inputs[at], weights[at] = tokenizer.mask_id, n / len(at) / draws
            both = self.twice({**clean, 'inputs': inputs, 'weights': weights}, clean)
            both['never'] = both.pop('hidden')
            made.append(both)
        return made
