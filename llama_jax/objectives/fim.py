"""Fill in the middle: a causal model of documents whose middle is moved to the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import (
    LEFT_TO_RIGHT,
    Infill,
    Middle,
    Reading,
    asking,
    weighted_at,
)
from llama_jax.objectives.flops import decoder_flops
from llama_jax.objectives.prediction import TokenPrediction, check_architecture, predicted

CONTROLS = 4
"""Positions of the control tokens of a transformed piece."""
GROWTH = 5
"""Positions for what a text takes more when it is encoded in three parts. BPE takes more than that
for 1 of 100 pairs of places to split at, unigram for 8."""
TRIES = 16
"""Pairs of places that are drawn until one fits."""


@dataclass(frozen=True)
class FillInMiddle(TokenPrediction):
    """Likelihood of all sections of a document in an order of infilling (Bavarian et al. 2022).

    PSM: <prefix> P <suffix> S <middle> M <eom>. SPM: <prefix> <suffix> S <middle> P M <eom>. It is
    pieces of documents that are transformed, so that no part of an infilling stands in another row
    than the rest (context level, section 2.1 there). The two splits are uniform over the places
    between characters, and the parts are encoded each by itself. What the piece has of characters
    that it cuts stays where it is, at the front of the prefix and at the end of the suffix. A piece
    that is not transformed is that of causal language modelling.
    """

    rate: float = 0.5
    """Share of the pieces that are transformed."""
    spm: float = 0.5
    """Share of the transformed in the order suffix, prefix, middle."""

    @property
    def marks(self) -> bool:
        return self.rate > 0

    def __post_init__(self) -> None:
        for share in (self.rate, self.spm):
            if not 0 <= share <= 1:
                raise UserError(f'a share of {share} must be in [0, 1]')

    @property
    def ends(self) -> bool:
        return True

    @property
    def reading(self) -> Reading:
        if not self.rate:  # it has never seen the marks
            return LEFT_TO_RIGHT
        first: Literal['prefix', 'suffix'] = 'suffix' if self.spm == 1 else 'prefix'
        return LEFT_TO_RIGHT._replace(
            middle=asking('exact', self._between), infill=Infill(self._between, 'mark', first)
        )

    def _between(self, text: Middle, tokenizer: Any) -> Example:
        """Both sides before the middle, by the marks; PSM unless only SPM was trained."""
        control, bos = tokenizer.control, [tokenizer.bos_id]
        if self.spm == 1:
            head = [*bos, control['<prefix>'], control['<suffix>'], *text.suffix]
            head += [control['<middle>'], *text.prefix]
        else:
            head = [*bos, control['<prefix>'], *text.prefix, control['<suffix>'], *text.suffix]
            head += [control['<middle>']]
        ids = np.array([*head, *text.middle], np.int32)
        return weighted_at(ids[:-1], ids[1:], start=len(head) - 1, n=len(text.middle))

    def lengths(self, seq_len: int) -> dict[str, int]:
        if self.rate and seq_len <= CONTROLS + GROWTH:
            raise UserError(
                f'a row of {seq_len} positions has no room for a text and the {CONTROLS + GROWTH} '
                'that its transformation takes: raise the sequence length'
            )
        return super().lengths(seq_len)

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return (n + CONTROLS + GROWTH if draw < self.rate else n,)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """A piece that has no text, or is longer than `piece.sizes` wherever it is split, stays
        causal."""
        if piece.draw < self.rate:
            moved = self._moved(piece, tokenizer, rng)
            if moved is not None:
                return predicted(moved[:-1], moved[1:])
        return predicted(*piece.predicted(tokenizer))

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return decoder_flops(model, seq_len, causal=True)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'filling in the middle', encoder=False)

    def _moved(self, piece: Piece, tokenizer: Any, rng: np.random.Generator) -> np.ndarray | None:
        """Begin token, sections and controls, and the end token where the document ends."""
        ids = piece.text
        if not len(ids):
            return None
        names = '<prefix>', '<suffix>', '<middle>', '<eom>'
        P, S, M, eom = ([tokenizer.control[name]] for name in names)
        end = [tokenizer.eos_id] if piece.stop > len(piece.tokens) else []
        before, text, after = whole_characters(ids, tokenizer=tokenizer)
        spm = rng.random() < self.spm
        for _ in range(TRIES):
            first, second = np.sort(rng.integers(0, len(text) + 1, 2))
            parts = text[:first], text[first:second], text[second:]
            prefix, middle, suffix = (tokenizer.encode(part, continues=True) for part in parts)
            prefix, suffix = np.concatenate([before, prefix]), np.concatenate([suffix, after])
            order = [P, S, suffix, M, prefix, middle] if spm else [P, prefix, S, suffix, M, middle]
            moved = np.concatenate([[tokenizer.bos_id], *order, eom, end])
            if len(moved) <= piece.sizes[0] + 1:
                return moved.astype(np.int32)
        return None


def whole_characters(tokens: np.ndarray, *, tokenizer: Any) -> tuple[np.ndarray, str, np.ndarray]:
    """Tokens with the rest of a character that begins before them all, the text of those that are
    whole characters, and tokens with the beginning of a character that ends after them all.

    Of bytes that are no UTF-8 no text is made: they all come first.
    """
    data = tokenizer.to_bytes(tokens)
    try:
        return tokens[:0], data.decode(), tokens[:0]
    except UnicodeDecodeError:
        pass
    start = np.concatenate([[0], np.cumsum(tokenizer.byte_lengths[tokens])])  # of each, in bytes
    # In UTF-8 a byte 10xxxxxx is the inside of a character.
    begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    places = np.flatnonzero(np.append(begins, True)[start])  # between tokens and characters
    whole = len(data)
    if begins.any():
        last = int(np.flatnonzero(begins)[-1])
        length = sum(data[last] >= least for least in (0, 0xC0, 0xE0, 0xF0))
        whole = last if last + length > whole else whole
    first = int(places[0])
    after = max(first, *places[start[places] <= whole].tolist(), 0)
    try:
        return tokens[:first], data[start[first] : start[after]].decode(), tokens[after:]
    except UnicodeDecodeError:
        return tokens, '', tokens[:0]
