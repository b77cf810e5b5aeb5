"""JSON schemas as clients send them, made into those that the library of grammars takes.

What is made holds the same texts. `format` is an annotation where the library has no rule for it,
as the standard lets it be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from llama_jax.errors import UserError

Schema = Any
"""An object of keywords, or true or false."""

DEEPEST, MOST, LONGEST = 100, 10_000, 200_000
"""Levels of a schema, its values, and their characters: what takes a second or two to compile."""

FORMATS = frozenset(
    {
        *('date-time', 'date', 'time', 'duration', 'email', 'hostname', 'ipv4', 'ipv6', 'uuid'),
        'uri',
    }
)
"""Formats of texts that are held."""
_NAMED = ('properties', 'patternProperties', '$defs', 'definitions', 'dependentSchemas')
_LISTED = ('anyOf', 'oneOf', 'allOf', 'prefixItems', 'items')
_SINGLE = (
    *('items', 'additionalItems', 'additionalProperties', 'propertyNames', 'contains', 'not'),
    *('if', 'then', 'else', 'unevaluatedItems', 'unevaluatedProperties'),
)
_NEUTRAL: dict[str, Any] = {'uniqueItems': False, 'minContains': 0, 'minProperties': 0}
_AHEAD = {
    '(?!^[-+.]*$)': '[^-+.]',  # pydantic's Decimal: not of signs and points alone
    r'(?!\.)': r'^([^.](.|\n)*)?$',  # zod's email: no point at the beginning
    r'(?!.*\.\.)': r'^\.?([^.]+\.?)*$',  # and not two in a row
}
"""What patterns of known makers forbid from where they begin on, which the library cannot read; and
what to ask for beside the rest of the pattern instead."""
_EFFORT, _FAR = 20_000, 30
"""Comparisons for the branches of a `oneOf`, and how deep they go, at most."""


def held(schema: Schema, change: Callable[[Schema], Schema] | None = None) -> Schema:
    """The schema for the library, after a `change` of its own. Raises UserError for one that is too
    large, before that."""
    _check_size(schema)
    if change is not None:
        schema = change(schema)
    if isinstance(schema, dict):
        schema = {key: value for key, value in schema.items() if key != 'x-guidance'}
    return _held(schema, schema)


def _check_size(schema: Schema) -> None:
    count = characters = depth = 0
    level = [schema]
    while level:
        depth += 1
        count += len(level)
        if depth > DEEPEST:
            raise UserError(
                f'the JSON schema is nested more than {DEEPEST} levels deep: flatten it'
            )
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                characters += sum(map(len, value))
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                characters += len(value)
        if count + len(below) > MOST:
            raise UserError(f'the JSON schema has more than {MOST} values: make it smaller')
        if characters > LONGEST:
            raise UserError(f'the JSON schema has more than {LONGEST} characters: make it smaller')
        level = below


def _held(schema: Schema, root: Schema) -> Schema:
    """Keywords stay in their order, which is that of properties in what is written."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if key == 'format' and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _NAMED and isinstance(value, dict):
            value = {name: _held(one, root) for name, one in value.items()}
        elif key in _LISTED and isinstance(value, list):
            value = [_held(one, root) for one in value]
        elif key in _SINGLE:
            value = _held(value, root)
        if key == 'oneOf' and isinstance(value, list) and _apart(schema[key], root):
            _add(made, 'anyOf', value)
        elif key == 'pattern' and isinstance(value, str):
            _add_pattern(made, value)
        elif key == 'allOf' and isinstance(value, list):
            made[key] = [*made.get(key, []), *value]
        else:
            made[key] = value
    return _without_names(made)


def _add(made: dict[str, Any], key: str, value: Any) -> None:
    """A keyword that may be there, or come, a second time."""
    made.setdefault('allOf', []).append({key: value})


def _add_pattern(made: dict[str, Any], pattern: str) -> None:
    rest, asked = pattern.removeprefix('^'), []
    if len(rest) < len(pattern):
        while ahead := next((one for one in _AHEAD if rest.startswith(one)), None):
            rest = rest.removeprefix(ahead)
            asked.append(_AHEAD[ahead])
    made['pattern'] = f'^{rest}' if asked else pattern
    for one in asked:
        _add(made, 'pattern', one)


def _without_names(schema: dict[str, Any]) -> dict[str, Any]:
    """`propertyNames`, which zod writes for records, by other keywords where these say the same."""
    names = schema.get('propertyNames')
    if not isinstance(names, dict) or names.get('type', 'string') != 'string':
        return schema
    rules = {key: value for key, value in names.items() if key != 'type'}
    rest = {key: value for key, value in schema.items() if key != 'propertyNames'}
    if not rules:
        return rest
    if len(rules) > 1 or schema.keys() & {'properties', 'patternProperties'}:
        return schema
    ((rule, value),) = rules.items()
    of_each = rest.get('additionalProperties', True)
    if rule == 'enum' and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return {**rest, 'properties': dict.fromkeys(value, of_each), 'additionalProperties': False}
    if rule == 'pattern' and isinstance(value, str):
        return {**rest, 'patternProperties': {value: of_each}, 'additionalProperties': False}
    return schema


def _apart(branches: list[Schema], root: Schema) -> bool:
    """Whether it is sure that no value is valid under two of the branches: whoever fulfils any of
    them then fulfils one of them."""
    compare = _Comparison(root)
    return all(
        compare.disjoint(one, other) for i, one in enumerate(branches) for other in branches[:i]
    )


class _Comparison:
    """Of schemas within one, two at a time. It gives up, for 'not sure', when that takes long."""

    def __init__(self, root: Schema):
        self._root, self._left = root, _EFFORT

    def disjoint(self, one: Schema, other: Schema, depth: int = 0) -> bool:
        """True only where it is sure that no value is valid under both."""
        self._left -= 1
        if one is False or other is False:
            return True
        if self._left < 0 or depth >= _FAR:
            return False
        if not isinstance(one, dict) or not isinstance(other, dict):
            return False
        kinds = _kinds(one) & _kinds(other)
        if not kinds or self._values_differ(one, other):
            return True
        for left, right in ((one, other), (other, one)):
            if '$ref' in left and self.disjoint(
                _target(left['$ref'], self._root), right, depth + 1
            ):
                return True
            if any(self.disjoint(part, right, depth + 1) for part in _list(left, 'allOf')):
                return True
            for key in ('anyOf', 'oneOf'):
                parts = _list(left, key)
                if parts and all(self.disjoint(part, right, depth + 1) for part in parts):
                    return True
        return kinds == {'object'} and any(
            self.disjoint(_property(one, name), _property(other, name), depth + 1)
            for name in {*_required(one), *_required(other)}
        )

    def _values_differ(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether constants tell them apart, from each other or from a type."""
        values = []
        for left, right in ((one, other), (other, one)):
            given, kinds = _values(left), _kinds(right)
            if given is not None:
                self._left -= len(given)
                values.append({_canonical(value) for value in given if _kind(value) in kinds})
        return bool(values) and not set.intersection(*values)


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """All that are valid, where the schema counts them up."""
    if 'const' in schema:
        return [schema['const']]
    return schema['enum'] if isinstance(schema.get('enum'), list) else None


def _canonical(value: Any) -> str:
    """Numbers that are equal are written alike, and unlike true and false."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return '[' + ','.join(map(_canonical, value)) + ']'
    if isinstance(value, dict):
        pairs = sorted((json.dumps(key), _canonical(one)) for key, one in value.items())
        return '{' + ','.join(f'{key}:{one}' for key, one in pairs) + '}'
    return json.dumps(value)


_ALL = frozenset({'null', 'boolean', 'integer', 'fraction', 'string', 'array', 'object'})


def _kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """Of the values that its `type` lets through."""
    given = schema.get('type')
    names: Iterable[Any] = given if isinstance(given, list) else [given]
    found: set[str] = set()
    for name in names:
        if name == 'number':
            found |= {'integer', 'fraction'}
        elif isinstance(name, str) and name in _ALL:
            found.add(name)
        else:
            return _ALL
    return frozenset(found)


def _kind(value: Any) -> str:
    if value is None:
        return 'null'
    if isinstance(value, bool):
        return 'boolean'
    if isinstance(value, int | float):
        return 'integer' if isinstance(value, int) or value.is_integer() else 'fraction'
    if isinstance(value, str):
        return 'string'
    return 'array' if isinstance(value, list) else 'object'


def _required(schema: Mapping[str, Any]) -> list[str]:
    return [name for name in _list(schema, 'required') if isinstance(name, str)]


def _property(schema: Mapping[str, Any], name: str) -> Schema:
    """What a property of that name has to fulfil."""
    properties = schema.get('properties')
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    return True if 'patternProperties' in schema else schema.get('additionalProperties', True)


def _target(reference: Any, root: Schema) -> Schema:
    """What a reference within the schema names; true where it cannot be told."""
    if not isinstance(reference, str) or not reference.startswith('#'):
        return True
    found = root
    for step in unquote(reference[1:]).split('/')[1:]:
        step = step.replace('~1', '/').replace('~0', '~')
        if not isinstance(found, dict) or step not in found:
            return True
        found = found[step]
    return found
