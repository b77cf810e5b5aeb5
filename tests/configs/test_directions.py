"""The page of directions names every grid of configs/directions.py, metrics that their suites
measure, and takes the tables of finished comparisons."""

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest

import configs
from configs import directions
from llama_jax.errors import UserError
from llama_jax.evaluate.metrics import METRICS, TASK
from tests.report import compared

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'directions.md').read_text('utf-8')


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('of_directions', ROOT / 'tools/directions.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_direction_has_its_place_and_its_command(tool):
    named = {name: set(metrics.split()) for _, name, metrics, _ in tool.BLOCK.findall(PAGE)}
    of_file = {name for name, f in configs.grids().items() if f.__module__ == directions.__name__}
    assert {*named} == of_file
    for name, metrics in named.items():
        suite = configs.grid(name).suite
        tasks = {f'{TASK}{task}' for task in suite.tasks}
        assert metrics <= {*METRICS} and tasks <= metrics, name
        assert {x for x in metrics if x.startswith(TASK)} <= tasks
        assert not {x for x in metrics if 'recall_span' in x} or suite.pool
        notebook = ' '.join(configs.grids()[name].__doc__.replace('\\', '').split())
        commands = re.findall(rf'(compare {name} .*?)--workdir', PAGE)
        assert commands and all(command in notebook for command in commands), name


def test_tables_of_finished_comparisons_take_their_place(tool, tmp_path, monkeypatch, capsys):
    page = 'a\n<!-- results one: bits_per_byte probe_accuracy -->\nNot run yet.\n<!-- end -->\nb\n'
    two = page.replace('one', 'two')
    arms = {name: compared.ARMS[name] for name in ('causal', 'causal+contrastive')}
    compared.write(tmp_path / 'one', arms=arms)
    text = tool.filled(page + two, tmp_path)
    assert text.endswith(two) and text.startswith(page[:52])
    assert 'less causal' in text and re.search(r'contrastive p [\d.e-]+ \(n 2 seeds', text)
    assert '4 runs, ' in text
    assert tool.filled(text, tmp_path) == text

    (tmp_path / 'one/causal/seed-1/evaluation.json').unlink()
    with pytest.raises(UserError, match=r'one is not finished: causal \('):
        tool.filled(page, tmp_path)
    with pytest.raises(UserError, match="one: no metric is called 'bits'"):
        tool.filled(page.replace('bits_per_byte', 'bits'), tmp_path)

    file = tmp_path / 'page.md'
    for options, code in (([], 2), ([tmp_path / 'two', file], 0), ([tmp_path, file], 1)):
        file.write_text(page, 'utf-8')
        monkeypatch.setattr('sys.argv', ['tool', *map(str, options)])
        with contextlib.ExitStack() if code == 0 else pytest.raises(SystemExit) as ended:
            tool.main()
        assert code == 0 or ended.value.code == code
        assert file.read_text('utf-8') == page
    usage, error = capsys.readouterr().err.strip().rsplit('\n', 1)
    assert 'usage: ' in usage and error.startswith('error: ')
    compared.write(tmp_path / 'one', arms=arms)
    tool.main()
    assert file.read_text('utf-8') == tool.filled(page, tmp_path) != page
