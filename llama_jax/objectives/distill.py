"""Distillation: a model learns from the probabilities of another one (Hinton et al. 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import Record
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import Reading
from llama_jax.objectives.base import ALONE, Base, Batch, Context, Loss, Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.kl import Mix, Online, TopK, distilled, top_k
from llama_jax.objectives.prediction import TokenPrediction
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

TEACHER = 'teacher'
"""Of `extra`: the teacher that runs beside the model."""
IDS, LOG_PROBS, REST = 'top_ids', 'top_log_probs', 'rest_log_probs'
"""Arrays with what a teacher said before: [n, k], [n, k], [n]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Teacher:
    """Parameters that are not trained, and the model that computes with them."""

    params: Params
    config: ModelConfig = field(metadata={'static': True})

    def model(self) -> Transformer:
        return layers.bind(self.config, self.params)


@dataclass(frozen=True)
class Distillation(Base):
    """alpha T^2 KL(teacher || student) at the temperature T, and (1 - alpha) times the loss of
    `task`, over the tokens that bear its loss, with their weights. It reads what `task` reads.
    """

    teacher: str
    """RUN, RUN@STEP, RUN@best, or weights of others, as `start`. Its vocabulary is the model's."""
    task: Objective = CausalLM()
    """One that predicts every token of a text in order, such as causal or instruct."""
    temperature: float = 1.0
    """Both distributions are flattened by it; T^2 keeps the gradient's size."""
    alpha: float = 0.5
    """Share of the divergence; 1 learns from the teacher alone."""
    top_k: int = 0
    """The teacher reads all data once, before the first step, and its k most likely tokens are kept
    on disk, 8 k + 4 bytes a token: a step then costs what it costs without a teacher. All other
    tokens count as one outcome. Each text is read from its beginning, in pieces as long as a row.
    0: the teacher runs in each step, with every token."""

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f'--objective.temperature is {self.temperature}: it must be positive')
        if not 0 < self.alpha <= 1:
            raise UserError(
                f'--objective.alpha is {self.alpha}: it is the share of the teacher, above 0 and '
                'at most 1'
            )
        if self.top_k < 0:
            raise UserError(f'--objective.top-k is {self.top_k}: it must be 0 or more')
        if not self.teacher:
            raise UserError('--objective.teacher names nothing: give a RUN or weights of others')
        if not vars(type(self.task)).get('in_order'):
            raise UserError(
                f'a teacher says nothing of {type(self.task).__name__}: --objective.task is one '
                'that predicts every token of a text in order, such as causal or instruct'
            )

    @property
    def _predicting(self) -> TokenPrediction:
        assert isinstance(self.task, TokenPrediction)
        return self.task

    @property
    def reads(self) -> type[Record]:
        return self.task.reads

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        return self.task.encoded(record, vocabulary=vocabulary, chat=chat)

    @property
    def chats(self) -> bool:
        return self.task.chats

    @property
    def encoding(self) -> tuple[Any, ...]:
        return self.task.encoding

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        return self.task.whole(lengths, seq_len=seq_len)

    @property
    def ends(self) -> bool:
        return self.task.ends

    @property
    def causal(self) -> bool:
        return self.task.causal

    @property
    def marks(self) -> bool:
        return self.task.marks

    @property
    def has_likelihood(self) -> bool:
        return self.task.has_likelihood

    @property
    def reading(self) -> Reading:
        return self.task.reading

    def lengths(self, seq_len: int) -> dict[str, int]:
        return self.task.lengths(seq_len)

    def segments(self, seq_len: int) -> int:
        return self.task.segments(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return self.task.sizes(n, seq_len=seq_len, draw=draw)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """That of `task`, and what the teacher said of each of its targets, where that is given:
        float32 [units of the document, 2 k + 1]."""
        example = self.task.example(piece, tokenizer=tokenizer, seq_len=seq_len, rng=rng)
        if example is None or piece.given is None:
            return example
        n, k = len(example['targets']), self.top_k
        said = piece.given[piece.start : piece.start + n]
        return {
            **example,
            IDS: said[:, :k].astype(np.int32),  # exact below 2^24
            LOG_PROBS: said[:, k : 2 * k],
            REST: said[:, 2 * k],
        }

    def said(self, teacher: Transformer, batch: Batch, *, compute: Compute) -> TopK:
        """What the teacher says of a batch, to be kept."""
        x_BTD = self._predicting.read(teacher, batch, compute=compute, key=None)
        return top_k(
            x_BTD,
            teacher.head()[...],
            k=self.top_k,
            temperature=self.temperature,
            padding=teacher.config.vocab_padding,
        )

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
        x_BTD = self._predicting.read(model, batch, compute=compute, key=key)
        teacher: Online | TopK
        if not (IDS in batch if self.top_k else TEACHER in extra):
            raise UserError(
                'there is no teacher here: only a run, which finds it before its first step, has '
                'the loss of a distillation'
            )
        if self.top_k:
            teacher = TopK(batch[IDS], batch[LOG_PROBS], batch[REST])
        else:
            other = extra[TEACHER].model()
            their_x_BTD = self._predicting.read(other, batch, compute=compute, key=None)
            teacher = Online(*jax.lax.stop_gradient((their_x_BTD, other.head()[...])))
        sums = distilled(
            *(x_BTD, model.head()[...], batch['targets'], batch['weights'], teacher),
            Mix(self.alpha, self.temperature, self._predicting.z_loss, model.config.vocab_padding),
        )
        metrics = {'nll': sums.nll, 'accuracy': sums.correct, 'kl': sums.kl}
        return Loss(sums.total, batch['weights'].sum(), metrics)

    def loss_tokens(self, batch: Batch) -> int:
        return self.task.loss_tokens(batch)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of the student alone; train/teacher.py knows those of the teacher."""
        return self.task.flops(model, seq_len)

    def check(self, model: ModelConfig) -> None:
        self.task.check(model)
        if model.vocab and self.top_k > model.ids:
            raise UserError(
                f'--objective.top-k {self.top_k} is more than the {model.ids} tokens that there '
                'are: lower it, or set 0 for all of them'
            )
