"""A configuration in a file of one's own: found, refused in one line, and kept beside the run."""

import json
import sys
import textwrap
from dataclasses import replace

import pytest

import configs
from configs import own
from experiments import cli, pretrain
from llama_jax.compare import record
from llama_jax.compare.fair import Proof
from llama_jax.errors import UserError
from llama_jax.train.config_file import ConfigFile, edited


@pytest.fixture
def mine(tmp_path):
    """Writes mine.py; gives the name of one of its functions."""

    def write(text, name=':experiment'):
        path = tmp_path / 'mine.py'
        path.write_text(textwrap.dedent(text), 'utf-8')
        return f'{path}{name}'

    return write


GOOD = """
    from __future__ import annotations

    import dataclasses

    import beside
    from configs import quickstart


    @dataclasses.dataclass
    class Size:
        layers: int = 2


    def experiment():
        base = quickstart.quickstart()
        model = dataclasses.replace(base.model, layers=Size().layers)
        data = dataclasses.replace(base.data, validation=[])  # a list, where tuples are usual
        return dataclasses.replace(base, name=beside.NAME, model=model, data=data)


    value = experiment()


    def of_depth(layers):
        return experiment()


    def of_default_depth(layers=3):
        base = experiment()
        return dataclasses.replace(base, model=dataclasses.replace(base.model, layers=layers))
"""


def test_a_file_of_ones_own_is_found(mine, tmp_path, monkeypatch):
    (tmp_path / 'beside.py').write_text("NAME = '我的'")
    base = configs.get('quickstart')
    wanted = replace(base, name='我的', model=replace(base.model, layers=2))
    name = mine(GOOD)
    assert configs.get(name) == configs.recipe(name) == wanted
    assert configs.get(mine(GOOD, ':value')) == wanted
    assert configs.get(mine(GOOD, ':of_default_depth')).model.layers == 3
    # By a path from where one is; and overrides go on top.
    monkeypatch.chdir(tmp_path.parent)
    command = ['pretrain', f'{tmp_path.name}/mine.py:experiment', '--train.steps', '7']
    monkeypatch.setattr('sys.argv', command)
    experiment, options = cli.read('pretrain', 'Trains.', **pretrain.OPTIONS)
    assert experiment == replace(wanted, train=replace(wanted.train, steps=7))
    assert str(options.config_file) == command[1]
    assert options.config_file.source == (tmp_path / 'mine.py').read_bytes()


@pytest.mark.parametrize('directory', ['.pyenv', 'x.python', 'a.py'])
def test_a_directory_may_have_py_in_its_name(directory, tmp_path, monkeypatch):
    (tmp_path / directory).mkdir()
    file = tmp_path / directory / 'mine.py'
    file.write_text('from configs import quickstart\nsmall = quickstart.quickstart\n')
    monkeypatch.setattr('sys.path', sys.path[:])
    found = own.config_file(f'{file}:small')
    assert (found.path, found.name) == (file, 'small')
    assert configs.get(f'{file}:small') == configs.get('quickstart')
    assert own.config_file(str(file)).name == own.config_file(f'{file}:').name == ''


@pytest.mark.parametrize(
    'text, name, words',
    [
        ('', ':experiment', "mine.py has no 'experiment': there is no function in it"),
        (
            'def experimant(): ...\ndef _hidden(): ...',
            ':experiment',
            "mine.py has no 'experiment': did you mean 'experimant'?",
        ),
        ('import json\ndef a(): ...\ndef b(): ...', '', 'NAME; there are a, b'),
        ('def experiment(layers): ...', ':experiment', 'mine.py:experiment takes layers: a confi'),
        ('def experiment():\n  return {}', ':experiment', 'gives dict, where Experiment is wanted'),
        ('\n\ndef experiment(:', ':experiment', 'mine.py:3: SyntaxError: '),
        ('\nimport no_such_package', ':experiment', 'mine.py:2: ModuleNotFoundError: No module'),
        ('raise SystemExit', ':experiment', 'mine.py:1: SystemExit'),
        (
            'import json\n\n\ndef experiment():\n  return json.loads("[")',
            ':experiment',
            'mine.py:5: JSONDecodeError: Expecting value: line 1 column 2 (char 1)',
        ),
        (
            'from llama_jax.errors import UserError\nraise UserError("no such size: take 3")',
            ':experiment',
            'mine.py:2: no such size: take 3',
        ),
        (
            'import configs\ndef experiment():\n  return configs.grid("fim")',
            ':experiment',
            'gives Grid, where Experiment is wanted; Grid is for compare and plan',
        ),
        (
            """
            import dataclasses, configs

            @dataclasses.dataclass(frozen=True)
            class Mine:
                z_loss: float = 0.0

            def experiment():
                return dataclasses.replace(configs.get('quickstart'), objective=Mine())
            """,
            ':experiment',
            'Mine has no reads: derive it from Base (docs/adding_an_objective.md)',
        ),
        (
            """
            import configs, numpy
            from dataclasses import replace

            def experiment():
                return replace(configs.get('quickstart'), seed=numpy.int64(3))
            """,
            ':experiment',
            'cannot be written down, so that no run could go on: Object of type int64',
        ),
    ],
)
def test_what_is_wrong_in_it_is_one_line_with_its_place(mine, text, name, words):
    with pytest.raises(UserError) as refused:
        configs.get(mine(text, name))
    line = str(refused.value)
    assert words in line and '\n' not in line and 'mine.py' in line


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='none.py cannot be read: No such file or directory$'):
        configs.get(f'{tmp_path}/none.py:experiment')
    (tmp_path / 'a.py').mkdir()
    with pytest.raises(UserError, match='a.py cannot be read: Is a directory$'):
        configs.grid(f'{tmp_path}/a.py:grid')


def test_a_grid_of_ones_own_is_found_and_kept(mine, tmp_path, monkeypatch):
    name = mine('import configs\ndef grid():\n  return configs.grid("fim")', ':grid')
    monkeypatch.setattr('sys.argv', ['compare', name, '--train.steps', '7'])
    grid, options = cli.read_grid('compare', 'Compares.', jobs=(int, 1))
    assert grid.name == 'fim' and {arm.experiment.train.steps for arm in grid.arms} == {7}
    record.write(tmp_path / 'run', grid, Proof({}, []), 'x', config_file=options.config_file)
    facts = record.read(tmp_path / 'run')['configuration']
    assert facts == {'file': name[:-5], 'name': 'grid', 'sha256': options.config_file.digest}
    assert (tmp_path / 'run/configuration.py').read_bytes() == options.config_file.source
    with pytest.raises(UserError, match='gives Grid, where Experiment'):
        configs.get(name)


def test_a_run_that_goes_on_says_that_the_file_changed(tmp_path):
    first = ConfigFile(tmp_path / 'mine.py', 'experiment', b'one')
    facts = json.loads(json.dumps({'configuration': first.facts()}))
    assert edited(facts, first) == edited({}, first) == edited(facts, None) == []
    (line,) = edited(facts, replace(first, source=b'two'))
    assert line.startswith(f'{tmp_path}/mine.py:experiment is not as it was') and '\n' not in line
    assert first.digest[:12] in line
