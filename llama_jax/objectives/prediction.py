"""Predicting tokens: what the objectives have in common whose loss is a cross-entropy of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from llama_jax.data.pieces import Example
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.patterns import Dense
from llama_jax.model.transformer import Transformer
from llama_jax.model.wanted import Wanted
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss
from llama_jax.objectives.flops import TRAINING, mean_keys, query
from llama_jax.objectives.softmax import cross_entropy

ENCODER = 'encoder'
"""Stream of what the encoder of an encoder-decoder reads."""

_LANES = 128
"""Of a TPU: fused attention takes lengths in multiples of it."""
_FEW_LAYERS = 8
"""At most, of models whose last layer is computed where there is loss alone."""


@dataclass(frozen=True)
class TokenPrediction(Base):
    """Cross-entropy of 'targets' of weight 'weights', given 'inputs' and what an example has of:

    'prefix': positions above 0 are seen by every query of their segment.
    'encoder/inputs': read by the encoder, whose output the segment of the decoder sees.
    """

    z_loss: float = 1e-4
    """Weight of log(Z)^2, which keeps the softmax's partition function near one."""

    sees_all: ClassVar[bool] = False
    """Whether every position sees its whole segment in training, and not what is before it."""
    in_front: ClassVar[bool] = False
    """Whether what bears no loss, where it is most, stands in front and sees itself alone."""
    in_order: ClassVar[bool] = False
    """Whether the targets are the tokens of the text as it stands, each told from those before it,
    and the loss is of them alone: a teacher that reads the text says something of each. It is of
    the class that says so, and not of those that are derived from it."""

    @property
    def lends(self) -> bool:
        return type(self).loss is TokenPrediction.loss

    def predicts(self, seq_len: int) -> int:
        """Tokens of a row that bear loss, where one text fills it; all, unless a class says so."""
        return seq_len

    def read(
        self,
        model: Transformer,
        batch: Batch,
        *,
        compute: Compute,
        key: jax.Array | None,
        wanted: Wanted | None = None,
    ) -> jax.Array:
        """What the model makes of the inputs [B, T, D], before its head; where it is `wanted`."""
        visible: dict[str, Any] = {'wanted': wanted}
        if self.sees_all:
            visible['causal'] = False
        if 'prefix' in batch:
            visible['prefix_BT'] = batch['prefix']
        if f'{ENCODER}/inputs' in batch:
            encoder_key, key = (None, None) if key is None else jax.random.split(key)
            visible['memory'] = model.encode(
                batch[f'{ENCODER}/inputs'],
                position_BS=batch[f'{ENCODER}/positions'],
                segment_BS=batch[f'{ENCODER}/segments'],
                compute=compute,
                key=encoder_key,
            )
        x_BTD, _ = model.features(
            batch['inputs'],
            position_BT=batch['positions'],
            segment_BT=batch['segments'],
            compute=compute,
            key=key,
            **visible,
        )
        return x_BTD

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
        x_BTD = context.features
        if x_BTD is None:
            most = self._room(model.config, batch['inputs'].shape[1])
            wanted = None if most is None else Wanted(batch['weights'] != 0, most)
            x_BTD = self.read(model, batch, compute=compute, key=key, wanted=wanted)
        sums = cross_entropy(
            *(x_BTD, model.head()[...], batch['targets'], batch['weights']),
            *(self.z_loss, model.config.vocab_padding),
        )
        return Loss(
            total=sums.total,
            weight=batch['weights'].sum(),
            metrics={'nll': sums.nll, 'accuracy': sums.correct},
        )

    def loss_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch['weights']))

    def skipped_flops(self, model: ModelConfig, seq_len: int) -> float:
        """FLOPs of forward and backward per position that the last layer does not take, as its
        output is read where there is loss alone."""
        if self._room(model, seq_len) is None or model.dropout:
            return 0.0
        left_out = seq_len - self.predicts(seq_len)
        keys = mean_keys(model, left_out if self.in_front else seq_len, causal=False)
        return TRAINING * query(model, keys) * left_out / seq_len

    def _room(self, model: ModelConfig, seq_len: int) -> int | None:
        """Places of a row for tokens that bear loss: a quarter more than one text has, for several
        are rounded each. None: for all. One layer of many is not worth its own program, which
        takes 4 GB more of a TPU for 16 layers of 2048; nor is one whose pattern a kernel computes
        by blocks of whole rows."""
        if model.layers > _FEW_LAYERS or model.pattern != Dense():
            return None
        most = -(-5 * self.predicts(seq_len) // 4)
        lanes = _LANES if seq_len >= 8 * _LANES else 2  # cuDNN takes an even number
        most = -(-most // lanes) * lanes
        return most if 2 * most <= seq_len else None


def predicted(inputs: np.ndarray, targets: np.ndarray) -> Example:
    """Example with weight on every target."""
    return {'inputs': inputs, 'targets': targets, 'weights': np.ones(len(targets), np.float32)}


def denoising(inputs: np.ndarray, targets: np.ndarray, *, tokenizer: Any, encoder: bool) -> Example:
    """Example of `targets` from `inputs`, both without begin token.

    With an encoder it reads `inputs`, and the decoder begins with a begin token. Without one, both
    stand in one stream, `inputs` as a prefix in full view: in either form len(inputs) and
    len(targets) positions.
    """
    decoder = {
        'inputs': np.concatenate([[tokenizer.bos_id], targets[:-1]]).astype(np.int32),
        'targets': targets.astype(np.int32),
        'weights': np.ones(len(targets), np.float32),
    }
    if encoder:
        return {f'{ENCODER}/inputs': inputs.astype(np.int32), **decoder}
    before = {
        'inputs': inputs.astype(np.int32),
        'targets': np.full(len(inputs), tokenizer.pad_id, np.int32),
        'weights': np.zeros(len(inputs), np.float32),
    }
    example = {key: np.concatenate([before[key], decoder[key]]) for key in decoder}
    example['prefix'] = np.repeat(np.array([1, 0], np.int32), [len(inputs), len(targets)])
    return example


def check_architecture(model: ModelConfig, objective: str, *, encoder: bool) -> None:
    """Raises UserError unless the model has an encoder exactly where the objective uses one."""
    if encoder and not model.encoder_layers:
        raise UserError(f'{objective} needs an encoder-decoder: set --model.encoder-layers above 0')
    if not encoder and model.encoder_layers:
        raise UserError(
            f'{objective} trains a decoder alone, and would leave the encoder untrained: set '
            '--model.encoder-layers 0'
        )


def in_lanes(inputs: int, seq_len: int) -> int:
    """Of a long row the share of one stream to the nearest 128, so that both it and the rest have
    fused attention; of a short one as it is."""
    if seq_len < 8 * _LANES or seq_len % _LANES:
        return inputs
    return min(max(round(inputs / _LANES) * _LANES, _LANES), seq_len - _LANES)
