"""A mixture of denoisers, each announced by a mode token (UL2, Tay et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import encoder_decoder_flops, prefix_flops
from llama_jax.objectives.prediction import (
    ENCODER,
    TokenPrediction,
    check_architecture,
    denoising,
)
from llama_jax.objectives.prefix import PrefixLM, split_at
from llama_jax.objectives.spans import Spans, corrupt, fits, largest


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
        return PrefixLM(ratio=1 - self.density).split(length, np.random.default_rng(0))


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
    decoder predicts the suffix. A piece is of at most the longest text that fits under the
    denoiser, and the document's end is predicted where its last piece is under a sequential one.
    """

    encoder: bool = False
    """Inputs to the encoder of an encoder-decoder. False: inputs and targets in one stream, the
    inputs in full view."""
    denoisers: tuple[Denoiser, ...] = MIXTURE

    def __post_init__(self) -> None:
        if not self.denoisers:
            raise UserError('a mixture of no denoisers: give one or more')

    @property
    def causal(self) -> bool:
        return False

    def lengths(self, seq_len: int) -> dict[str, int]:
        """Of an encoder-decoder: in the proportion that the mixture has on average."""
        if not self.encoder:
            return {'': seq_len}
        shares = self._shares(seq_len)
        inputs = round(sum(shares) / len(shares) * seq_len)
        return {ENCODER: inputs, '': seq_len - inputs}

    def example(
        self, tokens: np.ndarray, *, tokenizer: Any, seq_len: int, rng: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Pieces of the document, one after another, until all of it is used."""
        longest = [self._longest(d, tokenizer, seq_len) for d in self.denoisers]
        ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        examples, start, end = [], 0, len(ids) - 1
        while start < end:
            drawn = int(rng.integers(len(self.denoisers)))
            # As equal as the pieces would be if all the rest were cut for this denoiser.
            rest = end - start
            size = -(-rest // -(-rest // longest[drawn]))
            stop = start + size
            denoiser = self.denoisers[drawn]
            mode = tokenizer.control[denoiser.mode]
            if denoiser.mean_span is None:
                inputs, targets = ids[start:stop], ids[start + 1 : stop + 1]
                examples.append(self._sequential(denoiser, inputs, targets, mode, tokenizer))
            elif len(text := tokens[start:stop]) > 1:
                mask = Spans(denoiser.density, denoiser.mean_span).mask(len(text), rng)
                inputs, targets = corrupt(text, mask, tokenizer=tokenizer)
                inputs = np.concatenate([[mode], inputs])
                examples.append(
                    denoising(inputs, targets, tokenizer=tokenizer, encoder=self.encoder)
                )
            start = stop
        return examples

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Mean over the mixture, of rows that one text fills."""
        if self.encoder:
            return encoder_decoder_flops(model, *self.lengths(seq_len).values())
        prefixes = [round(share * seq_len) for share in self._shares(seq_len)]
        counts = [prefix_flops(model, seq_len, prefix=prefix) for prefix in prefixes]
        return sum(counts) / len(counts)

    def check(self, model: ModelConfig) -> None:
        check_architecture(model, f'UL2 with encoder={self.encoder}', encoder=self.encoder)

    def _shares(self, seq_len: int) -> list[float]:
        """Share of the inputs in all positions of a text as long as a row, of each denoiser."""
        sizes = [denoiser.sizes(max(seq_len, 2)) for denoiser in self.denoisers]
        return [(1 + inputs) / (1 + inputs + targets) for inputs, targets in sizes]

    def _longest(self, denoiser: Denoiser, tokenizer: Any, seq_len: int) -> int:
        lengths = self.lengths(seq_len)

        def fit(length: int) -> bool:
            if denoiser.mean_span is None:
                if not self.encoder:
                    return length + 1 <= seq_len  # the causal example after the mode token
                return fits(denoiser.sizes(length), lengths, more=1)
            _, spans = Spans(denoiser.density, denoiser.mean_span).counts(length)
            return spans <= len(tokenizer.sentinel_ids) and fits(
                denoiser.sizes(length), lengths, more=1
            )

        return largest(fit, seq_len)

    def _sequential(
        self,
        denoiser: Denoiser,
        inputs: np.ndarray,
        targets: np.ndarray,
        mode: int,
        tokenizer: Any,
    ) -> dict[str, np.ndarray]:
        split = denoiser.split(len(inputs))
        if self.encoder:
            return denoising(
                np.concatenate([[mode], inputs[:split]]),
                targets[max(split - 1, 0) :],
                tokenizer=tokenizer,
                encoder=True,
            )
        first = {'inputs': mode, 'targets': tokenizer.pad_id, 'weights': 0, 'prefix': 1}
        return {
            key: np.concatenate([np.array([first[key]], values.dtype), values])
            for key, values in split_at(inputs, targets, split).items()
        }
