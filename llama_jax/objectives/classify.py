"""Classification: a linear head on what the backbone makes of a text.

Letters of this file: M places for a text in a row, C classes.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llama_jax import layout
from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import BadRecordError, Labelled, Record
from llama_jax.errors import UserError
from llama_jax.model.block import drop
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.initial import fan_in
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.model.width import width_of
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss
from llama_jax.objectives.contrastive import at_places, places, places_in
from llama_jax.objectives.flops import TRAINING, features_flops, layer, mean_keys
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

MOST_NAMED = 20
"""Labels that a message names."""


@dataclass(frozen=True)
class Classification(Base):
    """Cross-entropy of the label of a text, or of a pair of texts.

    A text stands between a begin and an end token; a second one follows behind the first's end, and
    has an end of its own. Of an encoder-decoder the encoder is read. The head is a matrix without
    bias, as that of `LlamaForSequenceClassification` of transformers. Texts are packed, each seen
    by itself. The loss is a mean over texts by the weights of their classes; so is the accuracy,
    which for balanced classes is the mean of the classes' own.
    """

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's columns. (): those of the training split,
    sorted; see `filled`."""
    pool: Literal['last', 'mean', 'first'] = 'last'
    """The position that is read: the end token, the mean of all, or the begin token, which has to
    see the text."""
    bidirectional: bool = False
    """Every token of a decoder sees the whole text. False: those before it, as in a causal
    model."""
    dropout: float = 0.0
    """Of what the head reads."""
    balance: Literal['none', 'balanced', 'given'] = 'none'
    """Weights of classes. 'balanced': texts / (classes x texts of the class)."""
    class_weights: tuple[float, ...] = ()
    """One for each of `labels`, where `balance` is 'given'. Balanced ones are recorded here."""

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise UserError(f'the labels {_named(self.labels)} have one twice: name each once')
        if not 0 <= self.dropout < 1:
            raise UserError(
                f'--objective.dropout {self.dropout}: that of the head must be in [0, 1)'
            )
        weights = self.class_weights
        if self.balance == 'none' and weights:
            raise UserError("class weights have no effect where balance is 'none': set it to given")
        if self.balance == 'given' and not (weights and len(weights) == len(self.labels)):
            raise UserError(
                f'{len(weights)} class weights for {len(self.labels)} labels: give the labels, and '
                'a weight for each'
            )
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UserError(f'the class weights {weights} must be positive')

    @property
    def reads(self) -> type[Record]:
        return Labelled

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def encoding(self) -> tuple[Any, ...]:
        return (self.labels,)

    def filled(self, records: Iterable[Labelled]) -> Classification:
        """With the labels, and the weights of classes where they are to be balanced, of the records
        of a training split. Raises UserError where there are less than two classes."""
        counts = Counter(record.label for record in records)
        labels = self.labels or tuple(sorted(counts))
        if len(counts) < 2:
            raise UserError(
                f'all texts of the training split have the label {_named(counts)}: there is '
                'nothing to tell apart; give texts of two classes or more'
            )
        for name in counts:
            self._check(name, labels)
        weights = self.class_weights
        if self.balance == 'balanced':
            for name in labels:
                if not counts[name]:
                    raise UserError(
                        f'no text of the training split has the label {name!r}, so that classes '
                        'cannot be balanced: take it out of --objective.labels'
                    )
            n = sum(counts.values())
            weights = tuple(n / (len(labels) * counts[name]) for name in labels)
        return dataclasses.replace(self, labels=labels, class_weights=weights)

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """Each text with what stands before it. Raises BadRecordError for a label that the head
        does not know, and for an empty text."""
        try:
            self._check(record.label, self.labels)
        except UserError as error:
            raise BadRecordError(str(error)) from None
        texts = {'text': record.text}
        if record.other is not None:
            texts['other'] = record.other
        parts = []
        before = vocabulary.bos_id
        for name, text in texts.items():
            if not text.strip():
                raise BadRecordError(f'{name} is empty')
            ids = vocabulary.encode(text)
            parts.append(np.array([*([] if before is None else [before]), *ids], np.int32))
            before = vocabulary.eos_id
        index = self.labels.index(record.label)
        weights = tuple(np.ones(len(part), np.float32) for part in parts)
        return Encoded(tuple(parts), weights, float(index))

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes:
        return (sum(lengths) + 1,)

    def segments(self, seq_len: int) -> int:
        """Places for texts, each of which the head reads."""
        return places_in(seq_len)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The text with its end, and at every position its label and the weight of its class. Where
        a row is too short, the longest text loses its end."""
        assert piece.encoded is not None
        parts = shortened(piece.encoded.parts, piece.sizes[0] - 1)
        ids = np.concatenate([*parts, [tokenizer.eos_id]]).astype(np.int32)
        label = int(piece.encoded.number)
        weight = self.class_weights[label] if self.class_weights else 1.0
        return {
            'inputs': ids,
            'label': np.full(len(ids), label, np.int32),
            'weights': np.full(len(ids), weight, np.float32),
        }

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {'head_DC': fan_in(key, (model.dim, len(self.labels)), width_of(model).base)}

    def logits(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None = None,
    ) -> Float[Array, 'B M C']:
        """Float32 logits of the text in each place; those of places without a text mean nothing."""
        model_key, head_key = (None, None) if key is None else jax.random.split(key)
        token_BT, position_BT, segment_BT = (
            batch[name] for name in ('inputs', 'positions', 'segments')
        )
        if model.config.encoder_layers:
            x_BTD = model.encode(
                token_BT,
                position_BS=position_BT,
                segment_BS=segment_BT,
                compute=compute,
                key=model_key,
            ).x_BSD
        else:
            x_BTD, _ = model.features(
                token_BT,
                position_BT=position_BT,
                segment_BT=segment_BT,
                causal=self.causal,
                compute=compute,
                key=model_key,
            )
        place_BMT = places(segment_BT)
        n_BM1 = jnp.sum(place_BMT, axis=-1, keepdims=True)
        if self.pool == 'mean':
            read_BMT = place_BMT / jnp.maximum(n_BM1, 1)
        else:
            at_BM1 = 0 if self.pool == 'first' else n_BM1 - 1
            read_BMT = place_BMT & (position_BT[:, None] == at_BM1)
        x_BMD = jnp.einsum(
            'BMT,BTD->BMD',
            read_BMT.astype(jnp.float32),
            x_BTD.astype(jnp.float32),
            precision='highest',  # it picks a position, which has to come out as it is
        )
        x_BMD = drop(x_BMD, self.dropout, head_key)
        head_DC = layout.gather(extra['head_DC'], 'DC')
        return jnp.einsum('BMD,DC->BMC', x_BMD, head_DC)

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
        logit_BMC = self.logits(model, batch, extra=extra, compute=compute, key=key)
        place_BMT = places(batch['segments'])
        label_BM, weight_BM = (at_places(batch[name], place_BMT) for name in ('label', 'weights'))
        is_label_BMC = label_BM[..., None] == jnp.arange(len(self.labels))
        log_BMC = jax.nn.log_softmax(logit_BMC)
        nll_BM = -jnp.sum(jnp.where(is_label_BMC, log_BMC, 0), axis=-1)
        right_BM = jnp.argmax(logit_BMC, axis=-1) == label_BM
        return Loss(
            total=jnp.sum(weight_BM * nll_BM),
            weight=jnp.sum(weight_BM),
            metrics={'accuracy': jnp.sum(weight_BM * right_BM)},
        )

    def loss_tokens(self, batch: Batch) -> int:
        """Texts: the loss has one term for each."""
        return int(batch['segments'].max(axis=1).sum())

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Without the head, which reads one position of a text."""
        if model.encoder_layers:
            keys = mean_keys(model, seq_len, causal=False)
            return TRAINING * model.encoder_layers * layer(model, keys)
        return features_flops(model, seq_len, causal=self.causal)

    def check(self, model: ModelConfig) -> None:
        if not self.labels:
            raise UserError(
                'the labels of the classification are not known: name them by --objective.labels'
            )
        if len(self.labels) < 2:
            raise UserError(
                f'one class only, {_named(self.labels)}: there is nothing to tell apart; give two '
                'labels or more'
            )
        if model.encoder_layers and model.base_dim:
            raise UserError(
                'model.base_dim carries no rate over to a head upon an encoder: set '
                '--model.base-dim 0, and tune the rate at this width'
            )
        if model.encoder_layers and self.bidirectional:
            raise UserError(
                'bidirectional has no effect on an encoder, which sees all of a text: leave it out'
            )
        if self.pool == 'first' and self.causal and not model.encoder_layers:
            raise UserError(
                'the first token of a causal model sees nothing of the text: set --objective.pool '
                'last or mean, or --objective.bidirectional'
            )

    def _check(self, label: str, labels: tuple[str, ...]) -> None:
        if label not in labels:
            raise UserError(f'the label {label!r} is none of {_named(labels)}')


def shortened(parts: tuple[np.ndarray, ...], room: int) -> list[np.ndarray]:
    """Parts of `room` tokens in all at most: the longest loses its end first."""

    def total(most: int) -> int:
        return sum(min(len(part), most) for part in parts)

    if sum(map(len, parts)) <= room:
        return list(parts)
    most = bisect.bisect_right(range(room + 1), room, key=total) - 1
    return [part[:most] for part in parts]


def _named(labels: Iterable[str]) -> str:
    labels = list(labels)
    more = f' and {len(labels) - MOST_NAMED} more' if len(labels) > MOST_NAMED else ''
    return ', '.join(map(repr, labels[:MOST_NAMED])) + more
