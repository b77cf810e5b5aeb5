"""Values of settings that others wrote, checked before they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import UserError


def number(room: Mapping[str, Any], name: str, where: str, default: float | None = None) -> float:
    """A positive number among settings. Raises UserError where there is none, nor a default;
    `where` says whose settings these are, 'config.json' or 'config.json: rope_scaling'."""
    value = room.get(name)
    if value is None:
        value = default
    if value is None:
        raise UserError(f'{at(where, name)} is missing')
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f'{at(where, name)} = {short(value)} is no positive number')
    return float(value)


def count(room: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """A positive whole number among settings; see `number`."""
    value = number(room, name, where, default)
    if value != int(value):
        raise UserError(f'{at(where, name)} = {short(value)} is no whole number')
    return int(value)


def unsupported(where: str, name: str, room: Mapping[str, Any]) -> UserError:
    """For a setting with a value that the decoder does not have."""
    return UserError(f'{at(where, name)} = {short(room[name])} is not supported')


def at(where: str, name: str) -> str:
    """A setting by the name of its file, and of what it is in."""
    return f'{where}.{name}' if ':' in where else f'{where}: {name}'


def short(value: Any) -> str:
    """For a line of an error, which is to stay one."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + '...'
