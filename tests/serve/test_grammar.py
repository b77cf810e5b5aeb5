"""Constrained output: whatever the weights are, what ends is valid."""

import functools
import json
import queue
import re
import threading
from dataclasses import replace

import jax
import jsonschema
import numpy as np
import pytest

from llama_jax import trees
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Finish, Piece, Request
from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls
from llama_jax.generate.programs import Programs
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.serve.grammar import Compiler
from llama_jax.text.sentencepiece_model import bytes_tokenizer

PIECES = [
    *('true', 'ue', '{"', '":', '", "', '  ', '\n ', 'name', '12', '-1', '.5', 'e+', '[]'),
    *('你', '你好', '好"', '世界', 'é', '😀', 'ab', 'abc', 'bc', '日'),
    *('你'.encode()[:2], '好'.encode()[1:], '😀'.encode()[:3], '界😀'.encode()[1:5]),
]
"""Whole characters, several of them, and parts of them."""
N_TEXT = 256 + len(PIECES)


class Vocabulary:
    """Bytes, PIECES, and control tokens: two end ids and one that ends nothing."""

    vocab_size, end_ids, bos_id = N_TEXT + 3, (N_TEXT, N_TEXT + 1), N_TEXT + 2

    def token_bytes(self, token):
        if token < 256:
            return bytes([token])
        piece = PIECES[token - 256] if token < N_TEXT else b''
        return piece if isinstance(piece, bytes) else piece.encode()

    def encode(self, text, *, continues=False, most=None):
        return np.array(list(text.encode()), np.int32)

    def decode(self, ids):
        return b''.join(map(self.token_bytes, ids)).decode(errors='replace')


VOCABULARY = Vocabulary()


def made(vocabulary):
    return Compiler(vocabulary, vocab=vocabulary.vocab_size, end_ids=vocabulary.end_ids)


compiler = functools.cache(lambda: made(VOCABULARY))


@pytest.fixture(scope='module')
def engine():
    config = ModelConfig(
        vocab=VOCABULARY.vocab_size,
        **dict(dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=32, context=256),
    )
    rng = np.random.default_rng(0)
    params = trees.map_named(
        lambda path, x: rng.normal(size=x.shape).astype(np.float32), layers.abstract(config)
    )
    programs = Programs(
        *(config, params),
        mesh=make(MeshConfig(), jax.devices()[:1]),
        compute=Compute(),
        end_ids=VOCABULARY.end_ids,
        pad_id=0,
    )
    engine = Engine(
        programs, token_bytes=VOCABULARY.token_bytes, rows=8, length=192, prefill_chunk=16
    )
    yield engine
    engine.close()


def texts(engine, make_grammar, n=24, **controls):
    """What `n` seeds write: those that ended by themselves, and those that were cut off."""
    events = queue.SimpleQueue()
    for seed in range(n):
        request = Request(
            [VOCABULARY.bos_id, 1 + seed % 9],
            replace(Controls(max_tokens=150, seed=seed), **controls),
            grammar=make_grammar(),
        )
        engine.submit(request, lambda event, seed=seed: events.put((seed, event)))
    text, ended = [''] * n, {}
    while len(ended) < n:
        seed, event = events.get(timeout=60)
        if isinstance(event, Piece):
            text[seed] += event.text
        elif isinstance(event, Finish):
            ended[seed] = event.reason
    assert set(ended.values()) <= {'stop', 'length'}
    stopped, cut = (
        [text[i] for i in range(n) if ended[i] == reason] for reason in ('stop', 'length')
    )
    return stopped, cut


PERSON = {
    'type': 'object',
    'properties': {
        'name': {'type': 'string', 'maxLength': 5},
        'age': {'type': 'integer', 'minimum': 0, 'maximum': 150},
        '标签': {'type': 'array', 'items': {'enum': ['你好', '世界', 'é😀']}, 'maxItems': 3},
        'good': {'type': 'boolean'},
    },
    'required': ['name', 'age', '标签'],
    'additionalProperties': False,
}
SCHEMAS = {
    'person': PERSON,
    'constant': {'const': {'你': ['好', None, -1.5]}},
    'choice': {'anyOf': [{'type': 'null'}, {'type': 'string', 'pattern': '^[你好😀]{1,4}$'}]},
    'nested': {
        'type': 'array',
        'minItems': 1,
        'maxItems': 2,
        'items': {'$ref': '#/$defs/leaf'},
        '$defs': {
            'leaf': {
                'type': 'object',
                'properties': {'x': {'type': 'number', 'minimum': -2, 'maximum': 2}},
                'required': ['x'],
                'additionalProperties': False,
            }
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SCHEMAS)
def test_what_ends_is_valid_under_its_schema(engine, name):
    schema = SCHEMAS[name]
    stopped, _ = texts(engine, lambda: compiler().json_schema(schema))
    assert len(stopped) > 12
    for text in stopped:
        jsonschema.validate(json.loads(text), schema)
    if name != 'constant':
        assert len(set(stopped)) > 3, 'and it is not always the same'


@pytest.mark.slow
def test_any_object(engine):
    """Few end by themselves under random weights, so quotes and braces are favoured."""
    bias = {ord(char): 6.0 for char in '"}:,'}
    for n_tried in range(2):
        temperature = 1.0 + n_tried
        stopped, cut = texts(
            engine, compiler().json_schema, logit_bias=bias, temperature=temperature
        )
        assert len(stopped) > 6
        assert all(isinstance(json.loads(text), dict) for text in stopped)
        assert all(text.startswith('{') for text in cut)


PATTERNS = ['(你好|世界|😀){1,3}', '[a-c]{2,6}é?', r'-?[0-9]{1,3}(\.5)?', 'a|ab|abc', '[日-月]{2}']


@pytest.mark.parametrize('pattern', PATTERNS)
def test_what_ends_is_matched_by_its_pattern(engine, pattern):
    stopped, cut = texts(engine, lambda: compiler().regex(pattern))
    assert len(stopped) == 24 and not cut, 'no longer text is possible'
    assert all(re.fullmatch(pattern, text) for text in stopped)
    assert len(set(stopped)) > 1


def test_free_rows_beside_a_constrained_one_are_the_same(engine):
    free = lambda: None  # noqa: E731
    alone = texts(engine, free, n=3, max_tokens=20)
    turns = iter([None, compiler().json_schema(PERSON), None])
    together = texts(engine, lambda: next(turns), n=3, max_tokens=20)
    assert [alone[1][0], alone[1][2]] == [t for t in together[1] if not t.startswith('{')]


WORDS = ['你好', '你们', 'ab', 'abc', 'abcé', '😀😁', '世界😀']


@pytest.mark.parametrize('kind', ['pieces', 'sentencepiece'])
@pytest.mark.parametrize('how', ['regex', 'schema'])
def test_masks_against_the_language_itself(how, kind):
    """Of a finite language: a token may come when the text with it begins a word, the end when the
    text is a word. Where only one text can follow, its first token is set: as it is encoded."""
    vocabulary = VOCABULARY if kind == 'pieces' else bytes_tokenizer()
    ours = made(vocabulary)
    pieces = [vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)]
    words = WORDS if how == 'regex' else [json.dumps(word, ensure_ascii=False) for word in WORDS]
    language = [word.encode() for word in words]
    rng = np.random.default_rng(0)
    for _ in range(30):
        text = b''
        grammar = ours.regex('|'.join(WORDS)) if how == 'regex' else None
        grammar = grammar or ours.json_schema({'enum': WORDS})
        while True:
            allowed = grammar.mask()
            expected = {
                i
                for i, piece in enumerate(pieces)
                if piece and any(word.startswith(text + piece) for word in language)
            }
            if text in language:
                expected |= set(vocabulary.end_ids)
            found = set(np.flatnonzero(allowed).tolist())
            following = {word.removeprefix(text) for word in language if word.startswith(text)}
            if len(following) == 1 and len(found) == 1:
                assert found <= expected
            else:
                assert found == expected
            assert allowed.dtype == bool and len(allowed) == vocabulary.vocab_size
            token = int(rng.choice(np.flatnonzero(allowed)))
            grammar.accept(token)
            if token in vocabulary.end_ids:
                assert set(np.flatnonzero(grammar.mask())) == set(vocabulary.end_ids)
                break
            text += pieces[token]
        assert text in language


def test_grammars_of_one_schema_do_not_share_their_text():
    one, other = compiler().regex('ab'), compiler().regex('ab')
    before = other.mask()
    thread = threading.Thread(target=one.accept, args=[ord('a')])
    thread.start()
    thread.join()
    assert set(np.flatnonzero(one.mask())) == {ord('b')}
    np.testing.assert_array_equal(other.mask(), before)


def test_blanks_in_json_are_few():
    grammar = compiler().json_schema()
    for char in '{\n' + ' ' * 40:
        assert grammar.mask()[ord(char)]
        grammar.accept(ord(char))
    assert not grammar.mask()[ord(' ')] and grammar.mask()[ord('"')]


@pytest.mark.parametrize(
    ('wanted', 'text'),
    [
        ({'type': 'json_object'}, '{"a": [1, null]}'),
        ({'type': 'json_schema', 'schema': {'type': 'integer'}}, '-12'),
        ({'type': 'regex', 'regex': '你+'}, '你你'),
    ],
)
def test_what_a_server_asks_for(wanted, text):
    grammar = compiler().make_grammar(wanted)
    for token in text.encode():
        assert grammar.mask()[token]
        grammar.accept(token)
    assert grammar.mask()[list(VOCABULARY.end_ids)].all()


@pytest.mark.parametrize(
    ('wanted', 'message'),
    [
        ({'type': 'regex', 'regex': 'a(b'}, 'regular expression cannot be held .unclosed group'),
        ({'type': 'regex', 'regex': '(?=a)b'}, 'look-around'),
        ({'type': 'regex', 'regex': '\ud800'}, 'no regular expression .*surrogates not allowed'),
        ({'type': 'regex', 'regex': r'(a)\1'}, 'backreferences are not supported'),
        ({'type': 'regex', 'regex': r'\bx'}, 'lookarounds not supported'),
        ({'type': 'json_schema', 'schema': {'type': 'foo'}}, 'Invalid type: foo'),
        ({'type': 'json_schema', 'schema': {'not': {}}}, 'Unimplemented keys: ."not"'),
        ({'type': 'json_schema', 'schema': {'$ref': '#/x'}}, "'/x' does not exist"),
        ({'type': 'json_schema', 'schema': {'anyOf': []}}, 'Unsatisfiable'),
        ({'type': 'json_schema', 'schema': {'const': float('nan')}}, 'this is no JSON schema'),
        ({'type': 'json_schema', 'schema': [1]}, 'JSON schema'),
        ({'type': 'xml'}, "'xml' is none of"),
    ],
)
def test_what_cannot_be_held_is_named(wanted, message):
    with pytest.raises(UserError, match=message) as error:
        compiler().make_grammar(wanted)
    assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_huge_grammars_are_refused_or_held_within_seconds():
    # Warm: what is measured is the grammar.
    for pattern in ('(a|b|ab|ba){1,9000}', '(.*a){20}', '(((a{99}){99}){99}){99}'):
        try:
            compiler().regex(pattern).mask()
        except UserError as error:
            assert '\n' not in str(error)
