"""Group-relative policy optimisation (GRPO, Shao et al. 2024), as it was corrected since.

Letters of this file: P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import BadRecordError, Problem, Record
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.log_probs import log_probs
from llama_jax.objectives.prediction import check_architecture
from llama_jax.objectives.rollout import Drawn, Rollout, asked
from llama_jax.text.chat import ChatFormat, Conversation
from llama_jax.text.vocabulary import Vocabulary

EPS_LOW, EPS_HIGH = 0.2, 0.28
"""Of DAPO (Yu et al. 2025, section 3.1)."""
STD_FLOOR = 1e-4
"""Added to a standard deviation before it divides."""
REFERENCE = 'reference'
"""The array with log-probabilities under the reference."""


@dataclass(frozen=True)
class GRPO(Base):
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) of each token of a completion, and beta times
    its KL divergence from the reference.

    r is the token's probability over that at the time of the rollout, A the advantage of the
    completion: its reward less the mean of its group. On the first update of a rollout r is exactly
    1, for the probabilities at the time of the rollout are those of the same computation.
    """

    rollout: Rollout = Rollout()
    updates: int = 1
    """Of the parameters by each batch of completions; a step makes all of them."""
    normaliser: Literal['tokens', 'sequences', 'constant'] = 'tokens'
    """What the sum over tokens is divided by. 'tokens': all active ones of the global batch (DAPO).
    'sequences': each completion's tokens, and the number of completions (the paper's, which favours
    short right answers and long wrong ones). 'constant': completions x `rollout.max_tokens` (Dr.
    GRPO, Liu et al. 2025, who also have scale 'none')."""
    scale: Literal['group', 'batch', 'none'] = 'group'
    """What an advantage is divided by: the standard deviation of its group's rewards, of all of the
    batch, or nothing."""
    eps_low: float = EPS_LOW
    eps_high: float = EPS_HIGH
    """The ratio gains nothing outside of [1 - eps_low, 1 + eps_high]. Felt from the second of
    `updates` on."""
    beta: float = 0.0
    """Weight of the KL divergence from the parameters that the run began with: k3 = exp(d) - d - 1,
    d the reference's log-probability less the policy's (Schulman 2020)."""
    overlong: int = 0
    """Of the `max_tokens`, the last so many cost reward: 0 before them, falling in a line to -1 at
    the last (DAPO, equation 13). 0: none do."""
    mask_truncated: bool = False
    """Truncated completions bear no loss; their rewards count in their group all the same."""

    def __post_init__(self) -> None:
        if self.updates < 1:
            raise UserError(f'objective.updates is {self.updates}: it must be 1 or more')
        if not (0 < self.eps_low <= 1 and self.eps_high > 0):
            raise UserError(
                f'clipping to [1 - {self.eps_low}, 1 + {self.eps_high}]: set eps_low within (0, 1] '
                'and eps_high above 0'
            )
        if self.updates == 1 and (self.eps_low, self.eps_high) != (EPS_LOW, EPS_HIGH):
            raise UserError(
                'eps_low and eps_high have no effect on a single update, whose ratio is 1: set '
                '--objective.updates 2 or more, or leave them out'
            )
        if self.beta < 0:
            raise UserError(f'objective.beta is {self.beta}: it must be 0 or more')
        if not 0 <= self.overlong <= self.rollout.max_tokens:
            raise UserError(
                f'objective.overlong is {self.overlong}: it is a part of the '
                f'{self.rollout.max_tokens} of rollout.max_tokens'
            )

    @property
    def reads(self) -> type[Record]:
        return Problem

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """The prompt, as a model that answers reads it."""
        begin = () if vocabulary.bos_id is None else (vocabulary.bos_id,)
        if isinstance(record.prompt, str):
            ids = [*begin, *vocabulary.encode(record.prompt).tolist()]
        elif chat is None:
            raise UserError(
                'the model has no chat template, and prompts are chats: name one with --data.chat, '
                'such as chatml, or a file'
            )
        else:
            try:
                ids = chat.encode(Conversation(record.prompt), vocabulary, begin=begin)
            except UserError as error:
                raise BadRecordError(str(error)) from None
        if not ids:
            raise BadRecordError('the prompt is empty')
        tokens = np.array(ids, np.int32)
        return Encoded((tokens,), (np.zeros(len(tokens), np.float32),))

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        """The prompt and its longest completion."""
        (n,) = lengths
        return (n + self.rollout.max_tokens,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The prompt, whose beginning is cut off where it is too long, and room."""
        assert piece.encoded is not None
        (size,), (prompt,) = piece.sizes, piece.encoded.parts
        n = min(len(prompt), size - self.rollout.max_tokens)
        if n < 1:
            return None
        prompt = prompt[len(prompt) - n :]
        return asked(prompt, piece.origin, size=size, pad_id=tokenizer.pad_id)

    def blank(self, n: int) -> Example:
        names = ['weights', 'shares', 'advantages', 'log_probs']
        names += [REFERENCE] if self.beta else []
        return {
            **{name: np.zeros(n, np.int32) for name in ('inputs', 'targets')},
            **{name: np.zeros(n, np.float32) for name in names},
        }

    def completed(
        self, drawn: Sequence[Sequence[Drawn]], reward_PG: np.ndarray
    ) -> tuple[list[list[Example]], dict[str, float]]:
        length_PG = np.array([[len(one.tokens) for one in group] for group in drawn])
        penalty_PG = overlong(length_PG, most=self.rollout.max_tokens, last=self.overlong)
        advantage_PG = advantages(reward_PG + penalty_PG, self.scale)
        examples = [
            [self._example(one, advantage) for one, advantage in zip(group, row, strict=True)]
            for group, row in zip(drawn, advantage_PG, strict=True)
        ]
        equal_P = [len(set(row[np.isfinite(row)])) < 2 for row in reward_PG + penalty_PG]
        figures = {
            'equal_groups': float(np.mean(equal_P)),
            'completion_length': float(length_PG.mean()),
            'truncated': float(np.mean([one.truncated for group in drawn for one in group])),
        }
        return examples, figures | ({'overlong': float(penalty_PG.mean())} if self.overlong else {})

    def _example(self, one: Drawn, advantage: float) -> Example:
        """`weights` are what a token's loss is multiplied by, `shares` what it adds to the weight
        of the batch, by which the sum is divided."""
        n, m = len(one.prompt), len(one.tokens)
        ids = np.concatenate([one.prompt, one.tokens]).astype(np.int32)
        example = self.blank(n + m - 1)
        example['inputs'], example['targets'] = ids[:-1], ids[1:]
        active = float(not (self.mask_truncated and one.truncated))
        weight, share = {
            'tokens': (1.0, active),
            'sequences': (1 / m, 1 / m),
            'constant': (1 / self.rollout.max_tokens, 1 / m),
        }[self.normaliser]
        # By length, and not by what token it is: the end token may be the padding's as well.
        example['weights'][n - 1 :] = active * weight
        example['shares'][n - 1 :] = share
        example['advantages'][n - 1 :] = advantage
        example['log_probs'][n - 1 :] = one.log_probs * (share > 0)
        return example

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
        advantage_BT, share_BT = batch['advantages'], batch['shares']
        log_p_BT, own_BT = policy(
            model, batch, temperature=self.rollout.temperature, compute=compute
        )
        # Where no completion is, a log-probability is of padding, and its exponential may overflow.
        log_p_BT, own_BT = (jnp.where(share_BT > 0, x_BT, 0) for x_BT in (log_p_BT, own_BT))
        own_BT = jax.lax.stop_gradient(own_BT)
        first = 'old' not in batch
        old_BT = jax.lax.stop_gradient(log_p_BT) if first else batch['old']
        ratio_BT = jnp.exp(log_p_BT - old_BT)
        clipped_BT = jnp.clip(ratio_BT, 1 - self.eps_low, 1 + self.eps_high)
        loss_BT = -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
        metrics = {
            'entropy': -own_BT,
            'clipped_low': (ratio_BT < 1 - self.eps_low) & (advantage_BT < 0),
            'clipped_high': (ratio_BT > 1 + self.eps_high) & (advantage_BT > 0),
        }
        if self.beta:
            d_BT = batch[REFERENCE] - log_p_BT
            kl_BT = jnp.exp(d_BT) - d_BT - 1
            loss_BT += self.beta * kl_BT
            metrics['kl'] = kl_BT
        difference = jnp.max(jnp.abs(own_BT - batch['log_probs'])) if first else jnp.float32(0)
        return Loss(
            total=jnp.sum(batch['weights'] * loss_BT),
            weight=share_BT.sum(),
            metrics={name: jnp.sum(share_BT * x_BT) for name, x_BT in metrics.items()},
            largest={'logp_diff': difference},
            kept={'old': old_BT},
        )

    def loss_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch['weights']))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of the update; those of the rollout are not counted."""
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'policy optimisation', encoder=False)
        if model.dropout:
            raise UserError(
                'completions are drawn without dropout, and a policy with it is another one: set '
                '--model.dropout 0'
            )


def policy(
    model: Transformer, batch: Mapping[str, Any], *, temperature: float, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, T] of 'targets' at `temperature`, and at temperature 1."""
    x_BTD, _ = model.features(
        batch['inputs'],
        position_BT=batch['positions'],
        segment_BT=batch['segments'],
        compute=compute,
    )
    head_VD, padding = model.head()[...], model.config.vocab_padding
    own_BT = log_probs(x_BTD, head_VD, batch['targets'], padding)
    if temperature == 1:
        return own_BT, own_BT
    # Products with features that are divided are logits that are.
    return log_probs(x_BTD / temperature, head_VD, batch['targets'], padding), own_BT


def advantages(reward_PG: np.ndarray, scale: Literal['group', 'batch', 'none']) -> np.ndarray:
    """Rewards less the mean of their group, by `scale` over a standard deviation with Bessel's
    correction: float64 [P, G]. A reward that is NaN counts nowhere, and has the advantage 0."""
    counts_PG = np.isfinite(reward_PG)
    n_P1 = counts_PG.sum(axis=1, keepdims=True)
    mean_P1 = np.where(counts_PG, reward_PG, 0).sum(axis=1, keepdims=True) / np.maximum(n_P1, 1)
    less_PG = np.where(counts_PG, reward_PG - mean_P1, 0)
    # Of equal rewards the mean may be another number by a rounding, and would be amplified.
    least_P1 = np.where(counts_PG, reward_PG, np.inf).min(axis=1, keepdims=True)
    most_P1 = np.where(counts_PG, reward_PG, -np.inf).max(axis=1, keepdims=True)
    less_PG = np.where(least_P1 < most_P1, less_PG, 0)
    if scale == 'group':
        variance_P1 = np.square(less_PG).sum(axis=1, keepdims=True) / np.maximum(n_P1 - 1, 1)
        return less_PG / (np.sqrt(variance_P1) + STD_FLOOR)
    if scale == 'batch':
        rewards = reward_PG[counts_PG]
        return less_PG / ((rewards.std(ddof=1) if len(rewards) > 1 else 0.0) + STD_FLOOR)
    return less_PG


def overlong(length: np.ndarray, *, most: int, last: int) -> np.ndarray:
    """What the length of a completion costs, in tokens: 0 up to `most - last`, -1 at `most`, a line
    between them (Yu et al. 2025, equation 13)."""
    if not last:
        return np.zeros(length.shape)
    return -np.clip((length - (most - last)) / last, 0.0, 1.0)
