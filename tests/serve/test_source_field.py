"""The field `source`: what the encoder of an encoder-decoder reads."""

import pytest

from llama_jax.serve.errors import ApiError
from llama_jax.serve.served import Limits
from tests.serve import fake
from tests.serve.fake import BOS
from tests.serve.test_fields import completion


@pytest.fixture
def with_encoder(engine):
    known = {'a<mask>b': (97, 3, 98), '': (), 'long': (97,) * 9}

    def read(text):
        return known[text] if text in known else fake.Bytes().encode(text)

    return fake.served(engine(length=64), read_source=read, source_length=8), Limits()


def test_a_source_goes_to_every_choice(with_encoder):
    ask = completion(with_encoder, source='a<mask>b', n=2)
    assert [request.source for request in ask.requests] == [(97, 3, 98)] * 2
    assert completion(with_encoder, source=[5, 6]).requests[0].source == (5, 6)
    begun = completion(with_encoder, source=[5], prompt=None)
    assert begun.requests[0].prompt == (BOS,), 'a decoder begins by itself'


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (None, 'is needed for the encoder'),
        (7, 'is needed for the encoder'),
        ('', 'has no tokens'),
        ([], 'has no tokens'),
        ('long', 'has 9 tokens: at most 8'),
        ([99999], 'holds token id 99999'),
    ],
)
def test_bad_sources(with_encoder, source, message):
    with pytest.raises(ApiError, match=f'source {message}') as error:
        completion(with_encoder, source=source)
    assert error.value.param == 'source'


def test_a_source_that_is_no_text(with_encoder):
    with pytest.raises(ApiError, match='lone surrogate') as error:
        completion(with_encoder, source='\ud800')
    assert (error.value.status, error.value.param) == (400, 'source')


def test_a_source_without_an_encoder(engine):
    with pytest.raises(ApiError, match='source is given, but this model has no encoder'):
        completion((fake.served(engine()), Limits()), source='a')
