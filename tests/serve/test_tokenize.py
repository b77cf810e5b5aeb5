"""The routes of the tokenizer: ids that a prompt of ids may hold, and their text."""

import pytest

from tests.serve import fake
from tests.serve.asgi import get, post

TEXT = 'né 你好 👋'


class Named(fake.Bytes):
    """A vocabulary whose control tokens have names."""

    control = {'<s>': fake.BOS, '</s>': fake.EOS}

    def decode(self, ids, *, show_control=False):
        names = {token: name for name, token in self.control.items()}
        shown = [names.get(i, '') if i > 255 else chr(i) for i in ids if i < 256 or show_control]
        return ''.join(shown)


@pytest.fixture
def named(app, monkeypatch):
    made = app(keys=('key',), length=64)
    monkeypatch.setattr(fake.Bytes, 'control', Named.control)
    monkeypatch.setattr(fake.Bytes, 'decode', Named.decode)
    return made


HEADERS = {'authorization': 'Bearer key'}


def tokens(app, **body):
    answer = post(app, '/tokenize', body, headers=HEADERS)
    assert answer.status == 200, answer.body
    told = answer.json()
    assert told['count'] == len(told['tokens']) and told['max_model_len'] == 64
    return told['tokens']


def test_texts_begin_as_a_prompt_does(named):
    said = list(TEXT.encode())
    assert tokens(named, prompt=TEXT) == [fake.BOS, *said]
    assert tokens(named, prompt=TEXT, add_special_tokens=False) == said
    assert tokens(named, prompt='') == [fake.BOS]
    assert len(tokens(named, prompt='a' * 500)) == 501, 'it need not fit the context'


def test_control_tokens_go_by_name(named):
    for text, ids in (
        ('</s>', [fake.BOS, fake.EOS]),
        ('<s>a</s>b', [fake.BOS, 97, fake.EOS, 98]),
        ('<s', [fake.BOS, 60, 115]),
    ):
        assert tokens(named, prompt=text, model=fake.MODEL) == ids
        answer = post(named, '/detokenize', {'tokens': ids}, headers=HEADERS)
        assert answer.json() == {'prompt': text if text.startswith('<s>') else f'<s>{text}'}
    info = get(named, '/tokenizer_info', headers=HEADERS).json()
    assert info == {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': None}


@pytest.mark.parametrize(
    ('path', 'body', 'param'),
    [
        ('/tokenize', {}, 'prompt'),
        ('/tokenize', {'prompt': ['a']}, 'prompt'),
        ('/tokenize', {'prompt': '\ud800'}, 'prompt'),
        ('/tokenize', {'prompt': 'a' * (2**16 + 1)}, 'prompt'),
        ('/tokenize', {'prompt': '<s>' * (2**16 + 1)}, 'prompt'),
        ('/tokenize', {'prompt': 'a', 'model': 'other'}, 'model'),
        ('/tokenize', {'messages': []}, 'messages'),
        ('/tokenize', {'prompt': 'a', 'add_special_tokens': 1}, 'add_special_tokens'),
        ('/detokenize', {}, 'tokens'),
        ('/detokenize', {'tokens': [fake.VOCAB]}, 'tokens'),
        ('/detokenize', {'tokens': [1], 'model': 'other'}, 'model'),
    ],
)
def test_refused_by_name(app, path, body, param):
    from llama_jax.serve.served import Limits

    answer = post(app(limits=Limits()), path, body)
    assert answer.status == (404 if param == 'model' else 400)
    assert answer.error['param'] == param


def test_a_key_is_asked_for(named):
    for path in ('/tokenize', '/detokenize'):
        assert post(named, path, {'prompt': 'a', 'tokens': [97]}).status == 401
    assert get(named, '/tokenizer_info').status == 401
