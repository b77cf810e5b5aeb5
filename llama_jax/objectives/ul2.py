"""A mixture of denoisers, each announced by a mode token (UL2, Tay et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_jax.data.pieces import Example, Piece, Sizes
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.asked import Infill, Middle, Reading, asking
from llama_jax.objectives.flops import encoder_decoder_flops, prefix_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
    in_lanes,
)
from llama_jax.objectives.prefix import in_full_view, prefix_of, split_at
from llama_jax.objectives.spans import Spans, corrupt, corrupted_sizes, no_room, one_span


@dataclass(frozen=True)
class Denoiser:
    """One way of corrupting a text."""

    mode: Literal['[R]', '[S]', '[X]']
    density: float
    mean_span: float | None = None
    """None: one span at the end of the text, which is prefix language modelling."""

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of inputs without the mode token, and of targets, of `length` tokens."""
        if self.mean_span is not None:
            return Spans(self.density, self.mean_span).sizes(length)
        split = self.split(length)
        return split, length - max(split - 1, 0)

    def split(self, length: int) -> int:
        """Inputs of a prefix language model that are prefix."""
        return prefix_of(length, 1 - self.density)


MIXTURE = (
    Denoiser('[R]', 0.15, 3.0),
    Denoiser('[R]', 0.15, 8.0),
    Denoiser('[X]', 0.5, 3.0),
    Denoiser('[X]', 0.5, 8.0),
    Denoiser('[X]', 0.15, 64.0),
    Denoiser('[X]', 0.5, 64.0),
    Denoiser('[S]', 0.25),
)
"""The seven of the paper, table 1: regular, extreme and sequential denoising."""


@dataclass(frozen=True)
class UL2(TokenPrediction):
    """Every piece of a document under a denoiser of its own, drawn from a uniform mixture.

    A mode token stands before the inputs. Span denoisers are those of objectives/spans.py, with the
    same form. The sequential denoiser is prefix language modelling, and on a decoder its example is
    that of objectives/prefix.py after the mode token; with an encoder, which reads the prefix, the
    decoder predicts the suffix. The document's end is predicted where its last piece is under a
    sequential denoiser, and so is a piece of a single token, which has no place for a span.
    """

    encoder: bool = False
    """Inputs to the encoder of an encoder-decoder. False: inputs and targets in one stream, the
    inputs in full view."""
    denoisers: tuple[Denoiser, ...] = MIXTURE

    @property
    def marks(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise UserError('a mixture of no denoisers: give one or more')

    @property
    def causal(self) -> bool:
        return False

    @property
    def ends(self) -> bool:
        return self._single is not None

    @property
    def reading(self) -> Reading:
        rest = asking('exact', self._rest)
        if self._span_mode is None:
            return Reading(rest=rest, middle=rest)
        middle = asking('exact', self._between)
        return Reading(rest=rest, middle=middle, infill=Infill(self._between, 'mark'))

    def _rest(self, text: Middle, tokenizer: Any) -> Example:
        """[S, begin, prefix] in full view: the sequential denoiser, where the mixture has one."""
        if self._single is None:
            return self._between(text, tokenizer)
        mode = tokenizer.control[self._single.mode]
        if self.encoder:
            inputs = np.concatenate([[mode, tokenizer.bos_id], text.prefix])
            return denoising(inputs, text.middle, tokenizer=tokenizer, encoder=True)
        return _after(mode, in_full_view(text, tokenizer), tokenizer)

    def _between(self, text: Middle, tokenizer: Any) -> Example:
        """The middle as the one corrupted span, after the mode of the first span denoiser."""
        assert self._span_mode is not None
        before = [tokenizer.control[self._span_mode]]
        return one_span(text, tokenizer, encoder=self.encoder, before=before)

    @property
    def _span_mode(self) -> str | None:
        return next((d.mode for d in self.denoisers if d.mean_span is not None), None)

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Of an encoder-decoder: in the proportion that the mixture has on average."""
        lengths = {'': seq_len}
        if self.encoder:
            shares = self._shares(seq_len)
            inputs = in_lanes(round(sum(shares) / len(shares) * seq_len), seq_len)
            lengths = {ENCODER: inputs, '': seq_len - inputs}
        for denoiser in self.denoisers:
            sizes = self._sizes(denoiser, 2)
            if sizes is None or any(map(int.__gt__, sizes, lengths.values())):
                raise no_room(seq_len)
        return lengths

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        """Those of the denoiser that `draw` gives."""
        denoiser = self._denoiser(draw, n)
        return None if denoiser is None else self._sizes(denoiser, n)

    def example(
        self, piece: Piece, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> Example | None:
        text = piece.text
        denoiser = self._denoiser(piece.draw, len(text))
        if denoiser is None:
            return None
        mode = tokenizer.control[denoiser.mode]
        if denoiser.mean_span is None:
            inputs, targets = piece.predicted(tokenizer)
            return self._sequential(denoiser, inputs, targets, mode, tokenizer)
        mask = Spans(denoiser.density, denoiser.mean_span).mask(len(text), rng)
        inputs, targets = corrupt(text, mask, tokenizer=tokenizer)
        inputs = np.concatenate([[mode], inputs])
        return denoising(inputs, targets, tokenizer=tokenizer, encoder=self.encoder)

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Mean over the mixture, of rows that one text fills."""
        if self.encoder:
            return encoder_decoder_flops(model, *self.lengths(seq_len).values())
        counts = []
        for denoiser, share in zip(self.denoisers, self._shares(seq_len), strict=True):
            prefix = round(share * seq_len)
            # The sequential denoiser's first target is read off the last input.
            predicted = seq_len - prefix + (denoiser.mean_span is None)
            counts.append(prefix_flops(model, seq_len, prefix=prefix, predicted=predicted))
        return sum(counts) / len(counts)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, f'UL2 with encoder={self.encoder}', encoder=self.encoder)

    def _shares(self, seq_len: int) -> list[float]:
        """Share of the inputs in all positions of a text as long as a row, of each denoiser."""
        sizes = [denoiser.sizes(max(seq_len, 2)) for denoiser in self.denoisers]
        return [(1 + inputs) / (1 + inputs + targets) for inputs, targets in sizes]

    @property
    def _single(self) -> Denoiser | None:
        """The denoiser of a text that has no place for a span."""
        return next((d for d in self.denoisers if d.mean_span is None), None)

    def _denoiser(self, draw: float, n: int) -> Denoiser | None:
        """The one that `draw` gives, of a text of `n` tokens."""
        drawn = self.denoisers[int(draw * len(self.denoisers))]
        return drawn if n > 1 or drawn.mean_span is None else self._single

    def _sizes(self, denoiser: Denoiser, n: int) -> Sizes | None:
        """The mode token's position included."""
        if denoiser.mean_span is None:
            if not self.encoder:
                return (n + 1,)  # the causal example after the mode token
            split, targets = denoiser.sizes(n)
            return split + 1, targets
        sizes = corrupted_sizes(n, denoiser.density, denoiser.mean_span)
        if sizes is None:
            return None
        inputs, targets = sizes
        return (inputs + 1, targets) if self.encoder else (inputs + 1 + targets,)

    def _sequential(
        self,
        denoiser: Denoiser,
        inputs: np.ndarray,
        targets: np.ndarray,
        mode: int,
        tokenizer: Any,
    ) -> Example:
        split = denoiser.split(len(inputs))
        if self.encoder:
            return denoising(
                np.concatenate([[mode], inputs[:split]]),
                targets[max(split - 1, 0) :],
                tokenizer=tokenizer,
                encoder=True,
            )
        return _after(mode, split_at(inputs, targets, split), tokenizer)


def _after(mode: int, example: Example, tokenizer: Any) -> Example:
    """An example of one stream after a mode token."""
    first = {'inputs': mode, 'targets': tokenizer.pad_id, 'weights': 0, 'prefix': 1}
    return {
        key: np.concatenate([np.array([first[key]], values.dtype), values])
        for key, values in example.items()
    }
