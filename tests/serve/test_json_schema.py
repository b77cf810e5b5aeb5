"""Schemas as clients' libraries write them: held, with the same texts, or refused in one line."""

import itertools
import time

import jsonschema
import pytest

from llama_jax.errors import UserError
from llama_jax.serve import json_schema
from llama_jax.serve.json_schema import DEEPEST, FORMATS, LONGEST, MOST, held
from tests.serve.test_grammar import VOCABULARY, compiler


def record(**properties):
    return {
        **{'type': 'object', 'properties': properties, 'required': [*properties]},
        'additionalProperties': False,
    }


CAT = record(kind={'const': 'cat', 'type': 'string'}, meows={'type': 'integer'})
DOG = record(kind={'enum': ['dog', 'wolf']}, barks={'type': 'number'})
ANIMALS = {'Cat': CAT, 'Dog': DOG}
REFERENCES = [{'$ref': '#/$defs/Cat'}, {'$ref': '#/$defs/Dog'}]
TAGGED = {
    'oneOf': REFERENCES,
    'discriminator': {'propertyName': 'kind', 'mapping': {'cat': '#/$defs/Cat'}},
}
NODE = record(
    v={'type': 'integer'},
    next={'anyOf': [{'$ref': '#/$defs/Node'}, {'type': 'null'}], 'default': None},
)
DECIMAL = r'^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$'
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9-]*\.)+[a-z]{2,}$"
REAL = {
    # pydantic: a tagged union at the root, in a field, in a list; optional fields; a recursion.
    'union': (
        {'$defs': ANIMALS, **TAGGED},
        ['{"kind":"cat","meows":1}', '{"kind":"wolf","barks":1.5}'],
        ['{"kind":"dog","meows":1}', '{"kind":"cat"}', '1'],
    ),
    'tagged': (
        {'$defs': ANIMALS, **record(pet={**TAGGED, 'title': 'Pet'})},
        ['{"pet":{"kind":"dog","barks":0}}'],
        ['{"pet":{"kind":"dog","meows":0}}', '{"pet":null}'],
    ),
    'numbers': (
        {'type': 'array', 'items': {'oneOf': [record(k={'const': 1}), record(k={'const': 2})]}},
        ['[{"k":1},{"k":2}]', '[]'],
        ['[{"k":3}]', '[{}]'],
    ),
    'optional': (
        record(a={'anyOf': [{'type': 'string', 'maxLength': 3}, {'type': 'null'}], 'title': 'A'}),
        ['{"a":"你好"}', '{"a":null}'],
        ['{"a":1}', '{"a":"aaaa"}'],
    ),
    'recursive': (
        {'$defs': {'Node': NODE}, '$ref': '#/$defs/Node'},
        ['{"v":1,"next":{"v":2,"next":null}}'],
        ['{"v":1,"next":1}'],
    ),
    'decimal': (
        record(d={'anyOf': [{'type': 'number'}, {'type': 'string', 'pattern': DECIMAL}]}),
        ['{"d":"-01.50"}', '{"d":".5"}', '{"d":"5."}', '{"d":2}'],
        ['{"d":"-."}', '{"d":""}', '{"d":"1e"}', '{"d":"a"}'],
    ),
    'bytes': (
        record(b={'type': 'string', 'format': 'binary'}, i={'type': 'integer', 'format': 'int32'}),
        ['{"b":"x","i":3}'],
        ['{"b":1'],
    ),
    # zod: an address, records, formats of its own, a union of types.
    'email': (
        {'type': 'string', 'format': 'zod-email', 'pattern': EMAIL},
        ['"a.b@c.org"', '"a@b.c.de"'],
        ['".a@c.org"', '"a..b@c.org"', '"a.@c.org"', '"a"'],
    ),
    'record': (
        {
            **{'$schema': 'https://json-schema.org/draft/2020-12/schema', 'type': 'object'},
            'propertyNames': {'type': 'string'},
            'additionalProperties': {'type': 'number'},
        },
        ['{"a":1,"b":2.5}', '{}'],
        ['{"a":"1"}'],
    ),
    'names': (
        {
            **{'type': 'object', 'propertyNames': {'type': 'string', 'enum': ['a', 'b']}},
            **{'additionalProperties': {'type': 'number'}, 'required': ['a', 'b']},
        },
        ['{"a":1,"b":2}'],
        ['{"c":1', '{"a":1}'],
    ),
    'patterned': (
        {'propertyNames': {'pattern': '^x'}, 'type': 'object', 'additionalProperties': True},
        ['{"x1":[]}'],
        ['{"y":1'],
    ),
    'starts': (
        record(a={'type': 'string', 'minLength': 2, 'format': 'starts_with', 'pattern': '^x.*'}),
        ['{"a":"xy"}'],
        ['{"a":"x"}', '{"a":"yx"}'],
    ),
    'types': (
        {'oneOf': [{'type': ['string', 'null']}, {'type': 'number'}, {'type': 'boolean'}]},
        ['"a"', 'null', '1.5', 'true'],
        ['[]', '{}'],
    ),
    # Others: OpenAPI's words, OpenAI's strict form, forms of nothing.
    'openapi': (
        {**record(format={'type': 'string', 'nullable': True, 'example': 'a'}), 'x-order': [1]},
        ['{"format":"a"}'],
        ['{"format":1}'],
    ),
    'nothing': (
        {**{'type': 'array', 'items': {'type': 'integer'}}, 'uniqueItems': False},
        ['[1,1]'],
        ['["a"]'],
    ),
}


def takes(grammar, text):
    """Whether a text of single bytes is all that a grammar allows, from its beginning to an end."""
    for token in text.encode():
        if not grammar.mask()[token]:
            return False
        grammar.accept(token)
    return bool(grammar.mask()[list(VOCABULARY.end_ids)].all())


@pytest.mark.parametrize('name', REAL)
def test_real_schemas_hold(name):
    schema, right, wrong = REAL[name]
    for text in right:
        assert takes(compiler().json_schema(schema), text), text
    for text in wrong:
        assert not takes(compiler().json_schema(schema), text), text


VALUES = [None, True, False, 0, 1, 1.0, 2, 1.5, '', 'a', 'ab', '..', '-', '5', [], [1], [1, 1], {}]
VALUES += [{'k': k} for k in (None, True, 0, 1, 'a', 'b')]
VALUES += [{'k': 'a', 'x': 1}, {'x': 1}, {'x': 'a'}, {'k': 1, 'x': 2}]
PARTS = [
    *(True, False, {}, {'type': 'integer'}, {'type': 'number'}, {'type': ['string', 'null']}),
    *({'const': 1}, {'const': True}, {'const': 1.0}, {'const': 'a'}, {'enum': [0, 'a', None]}),
    *({'type': 'array'}, {'type': 'object'}, record(k={'const': 'a'}), record(k={'const': 1})),
    {'type': 'object', 'properties': {'k': {'const': 'b'}}},
    {'properties': {'k': {'const': 'b'}}, 'required': ['k']},
    {'type': 'object', 'required': ['x'], 'additionalProperties': {'type': 'integer'}},
    {'type': 'object', 'required': ['k'], 'patternProperties': {'^k': {'const': 'a'}}},
    {'$ref': '#/$defs/a'},
    {'$ref': '#/$defs/a~1b'},
    {'allOf': [{'const': 'a'}, {'minLength': 1}]},
    {'anyOf': [{'type': 'null'}, {'const': 2}]},
    {'oneOf': [{'const': 'b'}, {'const': 2}]},
    {'pattern': DECIMAL},
]


def test_what_is_made_holds_the_same_values():
    """Of every pair of branches, and beside other keywords: as the validator has it."""
    apart = 0
    for one, other in itertools.combinations(PARTS, 2):
        schema = {
            '$defs': {'a': {'type': 'string', 'minLength': 1}, 'a/b': {'type': 'array'}},
            'oneOf': [one, other],
        }
        made = held(schema)
        apart += 'oneOf' not in made
        for value in VALUES:
            found, right = (
                jsonschema.Draft202012Validator(one).is_valid(value) for one in (made, schema)
            )
            assert found == right, (schema, value)
    assert apart == 179, 'of 300 pairs: of the others most have a value in common'
    for unusual in ({'type': [[]]}, {'type': 'any'}, {'required': [[]]}, {'$ref': 3}, 3):
        assert 'oneOf' in held({'oneOf': [unusual, {'type': 'object'}]})
    both = {'oneOf': [{'const': 1}, {'const': 2}], 'allOf': [{'maximum': 1}], 'pattern': DECIMAL}
    for keys in itertools.permutations(both):
        made = held({key: both[key] for key in keys})
        assert [v for v in (0, 1, 2) if jsonschema.Draft202012Validator(made).is_valid(v)] == [1]


@pytest.mark.parametrize('name', sorted(FORMATS))
def test_formats_that_are_held(name):
    assert not takes(compiler().json_schema({'type': 'string', 'format': name}), '"%% %%"')


def nested(depth):
    schema = {'type': 'string'}
    for _ in range(depth):
        schema = {'items': schema}
    return schema


@pytest.mark.parametrize(
    ('schema', 'message'),
    [
        (nested(DEEPEST - 1), f'nested more than {DEEPEST} levels deep: flatten it'),
        ({'enum': [0] * (MOST - 1)}, f'more than {MOST} values: make it smaller'),
        ({'const': 'a' * (LONGEST - 4)}, f'more than {LONGEST} characters: make it smaller'),
        ({'properties': {'a' * LONGEST: True}}, f'more than {LONGEST} characters'),
        ({'oneOf': [{'type': 'integer'}, {'type': 'number'}]}, 'branches of a oneOf may be valid'),
        ({'oneOf': [{'minimum': 0}, {'maximum': 9}]}, 'a required property with another const, or'),
        ({'x-guidance': {'lenient': True}, 'not': {}}, 'Unimplemented keys: ."not"'),
        ({'type': 'object', 'propertyNames': {'maxLength': 3}}, 'propertyNames'),
        ({'propertyNames': {'pattern': []}, 'type': 'object'}, 'propertyNames'),
        ({'type': 'string', 'pattern': 'a(?!b)'}, 'look-around'),
        ({'oneOf': [{'const': 1e999}, {'const': 2}]}, 'no JSON schema'),
        ({'uniqueItems': True, 'type': 'array'}, 'uniqueItems'),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_refused(schema, message):
    with pytest.raises(UserError, match=message) as error:
        compiler().json_schema(schema)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_what_is_just_small_enough():
    for schema in (nested(DEEPEST - 2), {'enum': [0] * (MOST - 2)}, {'const': 'a' * (LONGEST - 5)}):
        assert held(schema) == schema


def test_comparing_branches_ends():
    begin = time.perf_counter()
    for key in ('anyOf', 'oneOf', 'allOf'):
        many = {'$defs': {'A': {key: [{'$ref': '#/$defs/A'}] * 90}}}
        many['oneOf'] = [{'$ref': '#/$defs/A'}] * 3
        assert 'oneOf' in held(many)
    assert 'oneOf' in held({'oneOf': [{'enum': list(range(i, 7000, 999))} for i in range(999)]})
    assert time.perf_counter() - begin < 5
    assert json_schema.held(True) is True
