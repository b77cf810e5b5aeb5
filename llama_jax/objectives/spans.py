"""Span corruption: spans of the text are replaced by sentinels and predicted (T5, Raffel et al.
2020, section 3.1.4)."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.base import chunks
from llama_jax.objectives.flops import encoder_decoder_flops, prefix_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
)


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
        noise = min(max(round(length * self.density), 1), length - 1)
        spans = min(max(round(noise / self.mean_span), 1), length - noise)
        return noise, spans

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

    A document is cut into equal pieces, each of at most the longest length L whose inputs and
    targets, L + 2 spans + 1 tokens, fit a row, and whose spans do not outnumber the sentinels. A
    piece of one token cannot be corrupted and is left out.
    """

    density: float = 0.15
    mean_span: float = 3.0
    encoder: bool = False
    """Inputs to the encoder of an encoder-decoder. False: inputs and targets in one stream, the
    inputs in full view."""

    def __post_init__(self) -> None:
        self._spans()

    @property
    def causal(self) -> bool:
        return False

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Of an encoder-decoder: each as long as the longest text that fits both makes it."""
        if not self.encoder:
            return {'': seq_len}
        inputs = self._inputs(seq_len)
        return {ENCODER: inputs, '': seq_len - inputs}

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Every piece of the document under a mask of its own."""
        spans, lengths = self._spans(), self.lengths(seq_len)
        longest = largest(
            lambda length: (
                fits(spans.sizes(length), lengths)
                and spans.counts(length)[1] <= len(tokenizer.sentinel_ids)
            ),
            seq_len,
        )
        return [
            denoising(
                *corrupt(text, spans.mask(len(text), rng), tokenizer=tokenizer),
                tokenizer=tokenizer,
                encoder=self.encoder,
            )
            for text in chunks(tokens, longest)
            if len(text) > 1
        ]

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Of a row that one text fills."""
        inputs = self._inputs(seq_len)
        if self.encoder:
            return encoder_decoder_flops(model, inputs, seq_len - inputs)
        return prefix_flops(model, seq_len, prefix=inputs)

    def check(self, model: ModelConfig) -> None:
        name = f'span corruption with encoder={self.encoder}'
        check_architecture(model, name, encoder=self.encoder)

    def _spans(self) -> Spans:
        return Spans(self.density, self.mean_span)

    def _inputs(self, seq_len: int) -> int:
        """Tokens of the inputs of the longest text that fits a row with its targets."""
        spans = self._spans()
        longest = largest(lambda length: sum(spans.sizes(length)) <= seq_len, seq_len)
        return spans.sizes(longest)[0]


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


def fits(sizes: tuple[int, int], lengths: dict[str, int], *, more: int = 0) -> bool:
    """Whether inputs and targets of these sizes, and `more` inputs, fit a row."""
    inputs, targets = sizes
    if ENCODER in lengths:
        return inputs + more <= lengths[ENCODER] and targets <= lengths['']
    return inputs + more + targets <= lengths['']


def largest(fit: Callable[[int], bool], seq_len: int) -> int:
    """The largest length of text that fits; when it does, so do all shorter ones."""
    lengths: Sequence[int] = range(2, seq_len + 1)
    place = bisect.bisect_left(lengths, True, key=lambda length: not fit(length))
    if not place:
        raise UserError(
            f'a row of {seq_len} positions has no room for a corrupted text and its targets: raise '
            'the sequence length'
        )
    return lengths[place - 1]
