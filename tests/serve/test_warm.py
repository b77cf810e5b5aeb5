"""What is asked of an engine before it serves."""

import pytest

from llama_jax.errors import UserError
from llama_jax.serve.warm import lengths, warm


def test_lengths_have_every_shape():
    assert lengths(piece=64, longest=512) == [16, 32, 64, 80, 96, 128]
    # What does not fit is cut off, not left out: 100 tokens are 64 and a piece of 36, padded to 64.
    assert lengths(piece=64, longest=100) == [16, 32, 64, 80, 96, 100]
    assert lengths(piece=16, longest=20) == [16, 20]
    assert lengths(piece=64, longest=20) == [16, 20]


def test_warm(engine):
    for length in (3, 100, 512):
        one = engine(length=length)
        warm(one, piece=64)
        assert any(request.grammar for request in one.requests)
        assert one.requests[-1].prompt == one.requests[-2].prompt, 'a row to copy'
        assert len(one.requests[-1].prompt) == min(
            65, length - one.requests[-1].controls.max_tokens
        )


def test_sources_of_every_shape(engine):
    one = engine(length=100)
    warm(one, piece=64, source_length=100)
    assert {len(request.source) for request in one.requests} == {1, 32, 64, 100}


def test_engine_that_fails(engine):
    one = engine()
    one._step = lambda row: one._end(row, 'error') or True
    with pytest.raises(UserError, match='the script says so'):
        warm(one, piece=64)
