"""Text infilling and sentence permutation on an encoder-decoder (BART, Lewis et al. 2020)."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import Infill, Middle, Reading, asking, weighted_at
from llama_jax.objectives.flops import encoder_decoder_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
    in_lanes,
)

SPARE = 1.05
"""Room for inputs over the mean, for the number of spans is drawn."""

_WIDE = '(?:。|！|？|；|．|｡|…)'  # end a sentence wherever they stand
_CLOSING = '(?:"|\'|”|’|」|』|）|】|》|\\)|\\])'  # belong to the sentence they follow
SENTENCE_END = re.compile(
    rf'{_WIDE}+{_CLOSING}*\n*|[.!?;]+{_CLOSING}*(?:(?=[ \t\r])|\n+|\Z)|\n+'.encode()
)
"""Ends of sentences in UTF-8. ASCII marks end one before white space only: not in 3.14 or a.b."""


@dataclass(frozen=True)
class Bart(TokenPrediction):
    """The corrupted text -> all of the text, and an end token (Lewis et al. 2020, section 2.2).

    The sentences of a piece of a document are put in random order; then spans, of lengths
    drawn from a Poisson distribution, each become one <mask>, until `rate` of the tokens are gone.
    A span of length 0 inserts a <mask>.
    """

    rate: float = 0.3
    mean_span: float = 3.0
    permute: bool = True
    """Sentences in random order. False: in theirs."""

    @property
    def marks(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(
                f'--objective.rate {self.rate}: the share of masked tokens must be in (0, 1)'
            )
        if self.mean_span <= 0:
            raise UserError(f'--objective.mean-span {self.mean_span}: it must be positive')

    @property
    def causal(self) -> bool:
        return False

    @property
    def reading(self) -> Reading:
        asked = asking('exact', self._between)
        return Reading(rest=asked, middle=asked, infill=Infill(self._between, 'suffix'))

    def _between(self, text: Middle, tokenizer: Any) -> Example:
        """One <mask> for the middle; the decoder has written what is before it."""
        inputs = np.concatenate([text.prefix, [tokenizer.mask_id], text.suffix])
        targets = np.concatenate([text.prefix, text.middle])
        example = denoising(inputs, targets, tokenizer=tokenizer, encoder=True)
        return weighted_at(**example, start=len(text.prefix), n=len(text.middle))

    def lengths(self, seq_len: int) -> dict[str, int]:
        """In the proportion of the room for inputs to the targets."""
        share = _inputs_per_token(self.rate, self.mean_span)
        inputs = round(share / (share + 1) * seq_len)
        least, _ = self._sizes(1)
        if inputs < max(least, 3) or seq_len - inputs < 3:
            raise UserError(
                f'a row of {seq_len} positions has no room for a text and its copy: raise the '
                'sequence length'
            )
        inputs = in_lanes(inputs, seq_len)
        return {ENCODER: inputs, '': seq_len - inputs}

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        return self._sizes(n)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        """The lengths of spans are drawn until the inputs are no longer than `piece.sizes`."""
        text = shuffled = piece.text
        if not len(text):
            return None
        if self.permute:
            ends = sentence_ends(text, tokenizer=tokenizer)
            shuffled = permuted(text, ends[ends < len(text)], rng)
        most, _ = piece.sizes
        spans = span_lengths(len(text), rate=self.rate, mean=self.mean_span, most=most, rng=rng)
        inputs = infilled(shuffled, spans, mask_id=tokenizer.mask_id, rng=rng)
        targets = np.append(text, tokenizer.eos_id)
        return denoising(inputs, targets, tokenizer=tokenizer, encoder=True)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        return encoder_decoder_flops(model, *self.lengths(seq_len).values())

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, 'BART', encoder=True)

    def _sizes(self, n: int) -> tuple[int, int]:
        return granted(n, self.rate, self.mean_span), n + 1


def _inputs_per_token(rate: float, mean_span: float) -> float:
    """Room for inputs: kept tokens and the mean number of spans, and some more."""
    return SPARE * (1 - rate + rate / mean_span)


def masked_tokens(n: int, rate: float) -> int:
    """How many of `n` tokens are in spans."""
    return max(1, round(rate * n))


@functools.lru_cache(maxsize=1 << 16)
def granted(n: int, rate: float, mean_span: float) -> int:
    """Inputs that a text of `n` tokens may take, of which more are rarely drawn: the share of the
    row, and for short texts at least the median number of spans (renewal theory: the spans that
    cover m tokens are m / mean + 1/2 on average)."""
    masked = masked_tokens(n, rate)
    median = n - masked + math.ceil(masked / mean_span + 0.5)
    return max(math.ceil(_inputs_per_token(rate, mean_span) * n), median)


def sentence_ends(tokens: np.ndarray, *, tokenizer: Any) -> np.ndarray:
    """Places, ascending, at which sentences end: tokens before the end.

    A token that belongs to two sentences goes to the first, so that the tokens of a text are the
    same in any order of its sentences.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(tokenizer.to_bytes(tokens))]
    byte_ends = np.cumsum(tokenizer.byte_lengths[tokens])
    return np.unique(np.searchsorted(byte_ends, np.array(ends, np.int64)) + 1)


def permuted(tokens: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tokens with the parts between the places `ends` in random order."""
    sentences = np.split(tokens, ends)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def span_lengths(
    n: int, *, rate: float, mean: float, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Poisson lengths that sum to round(rate n), 1 or more, the last one cut short; as many as
    leave at most `most` of `n` tokens and masks."""
    masked = masked_tokens(n, rate)
    while True:
        lengths = np.zeros(0, np.int64)
        while lengths.sum() < masked:
            lengths = np.append(lengths, rng.poisson(mean, 1 + int(masked / mean)))
        last = int(np.searchsorted(np.cumsum(lengths), masked))
        lengths = lengths[: last + 1]
        lengths[last] -= lengths.sum() - masked
        if n - masked + len(lengths) <= most:
            return lengths


def infilled(
    tokens: np.ndarray, lengths: np.ndarray, *, mask_id: int, rng: np.random.Generator
) -> np.ndarray:
    """The tokens with a <mask> in place of each of the spans, in random order at random places.

    Every arrangement of spans and kept tokens is as likely as another.
    """
    lengths = rng.permutation(lengths)
    slots = len(tokens) - int(lengths.sum()) + len(lengths)
    width = np.ones(slots, np.int64)  # of the text, that a kept token or a span takes
    place = np.sort(rng.choice(slots, len(lengths), replace=False))
    width[place] = lengths
    start = np.cumsum(width) - width
    inputs = np.append(tokens, 0)[start]  # a span of length 0 may stand behind the last token
    inputs[place] = mask_id
    return inputs
