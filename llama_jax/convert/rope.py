"""Rotary positions and their scaling in config.json <-> ours.

Files of transformers 4 have 'rope_theta' and 'rope_scaling', those of 5 'rope_parameters', which
holds both. The meaning is that of transformers 5 (modeling_rope_utils). GGUF: gguf_rope.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llama_jax.convert.values import count, number, short, unsupported
from llama_jax.errors import UserError
from llama_jax.model.config import (
    Dynamic,
    Linear,
    LongRope,
    ModelConfig,
    RopeScaling,
    Scaling,
    Yarn,
)
from llama_jax.model.rope import paper_factor

log = logging.getLogger(__name__)

KEYS = frozenset(
    {'rope_theta', 'rope_scaling', 'rope_parameters', 'partial_rotary_factor'}
    | {'max_position_embeddings', 'original_max_position_embeddings'}
)
"""Of config.json, read here."""

_ORIGINAL = 'original_max_position_embeddings'
# What each kind reads besides its name and the base.
_FIELDS: dict[str, tuple[str, ...]] = {
    'default': (),
    'linear': ('factor',),
    'dynamic': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', _ORIGINAL),
    'yarn': (
        *('factor', _ORIGINAL, 'attention_factor', 'beta_fast', 'beta_slow'),
        *('mscale', 'mscale_all_dim', 'truncate'),
    ),
    'longrope': ('factor', _ORIGINAL, 'attention_factor', 'short_factor', 'long_factor'),
}
_ALIASES = {'su': 'longrope', 'none': 'default'}
# Of other code: what changes the computation there, and the values that do not.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    'partial_rotary_factor': (1,),
    'attn_factor': (1,),
    'extrapolation_factor': (1,),
    'llama_4_scaling_beta': (0,),
    **dict.fromkeys(('alpha', 'beta', 'short_mscale', 'long_mscale', 'mrope_section'), ()),
    'mrope_interleaved': (False,),
}


_KNOWN = {'rope_type', 'type', 'rope_theta', 'finetuned', *_ELSEWHERE}.union(*_FIELDS.values())


class Rope(NamedTuple):
    """Settings of a ModelConfig that belong together."""

    theta: float
    scaling: Scaling | None
    context: int


def from_huggingface(settings: Mapping[str, Any]) -> Rope:
    """What config.json says of positions, as transformers 5 understands it.

    Raises UserError for a kind, or a setting with effect, that the decoder does not have.
    """
    context = count(settings, 'max_position_embeddings', 'config.json')
    if settings.get('partial_rotary_factor') not in (None, 1):
        raise unsupported('config.json', 'partial_rotary_factor', settings)
    homes = [home for home in ('rope_scaling', 'rope_parameters') if settings.get(home)]
    found = {home: _read(settings, home, context) for home in homes}
    if len(set(found.values())) > 1:
        raise UserError(
            'config.json: rope_scaling and rope_parameters say different things: remove one'
        )
    if found:
        return found[homes[0]]
    return Rope(_theta(settings), None, context)


def _theta(settings: Mapping[str, Any], where: str = 'config.json') -> float:
    if settings.get('rope_theta') is None:
        return 1e4
    return number(settings, 'rope_theta', where)


def _read(settings: Mapping[str, Any], home: str, context: int) -> Rope:
    where, rope = f'config.json: {home}', settings[home]
    if isinstance(rope, dict) and all(isinstance(value, dict) for value in rope.values()):
        # One for each type of layer.
        (rope, *others) = rope.values()
        if any(other != rope for other in others):
            raise UserError(f'{where} differs from layer to layer, which is not supported')
    if not isinstance(rope, dict):
        raise UserError(f'{where} = {short(rope)} is not supported, only an object with rope_type')
    rope = {name: value for name, value in rope.items() if value is not None}
    named = [name for name in ('rope_type', 'type') if name in rope]
    for name in named:
        if not isinstance(rope[name], str):
            raise unsupported(where, name, rope)
    kinds = {_ALIASES.get(rope[name], rope[name]) for name in named} or {'default'}
    for kind in kinds:
        if kind not in _FIELDS:
            raise UserError(
                f'{where}.rope_type = {short(kind)} is not supported, only {", ".join(_FIELDS)}'
            )
    if len(kinds) > 1:
        raise UserError(f'{where}: rope_type and type say different things: remove one')
    (kind,) = kinds
    for name, value in rope.items():
        if name in _ELSEWHERE and value not in _ELSEWHERE[name]:
            raise unsupported(where, name, rope)
        if isinstance(value, dict):  # of one type of layer, beside settings of all
            raise unsupported(where, name, rope)
        if name not in _KNOWN:  # what another kind would read is ignored there as well
            log.warning('%s.%s = %r is not known, and ignored', where, name, value)
    theta = _theta({'rope_theta': settings.get('rope_theta'), **rope}, where)
    if kind in ('llama3', 'yarn', 'longrope'):
        outer = settings.get(_ORIGINAL)  # as Phi-3's files have it
        rope[_ORIGINAL] = rope.get(_ORIGINAL, context) if outer is None else outer
    return _KINDS[kind](rope, where, theta, context)


def _default(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    return Rope(theta, None, context)


def _linear(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    return Rope(theta, Linear(number(rope, 'factor', where)), context)


def _dynamic(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    # max_position_embeddings is the original context there, beyond which the base grows.
    factor = number(rope, 'factor', where)
    return Rope(theta, Dynamic(factor, context), max(context, int(context * factor)))


def _llama3(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    names = ('factor', 'low_freq_factor', 'high_freq_factor')
    factor, low, high = (number(rope, name, where) for name in names)
    return Rope(theta, RopeScaling(factor, low, high, count(rope, _ORIGINAL, where)), context)


def _yarn(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    original = count(rope, _ORIGINAL, where)
    factor = _factor(rope, where, context, original)
    attention = number(rope, 'attention_factor', where) if 'attention_factor' in rope else None
    if attention is None and rope.get('mscale') and rope.get('mscale_all_dim'):
        scales = (number(rope, name, where) for name in ('mscale', 'mscale_all_dim'))
        # DeepSeek's way to write it.
        over, under = (1 + (paper_factor(factor) - 1) * scale for scale in scales)
        attention = over / under
    truncate = rope.get('truncate', True)
    if not isinstance(truncate, bool):
        raise unsupported(where, 'truncate', rope)
    scaling = Yarn(
        factor,
        original,
        attention_factor=attention,
        beta_fast=number(rope, 'beta_fast', where) if rope.get('beta_fast') else 32.0,
        beta_slow=number(rope, 'beta_slow', where) if rope.get('beta_slow') else 1.0,
        truncate=truncate,
    )
    # Some name the original context as the longest, as the instructions for Qwen 2.5 do.
    return Rope(theta, scaling, context if context > original else int(original * factor))


def _longrope(rope: Mapping[str, Any], where: str, theta: float, context: int) -> Rope:
    original = count(rope, _ORIGINAL, where)
    factor = _factor(rope, where, context, original)
    if original < 2:
        raise unsupported(where, _ORIGINAL, rope)
    if 'attention_factor' in rope:
        attention = number(rope, 'attention_factor', where)
    else:
        attention = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))

    def listed(name: str) -> tuple[float, ...]:
        values = rope.get(name)
        if not isinstance(values, list) or not values:
            raise UserError(f'{where}.{name} is missing, or no list of numbers')
        return tuple(number({name: value}, name, where) for value in values)

    short, long = listed('short_factor'), listed('long_factor')
    return Rope(theta, LongRope(short, long, original, attention), context)


def _factor(rope: Mapping[str, Any], where: str, context: int, original: int) -> float:
    """As written, or implied by the contexts."""
    return number(rope, 'factor', where) if 'factor' in rope else context / original


_KINDS: dict[str, Callable[[Mapping[str, Any], str, float, int], Rope]] = {
    'default': _default,
    'linear': _linear,
    'dynamic': _dynamic,
    'llama3': _llama3,
    'yarn': _yarn,
    'longrope': _longrope,
}


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say the same, for transformers 4 and 5."""
    scaling, context = config.rope_scaling, config.context
    rope: dict[str, Any] = {}
    match scaling:
        case Linear(factor):
            rope = {'rope_type': 'linear', 'factor': factor}
        case Dynamic(factor, original):
            rope, context = {'rope_type': 'dynamic', 'factor': factor}, original
        case RopeScaling(factor, low, high, original):
            rope = {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low}
            rope |= {'high_freq_factor': high, _ORIGINAL: original}
        case Yarn(factor, original):
            rope = {'rope_type': 'yarn', 'factor': factor, _ORIGINAL: original}
            rope |= {'beta_fast': scaling.beta_fast, 'beta_slow': scaling.beta_slow}
            rope |= {'truncate': scaling.truncate}
            if scaling.attention_factor is not None:
                rope['attention_factor'] = scaling.attention_factor
        case LongRope(short, long, original, attention):
            rope = {'rope_type': 'longrope', 'short_factor': [*short], 'long_factor': [*long]}
            rope |= {_ORIGINAL: original, 'attention_factor': attention}
            rope['factor'] = context / original
    theta = config.rope_theta
    settings: dict[str, Any] = {'max_position_embeddings': context, 'rope_theta': theta}
    if rope:
        settings['rope_scaling'] = dict(rope)
    if isinstance(scaling, LongRope):  # where transformers 4 looks for it alone
        settings[_ORIGINAL] = scaling.original_context
    return {**settings, 'rope_parameters': {'rope_type': 'default', **rope, 'rope_theta': theta}}
