"""Masked diffusion (MDLM, Sahoo et al. 2024; LLaDA, Nie et al. 2025): any share of a text is hidden
and told from the rest."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llama_jax import layout
from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import Infill, Middle, Question, Reading, Unmasking
from llama_jax.objectives.base import ALONE, Batch, Context, Loss, after_begin
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture
from llama_jax.objectives.softmax import cross_entropy

DRAWS = 16
"""Of the masks under which the bound of a text is taken when it is evaluated."""
_GOLDEN = 2654435769
"""2^32 over the golden ratio: multiples of it, modulo 2^32, are spread evenly."""


@dataclass(frozen=True)
class MaskedDiffusion(TokenPrediction):
    """The tokens of a text and its end under masks: a bound of the likelihood.

    Each of L tokens is masked with probability t, and the negative log-likelihood is at most
    E_t[1/t sum over the masked of -log p] (Sahoo et al. 2024, equation 10, with alpha = 1 - t).
    Drawn here is the number k of masked tokens, uniform in 1 ... L, and then which: E_k[L/k sum],
    which is the same in expectation (Nie et al. 2025, section 2.4), has a mask in every text and
    needs no clamp of t, which would bias it. The loss is divided by the length of the text, never
    by the number of masks. The mask has no probability. Times are stratified over the batch.

    A begin token, or the token before the piece, stands in front and is never masked: the tokens
    that are learnt are those of causal language modelling.
    """

    read_previous: bool = False
    """A token is read off the position before it, as a causal model has learnt to do (as MNTP,
    BehnamGhader et al. 2024, section 2.1; Dream, Ye et al. 2025)."""

    sees_all: ClassVar[bool] = True

    @property
    def marks(self) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return False

    @property
    def ends(self) -> bool:
        return True

    @property
    def has_likelihood(self) -> bool:
        return True

    @property
    def reading(self) -> Reading:
        """Bounds, and in a middle the likelihood under the order from left to right."""
        bound = Question('bound', self._bound, sees_all=True, draws=DRAWS)
        return Reading(
            whole=bound,
            rest=Question('bound', functools.partial(self._bound, begin=True), True, DRAWS),
            middle=Question('order', self._left_to_right, sees_all=True),
            infill=Infill(functools.partial(self._hidden, begin=True), 'length', sees_all=True),
            text=False,
            unmasks=Unmasking(self.read_previous),
        )

    def lengths(self, seq_len: int) -> dict[str, int]:
        return after_begin(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """What stands before the piece and its units; 'hidden' is what stands for each when it is
        masked. Masks are drawn for a whole batch, in the loss."""
        before, units = piece.predicted(tokenizer)
        return self.unmasked(before[:1], units, tokenizer)

    def unmasked(self, before: np.ndarray, units: np.ndarray, tokenizer: Any) -> Example:
        """The example of `units` after what stands before them; weight is on every unit, where it
        is read."""
        first, weight = np.array([tokenizer.pad_id]), np.ones(len(units), np.float32)
        in_order = (units, first) if self.read_previous else (first, units)
        weights = (weight, [0]) if self.read_previous else ([0], weight)
        return {
            'inputs': np.concatenate([before, units]).astype(np.int32),
            'hidden': np.append(before, np.full(len(units), tokenizer.mask_id)).astype(np.int32),
            'targets': np.concatenate(in_order).astype(np.int32),
            'weights': np.concatenate(weights).astype(np.float32),
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
        """Without a key (validation) the masks of a batch are always the same. 'nll' is the bound:
        negative log-likelihood in nats, or more."""
        masks, key = self.masks(batch, key)
        return self.masked_loss(model, batch, masks, compute=compute, key=key)

    def masks(self, batch: Batch, key: jax.Array | None) -> tuple[Masks, jax.Array | None]:
        """Which tokens of a batch are masked; and the key that is left for dropout."""
        own = _key_of(batch)
        if key is not None:
            key, own = jax.random.split(key)
        return masks_of(self.groups(batch), self.tokens(batch), own), key

    def tokens(self, batch: Batch) -> Bool[Array, 'B T']:
        """Which tokens may be masked: all but the first of each text."""
        return (batch['segments'] > 0) & (batch['positions'] > 0)

    def groups(self, batch: Batch) -> Int[Array, 'B T']:
        """Tokens of a row of one number are masked at one time of the diffusion."""
        return batch['segments']

    def masked_loss(
        self,
        model: Transformer,
        batch: Batch,
        masks: Masks,
        *,
        compute: Compute,
        key: jax.Array | None,
    ) -> Loss:
        """The loss under given masks."""
        shown = {**batch, 'inputs': jnp.where(masks.masked_BT, batch['hidden'], batch['inputs'])}
        x_BTD = self.read(model, shown, compute=compute, key=key)
        weight_BT, never_BT = masks.weight_BT, batch['hidden']
        if self.read_previous:
            # The first of a row is not masked, so that nothing comes around.
            weight_BT, never_BT = (jnp.roll(x, -1, axis=1) for x in (weight_BT, never_BT))
        sums = cross_entropy(
            *(x_BTD, model.head()[...], batch['targets'], weight_BT),
            *(self.z_loss, model.config.vocab_padding, never_BT),
        )
        return Loss(
            total=sums.total,
            weight=batch['weights'].sum(),
            metrics={'nll': sums.nll, 'accuracy': sums.correct},
        )

    def loss_tokens(self, batch: Batch) -> int:
        """Of a text of L tokens (L + 1) / 2 are masked on average."""
        units = int(np.count_nonzero(batch['weights']))
        return (units + int(np.count_nonzero(batch['positions'] == 1))) // 2

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills: of its L tokens (L + 1) / 2 are masked on average."""
        return decoder_flops(model, seq_len, causal=False, predicted=seq_len / 2)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'masked diffusion', encoder=False)

    def _hidden(
        self, text: Middle, tokenizer: Any, masked: np.ndarray | None = None, *, begin: bool
    ) -> Example:
        """The text, after a begin token where it has none of its own, with a mask for each token of
        the middle that is `masked` (default: all), and weight 1 on these."""
        before = [tokenizer.bos_id] if begin else text.prefix[:1]
        ids = np.concatenate([before, text.prefix[0 if begin else 1 :], text.middle, text.suffix])
        example = self.unmasked(ids[:1], ids[1:], tokenizer)
        start = len(text.prefix) + begin
        at = start + np.flatnonzero(np.ones(len(text.middle), bool) if masked is None else masked)
        example['inputs'][at] = tokenizer.mask_id
        example['weights'] = np.zeros(len(ids), np.float32)
        example['weights'][at - self.read_previous] = 1
        if self.read_previous:
            example['hidden'] = np.roll(example['hidden'], -1)
        example['never'] = example.pop('hidden')
        return example

    def _bound(
        self, text: Middle, tokenizer: Any, rng: np.random.Generator, *, begin: bool = False
    ) -> list[Example]:
        """Examples under as many masks, of which the sum is a draw of the bound: k is stratified
        over them."""
        n = len(text.middle)
        made = []
        for j in range(DRAWS):
            k = 1 + int((j + rng.random()) / DRAWS * n)
            masked = np.zeros(n, bool)
            masked[rng.choice(n, k, replace=False)] = True
            example = self._hidden(text, tokenizer, masked, begin=begin)
            example['weights'] *= np.float32(n / k / DRAWS)
            made.append(example)
        return made

    def _left_to_right(
        self, text: Middle, tokenizer: Any, rng: np.random.Generator
    ) -> list[Example]:
        """An example for each token of the middle, in which those before it are written and it is
        the one that is asked for."""
        n = len(text.middle)
        made = []
        for j in range(n):
            example = self._hidden(text, tokenizer, np.arange(n) >= j, begin=True)
            first = int(np.flatnonzero(example['weights'])[0])
            example['weights'][first + 1 :] = 0
            made.append(example)
        return made


class Masks(NamedTuple):
    """Which tokens are hidden, and how much the loss of each weighs: L/k where k of L are."""

    masked_BT: Bool[Array, 'B T']
    weight_BT: Float[Array, 'B T']


def masks_of(group_BT: Int[Array, 'B T'], token_BT: Bool[Array, 'B T'], key: jax.Array) -> Masks:
    """Of the L tokens of each group of a row k are masked, any k of them as likely as others, and k
    uniform in 1 ... L. The draws of k are stratified over the rows, and over the groups of one."""
    time_key, place_key = jax.random.split(key)
    order_BT = jax.random.bits(place_key, group_BT.shape, out_sharding=layout.act('BT'))
    place_T = jnp.arange(group_BT.shape[1])
    together_BTS = (group_BT[:, :, None] == group_BT[:, None, :]) & token_BT[:, None, :]
    first_BTS = order_BT[:, None, :] < order_BT[:, :, None]
    # Of two equal numbers the one that stands before is the smaller.
    tie_BTS = (order_BT[:, None, :] == order_BT[:, :, None]) & (place_T < place_T[:, None])
    rank_BT = jnp.sum(together_BTS & (first_BTS | tie_BTS), axis=2)
    n_BT = jnp.sum(together_BTS, axis=2)
    k_BT = jnp.minimum(1 + (times(group_BT, time_key) * n_BT).astype(jnp.int32), n_BT)
    masked_BT = token_BT & (rank_BT < k_BT)
    weight_BT = jnp.where(masked_BT, n_BT / jnp.maximum(k_BT, 1), 0.0)
    return Masks(masked_BT, weight_BT)


def times(group_BT: Int[Array, 'B T'], key: jax.Array) -> Float[Array, 'B T']:
    """A number in [0, 1) for each group of each row. Each is uniform; those of one group in all
    rows have the same distance from each other, and those of the groups of a row are spread out."""
    B = group_BT.shape[0]
    row_B: UInt32[Array, ' B'] = (jnp.arange(B) * (2**32 / B)).astype(jnp.uint32)
    # Sums of unsigned integers come around, as the times do.
    shift_BT = group_BT.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    time_BT = jax.random.bits(key) + row_B[:, None] + shift_BT
    return (time_BT >> 8).astype(jnp.float32) / 2**24


def _key_of(batch: Batch) -> jax.Array:
    """A key that equal batches share, and hardly any others."""
    place_T = 1 + jnp.arange(batch['inputs'].shape[1], dtype=jnp.uint32)
    return jax.random.fold_in(
        jax.random.key(0), jnp.sum(batch['inputs'].astype(jnp.uint32) * place_T, dtype=jnp.uint32)
    )
