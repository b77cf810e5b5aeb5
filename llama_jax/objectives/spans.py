"""Span corruption: spans of the text are replaced by sentinels and predicted (T5, Raffel et al.
2020, section 3.1.4)."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import Infill, Middle, Reading, asking, weighted_at
from llama_jax.objectives.flops import encoder_decoder_flops, prefix_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
    in_lanes,
)

SENTINELS = 128
"""Sentinels of every tokenizer here, and so the most spans in a text."""


@dataclass(frozen=True)
class Spans:
    """How much of a text is noise, and in spans of which mean length."""

    density: float
    mean_span: float

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise UserError(f'the density {self.density} of noise must be in (0, 1)')
        if self.mean_span < 1:
            raise UserError(f'a mean span of {self.mean_span} tokens must be 1 or more')

    def counts(self, length: int) -> tuple[int, int]:
        """Tokens of noise, and spans of it, in `length` tokens, 2 or more.

        noise = clip(round(length density), 1, length - 1), spans = max(round(noise / mean_span), 1)
        and no more than tokens are kept, for each span has kept text before it.
        """
        return _counts(length, self.density, self.mean_span)

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of inputs, kept - noise + spans, and of targets, noise + spans + 1, in which a
        text of `length` tokens ends up. Neither falls as the length grows."""
        noise, spans = self.counts(length)
        return length - noise + spans, noise + spans + 1

    def mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Where noise is, bool [length]: never at the first token, always at the last.

        Kept text and noise are each cut into equally many parts, every way of cutting being as
        likely as another, and the parts alternate, kept text first.
        """
        noise, spans = self.counts(length)
        parts = np.empty(2 * spans, np.int64)
        parts[0::2] = segmentation(length - noise, spans, rng)
        parts[1::2] = segmentation(noise, spans, rng)
        return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


@dataclass(frozen=True)
class SpanCorruption(TokenPrediction):
    """Kept text with a sentinel for each span -> each sentinel with its span, and an end token.

    Of a piece of L tokens inputs and targets are L + 2 spans + 1. A piece of one token cannot be
    corrupted, nor one whose spans outnumber the sentinels.
    """

    density: float = 0.15
    mean_span: float = 3.0
    encoder: bool = False
    """Inputs to the encoder of an encoder-decoder. False: inputs and targets in one stream, the
    inputs in full view."""

    in_front: ClassVar[bool] = True

    @property
    def marks(self) -> bool:
        return True

    def __post_init__(self) -> None:
        self._spans()

    @property
    def causal(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        asked = asking('exact', self._between)
        return Reading(
            rest=asked, middle=asked, infill=Infill(self._between, 'mark'), begins=self.encoder
        )

    def _between(self, text: Middle, tokenizer: Any) -> Example:
        return one_span(text, tokenizer, encoder=self.encoder)

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Of an encoder-decoder: each as long as the longest text that fits both makes it."""
        inputs = self._inputs(seq_len)
        return {ENCODER: inputs, '': seq_len - inputs} if self.encoder else {'': seq_len}

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        sizes = corrupted_sizes(n, self.density, self.mean_span)
        return sizes if self.encoder or sizes is None else (sum(sizes),)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        text = piece.text
        if len(text) < 2:
            return None
        inputs, targets = corrupt(text, self._spans().mask(len(text), rng), tokenizer=tokenizer)
        return denoising(inputs, targets, tokenizer=tokenizer, encoder=self.encoder)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills."""
        inputs = self._inputs(seq_len)
        if self.encoder:
            return encoder_decoder_flops(model, inputs, seq_len - inputs)
        predicted = self.predicts(seq_len)
        whole = prefix_flops(model, seq_len, prefix=inputs, predicted=predicted)
        return whole - self.skipped_flops(model, seq_len)

    def predicts(self, seq_len: int) -> int:
        return seq_len if self.encoder else seq_len - self._inputs(seq_len)

    def check(self, model: ModelConfig) -> None:
        name = f'span corruption with encoder={self.encoder}'
        check_architecture(model, name, encoder=self.encoder)

    def _spans(self) -> Spans:
        return Spans(self.density, self.mean_span)

    def _inputs(self, seq_len: int) -> int:
        """Tokens of the inputs of the longest text that fits a row with its targets, about."""
        spans = self._spans()

        def too_long(length: int) -> bool:
            return sum(spans.sizes(length)) > seq_len

        longest = bisect.bisect_left(range(seq_len + 1), True, lo=2, key=too_long) - 1
        if longest < 2:
            raise no_room(seq_len)
        inputs = spans.sizes(longest)[0]
        return in_lanes(inputs, seq_len) if self.encoder else inputs


@functools.lru_cache(maxsize=1 << 16)
def _counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


@functools.lru_cache(maxsize=1 << 16)
def corrupted_sizes(n: int, density: float, mean_span: float) -> tuple[int, int] | None:
    """`Spans.sizes` where `n` tokens can be corrupted: packing asks for them all the time."""
    if n < 2 or _counts(n, density, mean_span)[1] > SENTINELS:
        return None
    return Spans(density, mean_span).sizes(n)


def no_room(seq_len: int) -> UserError:
    """Of a row that is too short for any corrupted text."""
    return UserError(
        f'a row of {seq_len} positions has no room for a corrupted text and its targets: raise '
        'the sequence length'
    )


def segmentation(n: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes, 1 or more and `n` in all, of `parts` parts: uniform over all ways."""
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=n)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, *, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs: a sentinel in place of each run of the mask. Targets: each sentinel, then what it
    stands for; at the end an end token. Sentinels are taken in order, ids counting down."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    n = int(first.sum())
    if n > len(tokenizer.sentinel_ids):
        raise UserError(
            f'{n} spans in {len(tokens)} tokens, and {len(tokenizer.sentinel_ids)} sentinels: '
            'lower the density, or raise the mean span'
        )
    sentinels = np.array(tokenizer.sentinel_ids[:n], np.int32)
    inputs = tokens.astype(np.int32)
    inputs[first] = sentinels
    targets = np.insert(tokens[mask], np.flatnonzero(first[mask]), sentinels)
    return inputs[first | ~mask], np.append(targets, tokenizer.eos_id).astype(np.int32)


def one_span(text: Middle, tokenizer: Any, *, encoder: bool, before: Sequence[int] = ()) -> Example:
    """The middle of a text as the one corrupted span, `before` in front of the inputs."""
    tokens = np.concatenate(text).astype(np.int32)
    start, end = len(text.prefix), len(text.prefix) + len(text.middle)
    place = np.arange(len(tokens))
    inputs, targets = corrupt(tokens, (start <= place) & (place < end), tokenizer=tokenizer)
    inputs = np.concatenate([np.array(before, np.int32), inputs])
    example = denoising(inputs, targets, tokenizer=tokenizer, encoder=encoder)
    first = 0 if encoder else len(inputs)  # of the targets, which begin with the sentinel
    return weighted_at(**example, start=first + 1, n=len(text.middle))


def reconstruct(inputs: np.ndarray, targets: np.ndarray, *, tokenizer: Any) -> np.ndarray:
    """The text of which `corrupt` made these: the spans back in the place of their sentinels."""
    spans: dict[int, list[int]] = {}
    open_span: list[int] = []
    for token in targets.tolist():
        if token == tokenizer.eos_id:
            break
        if token in tokenizer.sentinel_ids:
            open_span = spans[token] = []
        else:
            open_span.append(token)
    text: list[int] = []
    for token in inputs.tolist():
        text.extend(spans.get(token, [token]))
    return np.array(text, np.int32)
