"""Scripts run in this process, with a command line of the test's own."""

import inspect
import json
import logging
import sys
import textwrap

import pytest

from experiments import cli


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
    """A cache of data sets and tokenizers for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLAMA_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A module's functions, one a document."""
    path = tmp_path_factory.mktemp('text') / 'functions.jsonl'
    documents = inspect.getsource(textwrap).split('\n\n\n')
    path.write_text('\n'.join(json.dumps({'text': document}) for document in documents), 'utf-8')
    return path


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Runs a script's main with arguments; gives (exit code, output, lines of error output)."""
    monkeypatch.chdir(tmp_path)
    root, levels = logging.getLogger(), {}
    for name in (None, 'llama_jax', 'absl', 'asyncio'):
        levels[name] = logging.getLogger(name).level
    handlers = root.handlers[:]
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)

    def run(main, *arguments):
        monkeypatch.setattr(sys, 'argv', ['script', *map(str, arguments)])
        code = 0
        try:
            cli.main(main)
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        # As a terminal shows it: a carriage return begins the line anew.
        lines = [line.rsplit('\r')[-1] for line in captured.err.split('\n')]
        return code, captured.out, lines[:-1]

    yield run
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
