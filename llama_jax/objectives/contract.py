"""Whether an objective of one's own keeps the contract of `base.Objective`: names and parameters of
its methods, and what its loss returns. What is told here would else be a traceback later on, or
nothing at all."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.data.record import Text
from llama_jax.errors import UserError
from llama_jax.objectives import REGISTRY
from llama_jax.objectives.base import Base, Loss, Objective

log = logging.getLogger(__name__)

_PROPERTIES = (property, functools.cached_property)
_NEAR = 0.8
"""How alike a name is to one of the contract that it was meant to be."""


def check(objective: Any) -> None:
    """Raise UserError for an objective, or a part of one, that is not of this project and is none:
    it names the class and what it lacks."""
    if isinstance(objective, type):
        name = objective.__name__
        raise UserError(f'the objective is the class {name}: give one of them, such as {name}()')
    for one in _with_parts(objective, of_run=True):
        if type(one) not in REGISTRY.values():
            _check_kind(type(one))
            _check_class(type(one))
            _check_needed(one)


def checked(loss: Any, objective: Any) -> Loss:
    """What `objective.loss` returned. Raises UserError where it is no sum over a batch."""
    name = type(objective).__name__
    if not isinstance(loss, Loss):
        raise UserError(
            f'{name}.loss returns {type(loss).__name__}: return Loss(total, weight, metrics), sums '
            'over the batch'
        )
    for what, x in (('total', loss.total), ('weight', loss.weight)):
        shape = jax.numpy.shape(x)
        if shape:
            raise UserError(
                f'{name}.loss returns {what} of shape {list(shape)}: sum it over the batch'
            )
    return loss


def _with_parts(value: Any, *, of_run: bool = False) -> Iterator[Any]:
    """An objective, and those that it is made of."""
    if of_run or hasattr(value, 'loss'):
        yield value
    if isinstance(value, tuple | list):
        for one in value:
            yield from _with_parts(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _with_parts(getattr(value, field.name))


def _check_kind(cls: type) -> None:
    made = getattr(cls, '__dataclass_params__', None)
    fields = [x for x in vars(cls).get('__annotations__', {}).values() if 'ClassVar' not in str(x)]
    # A class that adds no fields may leave it to its base.
    if made is None or not made.frozen or (fields and '__dataclass_params__' not in vars(cls)):
        raise UserError(
            f'{cls.__name__} is no frozen dataclass: put @dataclass(frozen=True) above it'
        )
    if '<locals>' in cls.__qualname__:
        raise UserError(
            f'{cls.__name__} is defined inside a function, where no run finds it again: put it at '
            'the top of the file'
        )


def _contract() -> dict[str, Any]:
    """Name to method or property."""
    found: dict[str, Any] = {}
    for cls in reversed(Objective.__mro__):
        for name, member in vars(cls).items():
            if not name.startswith('_') and isinstance(member, (*_PROPERTIES, type(_contract))):
                found[name] = member
    return found


def _check_class(cls: type) -> None:
    contract = _contract()
    _check_misspelt(cls, contract)
    for name, wanted in contract.items():
        found = inspect.getattr_static(cls, name, dataclasses.MISSING)
        of_field = name in {field.name for field in dataclasses.fields(cls)}
        if found is dataclasses.MISSING and not of_field:
            raise UserError(f'{cls.__name__} has no {name}{_near(name, cls)}: derive it from Base')
        if isinstance(wanted, _PROPERTIES):
            if inspect.isfunction(found):
                raise UserError(
                    f'{cls.__name__}.{name} is a method, and is read as a property: put @property '
                    'above it'
                )
        elif inspect.isfunction(found):
            _check_parameters(cls, name, found, wanted)


def _check_parameters(cls: type, name: str, found: Any, wanted: Any) -> None:
    """Those of the contract have to be there, by their names, and none that it does not give."""
    own, given = (inspect.signature(f).parameters for f in (found, wanted))
    kinds = {p.kind for p in own.values()}
    lacks = [
        p.name
        for p in given.values()
        if p.name not in own
        and (p.VAR_KEYWORD if p.kind is p.KEYWORD_ONLY else p.VAR_POSITIONAL) not in kinds
    ]
    more = [
        p.name
        for p in own.values()
        if p.name not in given
        and p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    # Where a parameter may be given by position here and not there, types of the command line
    # take the two for different methods.
    place = [
        p.name
        for p in given.values()
        if p.name in own and p.kind is p.KEYWORD_ONLY and own[p.name].kind is not p.KEYWORD_ONLY
    ]
    if lacks or more or place:
        wrong = ', '.join([*lacks, *more, *place])
        raise UserError(
            f'{cls.__name__}.{name} takes {_told(own)}, and is called with {_told(given)}: mend '
            f'{wrong}'
        )


class _Some:
    def __repr__(self) -> str:
        return '...'


def _told(parameters: Any) -> str:
    """Parameters as they are written, without types and values."""
    plain = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else _Some())
        for p in parameters.values()
    ]
    return str(inspect.Signature(plain))


def _check_misspelt(cls: type, contract: dict[str, Any]) -> None:
    """Say so of a member that is nearly one of the contract, of which the usual one is used;
    names that objectives of this project have for themselves, such as `encode`, are meant."""
    ours = {base for one in REGISTRY.values() for base in one.__mro__}
    for name, member in vars(cls).items():
        is_property = isinstance(member, _PROPERTIES)
        if not (is_property or inspect.isfunction(member)) or name.startswith('_'):
            continue
        if name in contract or any(name in vars(base) for base in (*cls.__mro__[1:], *ours)):
            continue
        alike = [
            known
            for known, wanted in contract.items()
            if known not in vars(cls) and isinstance(wanted, _PROPERTIES) == is_property
        ]
        near = difflib.get_close_matches(name, alike, 1, _NEAR)
        if near:
            log.warning('%s has %s, which nobody calls: was %s meant?', cls.__name__, name, near[0])


def _check_needed(objective: Any) -> None:
    """What `Base` has no usual answer for."""
    cls = type(objective)
    own = ['encoded', 'whole', 'example'] if objective.reads is not Text else ['sizes', 'example']
    needed = ['loss', 'flops', *(['beside'] if objective.joins else own)]
    for name in needed:
        if getattr(cls, name, None) in (None, getattr(Base, name, None)):
            raise UserError(f'{cls.__name__} has no {name}{_near(name, cls)}')


def _near(name: str, cls: type) -> str:
    near = difflib.get_close_matches(
        name, [x for x in vars(cls) if not x.startswith('_')], 1, _NEAR
    )
    return f' (there is {near[0]})' if near else ''
