"""Rotary positions and their scaling in GGUF files <-> ours.

The meaning is that of llama.cpp (llama-context.cpp, and rope_yarn of ggml): the angle of a pair is
divided by the scaling factor and by the pair's own factor, where the file holds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.convert.rope import Rope
from llama_jax.convert.values import count, number, unsupported
from llama_jax.errors import UserError
from llama_jax.model.config import (
    Linear,
    LongRope,
    ModelConfig,
    RopeScaling,
    Scaling,
    Yarn,
    by_length,
)
from llama_jax.model.patterns import Dense
from llama_jax.model.rope import attention_factor, frequencies, paper_factor

KEYS = frozenset(
    {'context_length', 'rope.freq_base', 'rope.scale_linear', 'rope.scaling.type'}
    | {f'rope.scaling.{name}' for name in ('factor', 'attn_factor', 'original_context_length')}
    | {f'rope.scaling.yarn_{name}' for name in ('ext_factor', 'attn_factor', 'log_multiplier')}
    | {f'rope.scaling.yarn_{name}' for name in ('beta_fast', 'beta_slow')}
)
"""Settings, without the name of the architecture, that are read here."""

FREQS = 'rope_freqs.weight'
LONG, SHORT = 'rope_factors_long.weight', 'rope_factors_short.weight'
TENSORS = (FREQS, LONG, SHORT)
"""Tensors [H/2] that a file may hold: the factors of the pairs."""

_WHERE = 'GGUF: llama'
_USED = {'longrope': {LONG, SHORT}, 'none': {FREQS}, 'linear': {FREQS}, 'yarn': set()}
_NEUTRAL = {
    'rope.scaling.yarn_ext_factor': 1,
    'rope.scaling.yarn_attn_factor': 1,
    'rope.scaling.yarn_log_multiplier': 0,
    'rope.scaling.yarn_beta_fast': 32,
    'rope.scaling.yarn_beta_slow': 1,
}
"""What llama.cpp takes with Llama models, whatever a file says."""


def from_gguf(
    settings: Mapping[str, Any], factors: Mapping[str, np.ndarray], *, head_dim: int
) -> Rope:
    """What a file says of positions: `settings` without the name of the architecture, `factors`
    those of TENSORS that it holds. Raises UserError for what the decoder does not have."""

    def written(name: str, default: float) -> float:
        return as_written(number(settings, name, _WHERE)) if name in settings else default

    context = original = count(settings, 'context_length', _WHERE)
    if 'rope.scaling.original_context_length' in settings:
        original = count(settings, 'rope.scaling.original_context_length', _WHERE)
    theta = written('rope.freq_base', 1e4)
    attention = written('rope.scaling.attn_factor', 1.0)
    kind = settings.get('rope.scaling.type', 'linear')
    if kind not in _USED:
        raise UserError(
            f'{_WHERE}.rope.scaling.type = {kind!r} is not supported, only {", ".join(_USED)}'
        )
    for name, neutral in _NEUTRAL.items():
        if settings.get(name, neutral) != neutral:
            raise unsupported(_WHERE, name, settings)
    for name, factors_h in factors.items():
        if factors_h.shape != (head_dim // 2,):
            raise UserError(
                f'GGUF: tensor {name!r} has shape {factors_h.shape}, a head of {head_dim} needs '
                f'{head_dim // 2} factors'
            )
        if name not in _USED[kind] and np.any(factors_h != 1):
            raise UserError(f'GGUF: tensor {name!r} has no use with rope.scaling.type = {kind!r}')
    # The older name counts where the newer one is missing or 0; 0 is no scaling.
    names = ('rope.scaling.factor', 'rope.scale_linear')
    factor = written(next((name for name in names if settings.get(name)), ''), 1.0)
    if kind == 'yarn':
        scaling = Yarn(
            factor,
            original,
            None if attention == 1 else attention * paper_factor(factor),
        )
        return Rope(theta, scaling, context)
    factor = 1.0 if kind == 'none' else factor
    if kind == 'longrope':
        for name in (SHORT, LONG):
            if name not in factors:
                raise UserError(f'GGUF: tensor {name!r} is missing, and the scaling is longrope')
        short, long = (_listed(factor * factors[name]) for name in (SHORT, LONG))
        return Rope(theta, LongRope(short, long, original, attention), context)
    factors_h = factors.get(FREQS, np.ones(head_dim // 2, np.float32))
    rule: Scaling | None = None
    if np.any(factors_h != 1) or attention != 1:
        rule = (
            _llama3(factors_h, theta, original, context) if (factor, attention) == (1, 1) else None
        )
        pairs = _listed(factor * factors_h)
        rule = rule or LongRope(pairs, pairs, original, attention)
    elif factor != 1:
        rule = Linear(factor)
    return Rope(theta, rule, context)


def to_gguf(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings, without the name of the architecture, and tensors that say the same.

    Raises UserError for what llama.cpp does not have.
    """
    if config.pattern != Dense():
        raise UserError(
            f'GGUF: llama.cpp has no {config.pattern} for Llama models: write it for Hugging Face'
        )
    settings: dict[str, Any] = {'context_length': config.context}
    settings['rope.freq_base'] = float(config.rope_theta)
    tensors: dict[str, np.ndarray] = {}

    def say(**rest: Any) -> None:
        settings.update({f'rope.scaling.{name}': value for name, value in rest.items()})

    match config.rope_scaling:
        case None:
            pass
        case Linear(factor):
            say(type='linear', factor=float(factor))
        case RopeScaling(original_context=original) as scaling:
            tensors[FREQS] = _divided_by(scaling, config.head_dim, config.rope_theta)
            say(type='none', original_context_length=original)
        case Yarn(factor, original, beta_fast=32, beta_slow=1, truncate=True) as scaling:
            say(type='yarn', factor=float(factor), original_context_length=original)
            say(attn_factor=attention_factor(scaling) / paper_factor(factor))
        case LongRope(short, long, original, attention) as scaling:
            tensors = {SHORT: np.asarray(short, np.float32), LONG: np.asarray(long, np.float32)}
            if not by_length(scaling):
                tensors = {FREQS: tensors[SHORT]}
            say(type='longrope' if by_length(scaling) else 'none', attn_factor=attention)
            say(original_context_length=original)
        case scaling:
            raise UserError(
                f'GGUF has no word for rope_scaling {scaling}: write the model for Hugging Face'
            )
    return settings, tensors


def as_written(value: float) -> float:
    """Files hold float32: 1e-5 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _listed(factors_h: np.ndarray) -> tuple[float, ...]:
    return tuple(map(as_written, factors_h.tolist()))


def _llama3(factors_h: np.ndarray, theta: float, original: int, context: int) -> RopeScaling | None:
    """Llama 3's rule, if it gives these factors. Files of the releases leave its original context
    out, 8192."""
    for guess in {original, 8192 if original == context else original}:
        rule = RopeScaling(factor=as_written(factors_h.max()), original_context=guess)
        if np.allclose(factors_h, _divided_by(rule, 2 * len(factors_h), theta), rtol=1e-3):
            return rule
    return None


def _divided_by(scaling: Scaling, head_dim: int, theta: float) -> np.ndarray:
    plain, stretched = (
        np.asarray(frequencies(head_dim, theta=theta, scaling=rule)) for rule in (None, scaling)
    )
    return plain / stretched
