"""Shape of a Transformer, and how it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llama_jax.errors import UserError
from llama_jax.model.patterns import Dense, Pattern
from llama_jax.precision import Precision

AttentionBackend = Literal['auto', 'reference', 'blocked', 'xla', 'cudnn', 'splash']
Remat = Literal['none', 'dots', 'named', 'full']


VOCAB_MULTIPLE = 128
"""Of a vocabulary that is left to the tokenizer: tensor parallelism divides it by any power of two
that a slice has."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rule for stretching rotary positions to a longer context (Llama 3.1 release)."""

    factor: float = 8.0
    """Longest wavelengths are stretched by this."""
    low: float = 1.0
    """Wavelengths above original_context / low are stretched in full."""
    high: float = 4.0
    """Wavelengths below original_context / high are left alone."""
    original_context: int = 8192

    def __post_init__(self) -> None:
        _check_positive(self, 'factor', 'low', 'high', 'original_context')


@dataclass(frozen=True)
class Linear:
    """Positions are divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, 'factor')


@dataclass(frozen=True)
class Dynamic:
    """The base of the wavelengths grows with the length of the sequence once that exceeds the
    original context ('dynamic NTK'; `dynamic` in transformers). See `by_length`."""

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        _check_positive(self, 'factor', 'original_context')


@dataclass(frozen=True)
class Yarn:
    """Long wavelengths are stretched, short ones are kept, and queries and keys are lengthened
    (YaRN, Peng et al. 2023, sections 3.2 to 3.4)."""

    factor: float
    original_context: int
    attention_factor: float | None = None
    """Cosines and sines are multiplied by it. None: 1 + 0.1 ln(factor), as in the paper."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this within the original context are kept."""
    beta_slow: float = 1.0
    """Pairs that turn less often are stretched in full; in between it fades."""
    truncate: bool = True
    """The bounds of the fading are rounded outwards to whole pairs."""

    def __post_init__(self) -> None:
        _check_positive(
            *(self, 'factor', 'original_context', 'attention_factor', 'beta_fast', 'beta_slow')
        )
        if self.beta_fast < self.beta_slow:
            raise UserError(
                f'model.rope_scaling Yarn: beta_fast {self.beta_fast} is below beta_slow '
                f'{self.beta_slow}'
            )


@dataclass(frozen=True)
class LongRope:
    """Each pair is stretched by a factor of its own: `short` for sequences within the original
    context, `long` for longer ones (LongRoPE, Ding et al. 2024, as Phi-3 uses it). See `by_length`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    attention_factor: float
    """Cosines and sines are multiplied by it, at every length."""

    def __post_init__(self) -> None:
        _check_positive(self, 'original_context', 'attention_factor')
        factors = (*self.short, *self.long)
        if len(self.short) != len(self.long) or not all(0 < f < math.inf for f in factors):
            raise UserError(
                'model.rope_scaling LongRope: short and long need a positive factor each for every '
                f'pair of a head; they have {len(self.short)} and {len(self.long)}'
            )


Scaling = RopeScaling | Linear | Dynamic | Yarn | LongRope
"""How rotary positions are stretched to a longer context."""


def by_length(scaling: Scaling | None) -> bool:
    """Whether the rotation goes by the length of the sequence, not by positions alone: text is read
    otherwise once it is longer than the original context."""
    if isinstance(scaling, LongRope):
        return scaling.short != scaling.long
    return isinstance(scaling, Dynamic)


def _check_positive(scaling: Scaling, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if value is not None and not 0 < value < math.inf:
            kind = type(scaling).__name__
            raise UserError(f'model.rope_scaling {kind}: {name} is {value}, it must be positive')


@dataclass(frozen=True)
class ModelConfig:
    """Architecture: a LLaMA decoder by default, and the choices of the classic Transformer
    (Vaswani et al. 2017). Nothing here concerns speed."""

    vocab: int
    """Rows of the embedding, control tokens included. 0 leaves it to the tokenizer of a training:
    as many as it has ids, and up to the next multiple of VOCAB_MULTIPLE."""
    dim: int
    layers: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key-value heads; they divide `heads`."""
    head_dim: int
    ffn: int
    """Hidden units of the feed-forward layer."""
    context: int
    """Longest sequence, in tokens."""
    rope_theta: float = 1e4
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    """The output head is the embedding."""
    dropout: float = 0.0
    """Rate at which the embedding's and each sub-layer's output is dropped in training."""
    norm: Literal['rms', 'layer'] = 'rms'
    norm_place: Literal['pre', 'post'] = 'pre'
    """Before each sub-layer and after the last layer; or after each residual sum, and no more."""
    mlp: Literal['swiglu', 'gelu', 'relu'] = 'swiglu'
    bias: bool = False
    """The linear maps of attention and feed-forward layers have biases."""
    positions: Literal['rope', 'sinusoidal', 'learned'] = 'rope'
    pattern: Pattern = Dense()
    """Sparse self-attention, of encoder and decoder alike."""
    encoder_layers: int = 0
    """Above 0 an encoder-decoder: `layers` are the decoder's, which also attend to the encoder's
    output. Both share the embedding."""
    base_dim: int = 0
    """Above 0 initial values and learning rates are those of a model of this `dim`, carried over to
    this one (muP); see model/width.py."""
    base_head_dim: int = 0
    """Of the heads of that model. 0: as here."""
    vocab_padding: int = 0
    """Rows at the end of the vocabulary that no token has, so that devices may share it evenly;
    they have no probability. Training takes the number from the tokenizer."""

    def __post_init__(self) -> None:
        sizes = ('dim', 'layers', 'heads', 'kv_heads', 'head_dim', 'ffn', 'context')
        for field in sizes:
            if getattr(self, field) < 1:
                raise UserError(f'model.{field} is {getattr(self, field)}: it must be positive')
        if self.vocab < 0:
            raise UserError(
                f'model.vocab is {self.vocab}: it must be positive, or 0 for the tokenizer to say'
            )
        if self.vocab_padding < 0 or 0 < self.vocab <= self.vocab_padding:
            raise UserError(
                f'model.vocab_padding is {self.vocab_padding}: it must be 0 or more and below '
                f'model.vocab, which is {self.vocab}'
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f'{self.heads} heads cannot share {self.kv_heads} key-value heads evenly: '
                'model.kv_heads must divide model.heads'
            )
        if self.positions == 'rope' and self.head_dim % 2:
            raise UserError(f'model.head_dim {self.head_dim} is odd: rotary positions need pairs')
        if self.positions == 'rope' and not 1 < self.rope_theta < math.inf:
            raise UserError(
                f'model.rope_theta is {self.rope_theta}: wavelengths need a base above 1, such as '
                '10000'
            )
        scaling = self.rope_scaling
        if isinstance(scaling, Dynamic) and self.head_dim < 4:
            raise UserError('model.rope_scaling Dynamic needs a head_dim of 4 or more')
        if isinstance(scaling, LongRope) and len(scaling.short) != self.head_dim // 2:
            raise UserError(
                f'model.rope_scaling LongRope has {len(scaling.short)} factors, a head_dim of '
                f'{self.head_dim} needs {self.head_dim // 2}: one for each pair'
            )
        if self.positions == 'sinusoidal' and self.dim % 2:
            raise UserError(f'model.dim {self.dim} is odd: sinusoidal positions need pairs')
        if self.encoder_layers < 0:
            raise UserError(
                f'model.encoder_layers is {self.encoder_layers}: 0 for a decoder alone, or more'
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f'model.dropout {self.dropout} is not in [0, 1)')
        if min(self.base_dim, self.base_head_dim) < 0:
            raise UserError('model.base_dim and model.base_head_dim are 0 or more')
        if self.base_head_dim and not self.base_dim:
            raise UserError(
                'model.base_head_dim has no effect without model.base_dim: set that too'
            )
        if self.base_dim and self.norm_place == 'post':
            raise UserError(
                'model.base_dim scales the norm before the head, and with model.norm_place post '
                'there is none: set model.norm_place pre'
            )
        if self.base_dim and self.positions == 'sinusoidal':
            raise UserError(
                'model.base_dim carries nothing over with model.positions sinusoidal, which '
                'multiplies embeddings by the root of the width: take rope or learned'
            )

    @property
    def ids(self) -> int:
        """Ids that tokens have: rows of the embedding without the padding."""
        return self.vocab - self.vocab_padding

    @property
    def llama(self) -> bool:
        """Whether the layers are those of the LLaMA family, whatever the attention pattern."""
        choices = (self.norm, self.norm_place, self.mlp, self.bias, self.positions)
        llama = ('rms', 'pre', 'swiglu', False, 'rope')
        return choices == llama and not self.encoder_layers

    def sizes(self) -> dict[str, int]:
        """Size of each dimension that a mesh may divide, by letter."""
        return {
            'D': self.dim,
            'N': self.heads,
            'K': self.kv_heads,
            'F': self.ffn,
            'V': self.vocab,
        }


@dataclass(frozen=True)
class Compute:
    """How a model computes: changes speed and memory, not the result beyond rounding."""

    precision: Precision = 'float32'
    attention: AttentionBackend = 'auto'
    remat: Remat = 'none'
    """What the backward pass recomputes: nothing; all but matrix products ('dots'); all but the
    named tensors of model/block.py ('named'); each whole layer from its input ('full')."""
    unroll: int = 0
    """Layers per iteration of the scan over depth. 0: one, but all of them on a CPU where remat
    is 'none': there, stacking what the backward pass needs takes longer than the loop's shorter
    program saves."""
