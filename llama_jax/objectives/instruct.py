"""Instruction tuning: the assistant's turns of chats are learnt, all else is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from llama_jax.data.pieces import Encoded, Example, Piece, Sizes
from llama_jax.data.record import BadRecordError, Chat, Record
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture
from llama_jax.text.chat import ChatFormat, Conversation
from llama_jax.text.turns import VERSION, Turns
from llama_jax.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class InstructionTuning(TokenPrediction):
    """Likelihood of the turns of messages of positive weight, the tokens that end them included
    (Ouyang et al. 2022, section 3.5, on whole chats).

    A chat is written by the model's own template, ids as `apply_chat_template` of transformers has
    them, and packed whole. The loss is a mean over all learnt tokens of the global batch, each
    times the weight of its message: a long answer counts for more than a short one.
    """

    z_loss: float = 0.0
    answers: Literal['all', 'last'] = 'all'
    """'last': of a chat only its last learnt message is. For templates that drop the reasoning of
    earlier answers (Qwen3, DeepSeek), which could else be learnt without it."""

    in_order: ClassVar[bool] = True

    @property
    def reads(self) -> type[Record]:
        return Chat

    @property
    def encoding(self) -> tuple[Any, ...]:
        return self.answers, VERSION

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        """One part: the chat. Raises BadRecordError for a chat that the template refuses or changes
        where it is learnt, and for one without an answer."""
        learnt = [i for i, weight in enumerate(record.weights) if weight > 0]
        if not learnt:
            raise BadRecordError(
                'no message is learnt: none is of the assistant with weight above 0'
            )
        last = len(record.messages) - 1
        role = record.messages[last].get('role')
        if role != 'assistant' and last not in learnt:
            raise BadRecordError(
                f'the chat ends with a message of the {role}, which nobody answers: add the answer '
                'or leave the message out'
            )
        if self.answers == 'last':
            learnt = learnt[-1:]
        found = turns_in(
            record.messages, learnt, tools=record.tools, vocabulary=vocabulary, chat=chat
        )
        # The last entry is that of tokens which are in no turn.
        weight_N = np.array([*record.weights, 0], np.float32)
        return Encoded((found.ids,), (weight_N[found.message],))

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        return (lengths[0] - 1,) if lengths[0] > 1 else None

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """Each token before the one to predict; None where none that is learnt is left."""
        assert piece.encoded is not None
        (ids,), (weights,) = piece.encoded.parts, piece.encoded.weights
        return following(ids, weights, piece.sizes[0])

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """As if every token were learnt: what share is depends on the chats."""
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'instruction tuning', encoder=False)


def turns_in(
    messages: Sequence[Any],
    learnt: Sequence[int],
    *,
    vocabulary: Vocabulary,
    chat: ChatFormat | None,
    tools: Sequence[Any] = (),
) -> Turns:
    """The tokens of a chat in a model's format, and which of them are the turns of `learnt`.

    Raises BadRecordError for what the format does not write, UserError where there is none.
    """
    if chat is None:
        raise UserError(
            'the model has no chat template, and chats are to be learnt: name one with '
            '--data.chat, such as chatml, or a file with one'
        )
    # What this project puts before a prompt; a template writes its begin token itself.
    begin = () if vocabulary.bos_id is None else (vocabulary.bos_id,)
    try:
        conversation = Conversation(messages, add_generation_prompt=False, tools=tools or None)
        return chat.turns(conversation, vocabulary, learnt=learnt, begin=begin)
    except UserError as error:
        raise BadRecordError(str(error)) from None


def following(ids: np.ndarray, weights: np.ndarray, size: int) -> Example | None:
    """The example of `size` positions in which each token of `ids` predicts the next one, whose
    weight it has; None where all weights are 0."""
    if not weights[1 : size + 1].any():
        return None
    return {
        'inputs': ids[:size].astype(np.int32),
        'targets': ids[1 : size + 1].astype(np.int32),
        'weights': weights[1 : size + 1].astype(np.float32),
    }
