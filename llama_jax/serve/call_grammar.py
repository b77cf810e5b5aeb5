"""The grammar of calls of functions, for the library llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_jax.text.calls import CallFormat


def of(
    format_: CallFormat,
    arguments: Mapping[str, str],
    *,
    several: bool,
    control: Mapping[str, int],
    answer: str | None,
) -> str:
    """Calls as `format_` writes them, one or `several`; or `answer`, a grammar, instead.

    `arguments`: by the names of functions, grammars of their own, so that the references of a
    schema stay within it. `control`: ids of the tags that are control tokens.
    """
    parts = {f'arguments{i}': grammar for i, grammar in enumerate(arguments.values())}
    start = 'start: calls\n'
    if answer is not None:
        start = 'start: calls | @answer\n'
        parts['answer'] = answer
    lark = start + _lark(format_, list(arguments), several, control)
    grammars: list[dict[str, Any]] = [{'lark_grammar': lark}]
    for name, part in parts.items():
        (grammar,) = json.loads(part)['grammars']
        grammars.append({**grammar, 'name': name})
    return json.dumps({'grammars': grammars})


def closed(schema: Any) -> Any:
    """A schema of arguments without those that it does not name: a function takes no others, and a
    small model would go on inventing them. What states `additionalProperties` keeps them, as do
    objects that are put together by allOf, each part of which would exclude the others."""
    return schema if 'allOf' in _keywords(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in ('properties', '$defs', 'definitions'):
        if isinstance(made.get(key), dict):
            made[key] = {name: _closed(one) for name, one in made[key].items()}
    if 'items' in made:
        made['items'] = _closed(made['items'])
    named, required = made.get('properties'), made.get('required')
    whole = isinstance(named, dict) and not made.keys() & _OPEN
    if isinstance(named, dict) and isinstance(required, list):
        # What is required has to be possible, though no property says what it is.
        whole = whole and named.keys() >= {*map(str, required)}
    for key in ('anyOf', 'oneOf'):
        if 'properties' not in made and isinstance(made.get(key), list):
            made[key] = [_closed(one) for one in made[key]]
    return {**made, 'additionalProperties': False} if whole else made


_OPEN = {
    *('additionalProperties', 'unevaluatedProperties', 'patternProperties', 'propertyNames'),
    *('anyOf', 'oneOf', '$ref', 'if', 'dependentSchemas'),
}
"""What says more about the properties of an object."""


def _keywords(schema: Any) -> set[str]:
    found: set[str] = set()
    level = [schema]
    while level:
        one = level.pop()
        if isinstance(one, dict):
            found |= one.keys()
            level += one.values()
        elif isinstance(one, list):
            level += one
    return found


def _lark(format_: CallFormat, names: list[str], several: bool, control: Mapping[str, int]) -> str:
    """The rule `calls`, in which `@arguments0` stands for the arguments of the first name."""

    def tag(text: str) -> str:
        return f'<[{control[text]}]>' if text in control else _quoted(text)

    heads = [
        f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{format_.key}": ' for name in names
    ]
    each = ' | '.join(f'{_quoted(head)} @arguments{i} "}}"' for i, head in enumerate(heads))
    before = f'{tag(format_.opening)} {_quoted(format_.blank)}'
    behind = f'{_quoted(format_.blank)} {tag(format_.closing)}'
    if format_.array:
        more = '(", " call)*' if several else ''
        calls = f'{before} "[" call {more} "]" {behind}'
    else:
        several = several and bool(format_.between)
        more = f'({_quoted(format_.between)} {before} call {behind})*' if several else ''
        calls = f'{before} call {behind} {more}'
    return f'calls: {calls}\ncall: {each}\n'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ''
