"""Frozen settings as plain values, for records, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from llama_jax import optim
from llama_jax.errors import UserError
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.base import Objective
from llama_jax.optim.base import OptimizerConfig

OWN_MODULE = '__configuration__'
"""The name that a user's own file of a configuration has as a module."""
_OWN: dict[str, type] = {}


def know(module: types.ModuleType) -> None:
    """Objectives that a file of a configuration defines can be written down and read back. Raises
    UserError for one that is called like one of the project."""
    _OWN.clear()
    for name, cls in vars(module).items():
        own = isinstance(cls, type) and cls.__module__ == module.__name__
        if own and dataclasses.is_dataclass(cls) and hasattr(cls, 'loss'):
            if name in _ours():
                raise UserError(
                    f'{module.__file__} defines an objective {name}, and there is one of that name '
                    'already: give it another'
                )
            _OWN[name] = cls  # type: ignore[assignment]


def own_names() -> set[str]:
    """The objectives that are known from the file of a configuration."""
    return {*_OWN}


def own_classes(record: Any) -> set[str]:
    """The classes that a record of an objective names and the project does not have."""
    return all_classes(record) - {*_ours()}


def all_classes(record: Any) -> set[str]:
    """The classes that a record of an objective names."""
    if isinstance(record, dict):
        found = set().union(*map(all_classes, record.values()))
        return found | {record['class']} if 'class' in record else found
    return set().union(*map(all_classes, record)) if isinstance(record, list) else set()


def _ours() -> dict[str, type]:
    return {cls.__name__: cls for cls in REGISTRY.values()}


def to_plain(value: Any, declared: Any = None) -> Any:
    """Dicts, lists and scalars that JSON can hold. Where several dataclasses may stand (by the
    declared type, a union), the class is recorded by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        fields = {
            field.name: to_plain(getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(value)
        }
        several = declared is not None and len(_classes(declared)) != 1
        return {'class': type(value).__name__, **fields} if several else fields
    if isinstance(value, (list, tuple)):
        (inner,) = {a for a in typing.get_args(declared) if a is not ...} or {None}
        return [to_plain(item, inner) for item in value]
    return value


def from_plain(declared: Any, plain: Any) -> Any:
    """The value of the declared type which `to_plain` made plain.

    A field that the record lacks has its default: settings that came later. Raises UserError for a
    field or class that is not known here.
    """
    if isinstance(plain, dict):
        classes = _classes(declared)
        name = plain.get('class', next(iter(classes), None))
        if name not in classes:
            raise UserError(
                f'the record names a {name!r}, which this version does not know '
                f'(known: {", ".join(classes)}): use the version that wrote it, or define it in '
                'the file of the configuration itself'
            )
        cls = classes[name]
        hints = typing.get_type_hints(cls)
        values = {key: value for key, value in plain.items() if key != 'class'}
        for key in values:
            if key not in hints:
                raise UserError(
                    f'the record has the setting {key!r} of {name}, which this version does not '
                    'know: use the version that wrote it'
                )
        return cls(**{key: from_plain(hints[key], value) for key, value in values.items()})
    if isinstance(plain, list):
        inner = next((a for a in _arguments(declared) if a is not ...), None)
        return tuple(from_plain(inner, item) for item in plain)
    return plain


def _arguments(declared: Any) -> tuple[Any, ...]:
    """What stands within tuple[...], also where None may stand instead."""
    for option in _options(declared):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)
    return ()


def _options(declared: Any) -> tuple[Any, ...]:
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return typing.get_args(declared)
    return (declared,)


def _classes(declared: Any) -> dict[str, type]:
    """The dataclasses of a declared type, by name: of a protocol all that are registered."""
    if Objective in _options(declared):
        return _ours() | _OWN
    if OptimizerConfig in _options(declared):  # a record of before there were several is of AdamW
        return {cls.__name__: cls for cls in optim.REGISTRY.values()}
    return {
        option.__name__: option
        for option in _options(declared)
        if isinstance(option, type) and dataclasses.is_dataclass(option)
    }
