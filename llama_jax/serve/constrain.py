"""What text a caller allows: `response_format` and `regex` to grammars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_jax.engine.request import Grammar
from llama_jax.errors import UserError
from llama_jax.serve.body import Fields, shown
from llama_jax.serve.errors import ApiError
from llama_jax.serve.served import MakeGrammar
from llama_jax.serve.tools import demands_calls


def asks_for_grammar(body: Mapping[str, Any]) -> bool:
    """Whether a body, not checked yet, names something to compile."""
    named = any(body.get(name) is not None for name in ('response_format', 'regex'))
    return named or demands_calls(body)


def wanted_format(fields: Fields) -> dict[str, Any] | None:
    """What MakeGrammar takes; None for plain text."""
    given, regex = fields.object('response_format') or None, fields.text('regex', '')
    if regex:
        if given is not None:
            fields.bad('regex', 'is given with response_format: give one of them')
        return {'type': 'regex', 'regex': regex}
    if given is None:
        return None
    path = 'response_format.'
    inner = Fields(given, known={'type', 'json_schema', 'schema'}, path=path)
    kind = inner.text('type', '')
    if inner.has('json_schema') and kind != 'json_schema':
        inner.bad('json_schema', "is given without type 'json_schema'")
    if inner.has('schema') and kind != 'json_object':
        inner.bad('schema', 'stands within json_schema: give it there')
    if kind == 'text':
        return None
    if kind == 'json_object':  # with a schema, as clients of llama.cpp write it
        schema = inner.object('schema')
        return {'type': kind} if schema is None else {'type': 'json_schema', 'schema': schema}
    if kind != 'json_schema':
        inner.bad('type', f"is {shown(kind)}: give 'text', 'json_object' or 'json_schema'")
    about = Fields(
        inner.object('json_schema') or {},
        known={'name', 'description', 'schema', 'strict'},
        path=f'{path}json_schema.',
    )
    about.text('name', None)
    about.text('description', None)
    about.boolean('strict')
    schema = about.object('schema')
    if schema is None:
        about.bad('schema', 'is missing: give a JSON schema')
    return {'type': kind, 'schema': schema}


def grammar(make: MakeGrammar | None, wanted: dict[str, Any]) -> Grammar:
    """A new one. Raises ApiError where there are none, or the schema or pattern cannot be held."""
    if wanted.get('answer'):
        grammar(make, wanted['answer'])  # a fault of it has the name of its own field
    name = {'regex': 'regex', 'calls': 'tool_choice'}.get(wanted['type'], 'response_format')
    if make is None:
        raise ApiError(
            400,
            f'{name} is not supported: leave it out',
            param=name,
            code='unsupported_parameter',
        )
    try:
        return make(wanted)
    except UserError as error:
        param = 'tools' if name == 'tool_choice' else name
        raise ApiError(400, str(error), param=param) from None
