"""The server's socket and open files, and options of its script: one line for what cannot be."""

import resource

import pytest

from experiments import serve
from llama_jax.errors import UserError
from llama_jax.generate.quantized import Quantization
from llama_jax.serve import run
from llama_jax.serve.run import bind
from tests.serve.process import MODEL, write_model


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
        (('--cors', 'example.org'), '--cors example.org is no origin'),
        (('--lookup', '16'), 'n_draft 16: draft 1 to 15'),
        (('--chat-template', 'nowhere.jinja'), 'nowhere.jinja'),
        ((), 'give either --checkpoint DIRECTORY or --weights NAME'),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(monkeypatch, options, message):
    monkeypatch.setattr(serve.models, 'from_run', lambda *args: 1 / 0)
    given = ('--checkpoint', 'runs/none') if options else ()
    monkeypatch.setattr('sys.argv', ['serve', '--port', '0', *given, *options])
    with pytest.raises(UserError, match=message):
        serve.main()


@pytest.mark.parametrize('given', [',', ' , ', ' '])
def test_keys_without_a_key_do_not_open_the_server(monkeypatch, given):
    monkeypatch.setenv(serve.KEYS, given)
    monkeypatch.setattr(serve.models, 'load', lambda *args: 1 / 0)
    monkeypatch.setattr('sys.argv', ['serve', '--port', '0', '--checkpoint', 'runs/none'])
    with pytest.raises(UserError, match=f"{serve.KEYS} is '{given}', which holds no key"):
        serve.main()


def test_what_is_served_where_nothing_is_said(monkeypatch, tmp_path):
    class Made(Exception):  # noqa: N818
        pass

    def engine(programs, **settings):
        raise Made(programs, settings)

    monkeypatch.setattr(serve, 'Engine', engine)
    path = write_model(tmp_path / 'theirs')
    options = ('--mesh.data', '8', '--mesh.fsdp', '1')  # heads are fewer than devices
    monkeypatch.setattr('sys.argv', ['serve', '--port', '0', '--weights', str(path), *options])
    with pytest.raises(Made) as raised:
        serve.main()
    programs, settings = raised.value.args
    assert (settings['rows'], settings['queue'], settings['speculate']) == (8, 256, None)
    assert settings['length'] == MODEL.context and programs.quantization == Quantization()


@pytest.mark.parametrize('refused', [(), (65_536,), (65_536, 10_240)])
def test_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch, refused):
    limit = [256, resource.RLIM_INFINITY]

    def change(what, wanted):
        if wanted[0] in refused:
            raise ValueError('not more than the kernel has')
        limit[:] = wanted

    monkeypatch.setattr(resource, 'getrlimit', lambda what: tuple(limit))
    monkeypatch.setattr(resource, 'setrlimit', change)
    raised = next(n for n in (65_536, 10_240, 256) if n not in refused)
    assert run.open_files() == raised and limit == [raised, resource.RLIM_INFINITY]
    assert run.open_files() == raised  # nothing is lowered
    limit[:] = [512, 4096]
    if not refused:
        assert run.open_files() == 4096 and limit == [4096, 4096]
    limit[:] = [1 << 20, 1 << 20]
    assert run.open_files() == 65_536 and limit == [1 << 20, 1 << 20]
