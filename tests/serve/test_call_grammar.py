"""Grammars of calls: arguments are what the schema names."""

import pytest

from llama_jax.serve.call_grammar import closed
from llama_jax.serve.grammar import Compiler
from llama_jax.text.calls import call_format
from tests.serve.calling import HERMES, VOCABULARY


def test_arguments_are_those_that_the_schema_names():
    point = {'type': 'object', 'properties': {'x': {'type': 'integer'}}}
    shut = {**point, 'additionalProperties': False}
    either = {'anyOf': [point, {'type': 'null'}]}
    for schema, expected in (
        (point, shut),
        ({'type': 'object'}, {'type': 'object'}),
        ({**point, 'additionalProperties': True}, {**point, 'additionalProperties': True}),
        ({**point, 'anyOf': [point]}, {**point, 'anyOf': [point]}),
        (either, {'anyOf': [shut, {'type': 'null'}]}),
        ({'items': point, '$defs': {'p': point}}, {'items': shut, '$defs': {'p': shut}}),
        ({'properties': {'allOf': point}}, {'properties': {'allOf': point}}),
        ({'allOf': [point, either]}, {'allOf': [point, either]}),
        (True, True),
    ):
        assert closed(schema) == expected
    # What is required and said nowhere is possible, with any value.
    open_ = {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'required': ['a', 'b']}
    assert closed(open_) == open_
    nested = {'properties': {'p': point}}
    assert closed(nested) == {'properties': {'p': shut}, 'additionalProperties': False}
    assert nested == {'properties': {'p': point}}, 'what was given stays'


@pytest.mark.parametrize(
    'schema',
    [
        {'type': 'string', 'pattern': r'^(?!^[-+.]*$)\d*\.?\d*$'},  # pydantic's Decimal
        {
            'oneOf': [
                {'type': 'object', 'properties': {'k': {'const': k}}, 'required': ['k']}
                for k in ('a', 'b')
            ]
        },
    ],
)
def test_schemas_that_are_rewritten_are_closed_as_well(schema):
    """What is put into them for the library is no allOf of the client's."""
    grammars = Compiler(VOCABULARY, vocab=VOCABULARY.vocab_size, end_ids=(256,))
    parameters = {'type': 'object', 'properties': {'p': schema}}
    value = '"1"' if 'pattern' in schema else '{"k": "a"}'

    def takes(arguments):
        grammar = grammars.calls(call_format(HERMES), {'f': parameters})
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        for token in VOCABULARY.encode(text).tolist():
            if not grammar.mask()[token]:
                return False
            grammar.accept(token)
        return True

    assert takes(f'{{"p": {value}}}')
    assert not takes(f'{{"p": {value}, "x": 1}}') and not takes('{"x": 1}')
    assert not takes('{"p": {"k": "a", "x": 1}}')
