"""Replaced-token detection (ELECTRA, Clark et al. 2020): tell the tokens that a small generator
wrote from those of the text."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax import layout
from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.model.width import width_of
from llama_jax.objectives.asked import NOTHING, Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss, after_begin
from llama_jax.objectives.flops import TRAINING, decoder_flops, features_flops
from llama_jax.objectives.prediction import check_architecture
from llama_jax.objectives.softmax import cross_entropy

BLOCK = 64
"""Tokens whose probabilities are cumulated together."""
DRAWN = 64
"""Positions of a row whose logits exist at a time when the generator is sampled."""


@dataclass(frozen=True)
class ReplacedTokens(Base):
    """Masked tokens are filled in by a generator, trained by masked LM; the backbone says of every
    token whether it is another than the text's. Weight is one per token, begin tokens included.

    The generator is a model of its own, embedding included (tied to its head). ELECTRA shares the
    embedding with the backbone (GLUE 83.6 to 84.3, section 3.2), which then owes a part to masked
    LM: here the backbone learns from this loss alone, and its parameters are those of every arm.
    """

    generator: float = 0.25
    """Width of the generator as a share of the backbone's; it is as deep (section 3.2)."""
    weight: float = 50.0
    """Of the discriminator's loss."""
    rate: float = 0.15
    """Share of tokens that are masked."""

    @property
    def marks(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 < self.generator <= 1:
            raise UserError(
                f'--objective.generator {self.generator}: its share of the width must be in (0, 1]'
            )
        if not 0 < self.rate < 1:
            raise UserError(
                f'--objective.rate {self.rate}: that of masked tokens must be in (0, 1)'
            )

    @property
    def causal(self) -> bool:
        return False

    @property
    def accumulates(self) -> bool:
        """The generator's loss is a mean over masked tokens, of which microbatches have more or
        fewer."""
        return False

    @property
    def reading(self) -> Reading:
        return NOTHING._replace(text=False)

    def lengths(self, seq_len: int) -> dict[str, int]:
        return after_begin(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + 1,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The piece after a begin token, with masks; the tokens as they are; and where the masks
        stand."""
        text = piece.text
        if not len(text):
            return None
        masked = np.zeros(1 + len(text), bool)
        masked[1 + rng.choice(len(text), self.masked(len(text)), replace=False)] = True
        ids = np.concatenate([[tokenizer.bos_id], text]).astype(np.int32)
        return {
            'inputs': np.where(masked, tokenizer.mask_id, ids).astype(np.int32),
            'targets': ids,
            'weights': masked.astype(np.float32),
        }

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        generator_key, head_key = jax.random.split(key)
        generator = Transformer(self.generator_of(model), key=generator_key)
        return {
            'generator': layers.split(generator),
            'head_D': fan_in(head_key, (model.dim,), width_of(model).base),
            'bias': jnp.zeros(()),
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
        """Without a key (validation) there is no dropout, and the same tokens are always drawn."""
        sample_key = jax.random.key(0)
        generator_key = model_key = None
        if key is not None:
            sample_key, generator_key, model_key = jax.random.split(key, 3)
        target_BT, masked_BT = batch['targets'], batch['weights']
        seen: dict[str, Any] = {
            'position_BT': batch['positions'],
            'segment_BT': batch['segments'],
            'causal': False,
            'compute': compute,
        }
        generator = layers.bind(self.generator_of(model.config), extra['generator'])
        x_BTD, _ = generator.features(batch['inputs'], key=generator_key, **seen)
        head_VD = generator.head()[...]
        padding = model.config.vocab_padding
        written = cross_entropy(x_BTD, head_VD, target_BT, masked_BT, 0.0, padding)

        input_BT, replaced_BT = replace(
            target_BT, masked_BT, drawn_BT=draw(x_BTD, head_VD, sample_key, padding)
        )
        x_BTD, _ = model.features(input_BT, key=model_key, **seen)
        logit_BT = jnp.einsum('BTD,D->BT', x_BTD.astype(jnp.float32), extra['head_D'])
        logit_BT += extra['bias']
        token_BT = (batch['segments'] > 0).astype(jnp.float32)
        # -log sigmoid of the logit of what is true.
        bce = jnp.sum(token_BT * (jax.nn.softplus(logit_BT) - replaced_BT * logit_BT))
        right_BT = (logit_BT > 0) == replaced_BT

        n_tokens, n_masked = jnp.sum(token_BT), jnp.sum(masked_BT)
        # Each loss is a mean over its own tokens; the sums have one weight, that of all tokens.
        per_masked = n_tokens / jnp.maximum(n_masked, 1)
        return Loss(
            total=per_masked * written.total + self.weight * bce,
            weight=n_tokens,
            metrics={
                'generator_nll': per_masked * written.nll,
                'generator_accuracy': per_masked * written.correct,
                'detection': bce,
                'accuracy': jnp.sum(token_BT * right_BT),
                'replaced': jnp.sum(token_BT * replaced_BT),
            },
        )

    def loss_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch['segments']))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of generator and backbone, for a row that one text fills; not of the generator's head
        when it is sampled from."""
        backbone = features_flops(model, seq_len, causal=False) + TRAINING * model.dim
        predicted = self.masked(seq_len - 1)
        return backbone + decoder_flops(
            self.generator_of(model), seq_len, causal=False, predicted=predicted
        )

    def masked(self, n: int) -> int:
        """How many of `n` tokens are masked."""
        return max(1, round(self.rate * n))

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'replaced-token detection', encoder=False)
        self.generator_of(model)

    def generator_of(self, model: ModelConfig) -> ModelConfig:
        """Fewer heads of the same size, and the other widths in proportion."""
        heads = max(1, round(self.generator * model.heads))
        groups = model.heads // model.kv_heads
        return dataclasses.replace(
            model,
            dim=max(1, model.dim * heads // model.heads),
            base_dim=model.base_dim and max(1, model.base_dim * heads // model.heads),
            ffn=max(1, model.ffn * heads // model.heads),
            heads=heads,
            kv_heads=math.gcd(heads, max(1, heads // groups)),
            tied=True,
        )


def replace(
    target_BT: Int[Array, 'B T'], masked_BT: Float[Array, 'B T'], *, drawn_BT: Int[Array, 'B T']
) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
    """The text with the drawn tokens where it was masked, and which of them are other tokens than
    the text's: one that was guessed right counts as original."""
    input_BT = jnp.where(masked_BT > 0, drawn_BT, target_BT)
    return input_BT, input_BT != target_BT


def draw(
    x_BTD: Float[Array, 'B T D'], head_VD: Float[Array, 'V D'], key: jax.Array, padding: int = 0
) -> Int[Array, 'B T']:
    """A token for every position, drawn from the softmax of its logits; no gradient. The last
    `padding` rows of the vocabulary are no tokens.

    By one uniform number and the cumulated probabilities (Gumbel noise for every logit would take a
    fifth of a training step), of a part of each row at a time: [B, T, V] exists nowhere. The same
    tokens on every mesh.
    """
    B, T, D = x_BTD.shape
    x_BTD, head_VD = jax.lax.stop_gradient((x_BTD, head_VD))
    head_VD = layout.gather(head_VD.astype(x_BTD.dtype), 'VD')
    n = -(-T // DRAWN)
    size = -(-T // n)
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, n * size - T), (0, 0)))
    x_nBTD = jnp.moveaxis(x_BTD.reshape(B, n, size, D), 1, 0)

    def part(x_and_key: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BTD, key = x_and_key
        logit_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, head_VD, preferred_element_type=jnp.float32)
        uniform_BT = jax.random.uniform(key, (B, size), out_sharding=layout.act('BT'))
        return jax.shard_map(
            functools.partial(_inverse, padding=padding),
            in_specs=layout.rows(),
            out_specs=layout.rows(),
            check_vma=False,
        )(jax.reshard(logit_BTV, layout.rows()), jax.reshard(uniform_BT, layout.rows()))

    drawn_nBT = jax.lax.map(part, (x_nBTD, jax.random.split(key, n)))
    return jnp.moveaxis(drawn_nBT, 0, 1).reshape(B, n * size)[:, :T]


def _inverse(logit_BTV: jax.Array, uniform_BT: jax.Array, *, padding: int) -> jax.Array:
    """The token at which the cumulated probability passes `uniform_BT`, in [0, 1): first the block
    of tokens, then the one in it."""
    logit_BTV = logit_BTV[..., : logit_BTV.shape[-1] - padding]
    B, T, V = logit_BTV.shape
    weight_BTV = jnp.exp(logit_BTV - logit_BTV.max(axis=-1, keepdims=True))
    weight_BTV = jnp.pad(weight_BTV, ((0, 0), (0, 0), (0, -V % BLOCK)))
    weight_BTnV = weight_BTV.reshape(B, T, -1, BLOCK)
    total_BTn = weight_BTnV.sum(axis=-1)
    target_BT1 = (uniform_BT * total_BTn.sum(axis=-1))[..., None]
    block_BT1, target_BT1 = _passed(total_BTn, target_BT1)
    own_BT1V = jnp.take_along_axis(weight_BTnV, block_BT1[..., None], axis=2)
    token_BT1, _ = _passed(own_BT1V[:, :, 0], target_BT1)
    return jnp.minimum((block_BT1 * BLOCK + token_BT1)[..., 0], V - 1)


def _passed(weight_BTn: jax.Array, target_BT1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the sum of weights passes the target, and what of the target is left there."""
    sum_BTn = jnp.cumsum(weight_BTn, axis=-1)
    # Rounding may leave a target that no sum passes: the last one of any weight takes it.
    below_BTn = jnp.where(weight_BTn > 0, sum_BTn <= target_BT1, True)
    passed_BTn = ~below_BTn
    last_BT1 = weight_BTn.shape[-1] - 1 - jnp.argmax(weight_BTn[..., ::-1] > 0, -1, keepdims=True)
    at_BT1 = jnp.where(
        passed_BTn.any(axis=-1, keepdims=True),
        jnp.argmax(passed_BTn, axis=-1, keepdims=True),
        last_BT1,
    )
    before_BT1 = jnp.take_along_axis(sum_BTn - weight_BTn, at_BT1, axis=-1)
    return at_BT1.astype(jnp.int32), target_BT1 - before_BT1
