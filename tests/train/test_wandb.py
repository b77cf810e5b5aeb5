"""Scalars in Weights & Biases, which a run tells of itself and depends on in nothing."""

import json
import sys
import types

import pytest

from llama_jax import mesh as meshes
from llama_jax.errors import UserError
from llama_jax.train import loop
from llama_jax.train.records import read_metrics
from llama_jax.train.wandb import FILE, Mirror
from tests.train.conftest import changed, one_device

pytestmark = pytest.mark.filterwarnings(
    'ignore:coroutine .* was never awaited:RuntimeWarning',
    'ignore:Exception ignored in. <coroutine object:pytest.PytestUnraisableExceptionWarning',
)


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


def standin(monkeypatch, **fails):
    """A package `wandb` that notes what it is given, or fails where it is to."""
    given = []

    def call(name):
        def called(*args, **settings):
            given.append((name, args, settings))
            if name in fails:
                raise fails[name]
            return run

        return called

    run = types.SimpleNamespace(log=call('log'), finish=call('finish'))
    settings = types.SimpleNamespace
    package = types.SimpleNamespace(init=call('init'), Settings=settings)
    monkeypatch.setitem(sys.modules, 'wandb', package)
    return given


@pytest.mark.slow
def test_it_is_given_the_scalars_of_metrics_and_a_run_keeps_its_id(short, tmp_path, monkeypatch):
    given = standin(monkeypatch)
    loop.train(short, tmp_path, wandb='mine')
    longer = changed(short, 'train', steps=10)
    loop.train(longer, tmp_path, wandb='mine')
    first, second = (settings for name, _, settings in given if name == 'init')
    assert first['id'] == second['id'] == json.loads((tmp_path / FILE).read_text())['id']
    assert first['project'] == 'mine' and first['config']['experiment']['train']['steps'] == 8
    logged = [(args[0], settings['step']) for name, args, settings in given if name == 'log']
    wanted = [
        (
            {f'{line["kind"]}/{k}': v for k, v in line.items() if isinstance(v, (int, float))},
            line['step'],
        )
        for line in read_metrics(tmp_path)
        if line['kind'] in ('train', 'validation')
    ]
    for numbers, _ in wanted:
        for kind in ('train', 'validation'):
            numbers.pop(f'{kind}/step', None)
    assert [(n, s) for n, s in logged] == wanted
    assert [name for name, *_ in given].count('finish') == 2


def test_another_run_in_the_directory_or_another_project_has_another_id(tmp_path, monkeypatch):
    standin(monkeypatch)
    ids = []
    for project, step in (('a', 0), ('a', 5), ('a', 0), ('b', 5)):
        Mirror(project, tmp_path, {}, step=step)
        ids.append(json.loads((tmp_path / FILE).read_text())['id'])
    assert ids[0] == ids[1] and len(set(ids)) == 3


@pytest.mark.parametrize('where', ['init', 'log', 'finish'])
def test_its_failure_is_said_once_and_ends_nothing(short, tmp_path, monkeypatch, capsys, where):
    standin(monkeypatch, **{where: ConnectionError('no network\nat all')})
    quick = changed(changed(short, 'evaluation', every=0), 'train', steps=4)
    loop.train(quick, tmp_path, wandb='mine')
    said = [line for line in capsys.readouterr().err.splitlines() if 'wandb' in line]
    assert said == ['wandb failed, and the run goes on without it: ConnectionError: no network']
    assert len(read_metrics(tmp_path)) == 4


@pytest.mark.parametrize('there', [None, types.ModuleType('wandb')], ids=['missing', 'a directory'])
def test_a_missing_package_is_told_before_anything(short, tmp_path, monkeypatch, there):
    monkeypatch.setitem(sys.modules, 'wandb', there)
    with pytest.raises(UserError, match=r"--wandb mine: .*pip install 'wandb>=") as raised:
        loop.train(short, tmp_path / 'run', wandb='mine')
    assert '\n' not in str(raised.value) and not (tmp_path / 'run').exists()
    with pytest.raises(UserError, match='--wandb: give the name of a project'):
        loop.train(short, tmp_path / 'run', wandb='')


def test_the_package_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    for step in (0, 3):
        mirror = Mirror('mine', tmp_path, {'name': 'tiny', 'experiment': {'seed': 0}}, step=step)
        mirror.log(step + 1, {'train/loss': 12.625 + step})
        mirror.close()
    number = json.loads((tmp_path / FILE).read_text())['id']
    runs = sorted((tmp_path / 'wandb').glob(f'offline-run-*-{number}/run-{number}.wandb'))
    assert len(runs) == 2
    for run, loss in zip(runs, (b'12.625', b'15.625'), strict=True):
        assert b'train/loss' in run.read_bytes() and loss in run.read_bytes()
