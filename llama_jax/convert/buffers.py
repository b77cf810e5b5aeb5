"""Rotary tables that files hold beside the weights: checked, and left out.

Code bases stored them in many places over the years. The decoder computes its own; a table that
says otherwise was made with another theta or scaling than the settings say, which nothing else
would show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from llama_jax.convert.tensors import Tensors
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.model.rope import attention_factor, frequencies

_FREQUENCIES = re.compile(
    r'(^|\.)((original_)?inv_freq|(rope|rotary|rotary_emb|rotary_pos_emb)\.freqs'
    r'|attn_rot_embd\.weight)$'
)
_WAVES = re.compile(r'(^|\.)(rope|rotary|rotary_emb|rotary_pos_emb)\.(cos|sin)(_cache|_cached)?$')
_POSITIONS = 32
"""So many of a table of cosines or sines are looked at."""


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is a rotary table."""
    return bool(_FREQUENCIES.search(name) or _WAVES.search(name))


def check(names: Iterable[str], tensors: Tensors, config: ModelConfig) -> None:
    """Raise UserError when a rotary table is not what the settings say."""
    plain = _frequencies(config, scaled=False)
    # Some code bases scaled positions, and stored frequencies that are not scaled.
    allowed = [plain] if config.rope_scaling is None else [_frequencies(config), plain]
    for name in names:
        found = np.asarray(tensors[name])
        digits = ml_dtypes.finfo(found.dtype).nmant
        found = found.astype(np.float64)
        factors = {1.0, attention_factor(config.rope_scaling)}
        if not any(
            _agree(name, found, angles, digits, factor=factor)
            for angles in allowed
            for factor in factors
        ):
            scaling = '' if config.rope_scaling is None else f' and {config.rope_scaling}'
            raise UserError(
                f'{tensors.where(name)} is not what the settings of the model say: rope_theta '
                f'{config.rope_theta:g}{scaling} make other rotary frequencies; correct them, or '
                'take the settings that came with these weights'
            )


def _agree(
    name: str, found: np.ndarray, angles_h: np.ndarray, digits: int, *, factor: float
) -> bool:
    """`digits`: bits that the entries have after the first. `factor`: what cosines and sines are
    multiplied by."""
    relative = 2.0**-digits + 1e-3
    if _FREQUENCIES.search(name):
        # Half precision has no smaller step than 6e-8.
        return found.size == angles_h.size and np.allclose(
            found.ravel(), angles_h, rtol=relative, atol=1e-7 if digits == 10 else 0
        )
    if not found.ndim or found.shape[-1] not in (angles_h.size, 2 * angles_h.size):
        return False
    found = found.reshape(-1, found.shape[-1])[:_POSITIONS]
    angle = np.arange(len(found))[:, None] * angles_h
    wave = np.cos(angle) if 'cos' in name.rpartition('.')[2] else np.sin(angle)
    wave = wave * factor
    # A half beside the other, or each twice.
    halves = [np.concatenate([wave, wave], axis=1), np.repeat(wave, 2, axis=1)]
    expected = [wave] if found.shape[1] == angles_h.size else halves
    return any(np.allclose(found, x, rtol=0, atol=4 * relative) for x in expected)


def _frequencies(config: ModelConfig, *, scaled: bool = True) -> np.ndarray:
    scaling = config.rope_scaling if scaled else None
    angles = frequencies(config.head_dim, theta=config.rope_theta, scaling=scaling)
    return np.asarray(angles, np.float64)
