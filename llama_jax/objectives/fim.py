"""Fill in the middle: a causal model of documents whose middle is moved to the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture
from llama_jax.objectives.prefix import pieces

SPARE = 16
"""Positions of a row that a piece of text leaves free: five control tokens, and what a text takes
more when it is encoded in three parts."""


@dataclass(frozen=True)
class FillInMiddle(TokenPrediction):
    """Likelihood of all sections of a document in an order of infilling (Bavarian et al. 2022).

    PSM: <prefix> P <suffix> S <middle> M <eom>. SPM: <prefix> <suffix> S <middle> P M <eom>. A
    document that is longer than a row is cut first, so that no part of an infilling stands in
    another row than the rest (context level, section 2.1 there). The two splits are uniform over
    the places between characters, and the parts are encoded each by itself. A piece that is not
    transformed is one of the causal example; at rate 0 all are, cut as objectives/prefix.py does.
    """

    rate: float = 0.5
    """Share of the pieces that are transformed."""
    spm: float = 0.5
    """Share of the transformed in the order suffix, prefix, middle."""

    def __post_init__(self) -> None:
        for share in (self.rate, self.spm):
            if not 0 <= share <= 1:
                raise UserError(f'a share of {share} must be in [0, 1]')

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Pieces of the document, cut between characters. One that would be longer than a row after
        all, or that is not text, stays causal."""
        if not self.rate:
            causal = pieces(tokens, tokenizer=tokenizer, size=seq_len)
            return [predicted(inputs, targets) for inputs, targets in causal]
        ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        examples = []
        places = cuts(tokens, tokenizer=tokenizer, size=max(seq_len - SPARE, (seq_len + 1) // 2))
        for start, stop in zip(places[:-1], places[1:], strict=True):
            inputs, targets = ids[start:stop], ids[start + 1 : stop + 1]
            if rng.random() < self.rate and len(text := tokens[start:stop]):
                moved = self._moved(text, tokenizer, rng)
                if moved is not None:
                    moved = moved if stop <= len(tokens) else [*moved, tokenizer.eos_id]
                    if len(moved) <= seq_len + 1:
                        row = np.array(moved, np.int32)
                        inputs, targets = row[:-1], row[1:]
            examples.append(predicted(inputs, targets))
        return examples

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'filling in the middle', encoder=False)

    def _moved(
        self, tokens: np.ndarray, tokenizer: Any, rng: np.random.Generator
    ) -> list[int] | None:
        """Begin token, sections and controls of a piece; None where it is not whole characters."""
        try:
            text = tokenizer.to_bytes(tokens).decode('utf-8')
        except UnicodeDecodeError:
            return None
        first, second = np.sort(rng.integers(0, len(text) + 1, 2))
        parts = text[:first], text[first:second], text[second:]
        prefix, middle, suffix = (tokenizer.encode(part, continues=True) for part in parts)
        control = tokenizer.control
        if rng.random() < self.spm:
            order = [*suffix, control['<middle>'], *prefix, *middle]
            head = [control['<prefix>'], control['<suffix>']]
        else:
            order = [*prefix, control['<suffix>'], *suffix, control['<middle>'], *middle]
            head = [control['<prefix>']]
        return [tokenizer.bos_id, *head, *order, control['<eom>']]


def predicted(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Example with weight on every target."""
    return {'inputs': inputs, 'targets': targets, 'weights': np.ones(len(targets), np.float32)}


def cuts(tokens: np.ndarray, *, tokenizer: Any, size: int) -> list[int]:
    """Places between which the pieces of a document lie, the end token counted as its last: equal
    pieces of at most `size` tokens and the few that complete a character."""
    data = np.frombuffer(tokenizer.to_bytes(tokens), np.uint8)
    before = np.concatenate([[0], np.cumsum(tokenizer.byte_lengths[tokens])])
    end = len(tokens) + 1
    n = -(-end // size)
    places = [0]
    for k in range(1, n):
        place = k * end // n
        # A byte 10xxxxxx is the inside of a character in UTF-8.
        while place < len(tokens) and data[before[place]] & 0xC0 == 0x80:
            place += 1
        if place > places[-1]:
            places.append(place)
    return [*places, end] if places[-1] < end else places
