"""The server's socket, and the options of its script: one line for what cannot be."""

import pytest

from experiments import serve
from llama_jax.errors import UserError
from llama_jax.serve.run import bind


@pytest.mark.parametrize(
    ('host', 'port', 'message'),
    [
        ('127.0.0.1', 99999, '--port 99999 is none'),
        ('127.0.0.1', -1, '--port -1 is none'),
        ('no host at all', 0, 'cannot listen on no host at all:0'),
        ('a' * 64, 0, 'cannot listen on a'),
        ('b..c', 0, 'cannot listen on b..c:0'),
    ],
)
def test_addresses_that_cannot_be(host, port, message):
    with pytest.raises(UserError, match=message) as error:
        bind(host, port)
    assert 'choose' in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--rows', '0'), '--rows 0: at least 1'),
        (('--queue', '0'), '--queue 0: at least 1'),
        (('--length', '1'), '--length 1: at least 2'),
        (('--timeout', 'nan'), '--timeout nan: give seconds above 0'),
        (('--lookup', '16'), 'n_draft 16: guess 1 to 15'),
        ((), 'give either --checkpoint DIRECTORY or --weights NAME'),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(monkeypatch, options, message):
    monkeypatch.setattr(serve.models, 'from_run', lambda *args: 1 / 0)
    given = ('--checkpoint', 'runs/none') if options else ()
    monkeypatch.setattr('sys.argv', ['serve', '--port', '0', *given, *options])
    with pytest.raises(UserError, match=message):
        serve.main()
