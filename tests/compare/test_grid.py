"""A whole grid in real processes: killed and started again it is the grid that was left alone;
failures, other grids and bad input are told in a line."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llama_jax import mesh as meshes
from llama_jax.compare import baselines, record, results
from llama_jax.compare.grid import FINISHED, runs, sweep
from llama_jax.errors import UserError
from llama_jax.model.tune import Full, LoRA
from llama_jax.objectives.causal import CausalLM
from llama_jax.report.grid import read_grid
from llama_jax.report.judged import Judged
from llama_jax.train import restore
from llama_jax.train.config_file import ConfigFile
from llama_jax.train.records import read_metrics, versions
from tests.compare import tiny
from tests.flags import FAST_COMPILATION

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / 'tests/compare/driver.py'
PLACES = ('plain/seed-0', 'z/seed-0')


def start(text, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        cwd=ROOT,
        env={
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'XLA_FLAGS': FAST_COMPILATION,
            'TINY_TEXT': str(text),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process, code):
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output.splitlines()


def wait_for(condition, seconds=100):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, 'waited in vain'
        time.sleep(0.01)


def marks(directory):
    """When each file was last written."""
    files = [path for path in sorted(directory.rglob('*')) if path.is_file()]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope='module')
def whole(text, tmp_path_factory):
    """A grid in one go, whose second arm is swept as well; and what it said."""
    workdir = tmp_path_factory.mktemp('grids') / 'whole'
    # One seed: the tests in this file take their time from the processes they start.
    process = start(text, 'tiny', '--seeds', 1, '--workdir', workdir, '--jobs', 2)
    return workdir, end(process, 0)


@pytest.fixture(scope='module')
def broken(whole, text, tmp_path_factory):
    """The same grid, killed when its second run had a checkpoint, and started again; with the times
    of the first run's files between."""
    workdir = tmp_path_factory.mktemp('grids') / 'broken'
    command = ('tiny', '--seeds', 1, '--workdir', workdir)
    first, second = (workdir / place for place in PLACES)
    process = start(text, *command)
    wait_for(lambda: (first / FINISHED).exists() and (second / 'checkpoints/5').exists())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    at_kill = marks(first)
    unfinished = not (second / FINISHED).exists()
    said = end(start(text, *command), 0)
    return workdir, at_kill, unfinished, said


class Result(NamedTuple):
    """Of an evaluation."""

    result: dict


def measured(workdir):
    """Results without what depends on the clock."""
    found = json.loads((workdir / 'results.json').read_text())
    for run in found['runs']:
        del run['seconds']
    return found


@pytest.mark.slow
def test_a_killed_grid_goes_on_to_the_same_results(whole, broken):
    workdir, _, unfinished, said = broken
    assert unfinished, 'the kill came too late to test anything'
    assert any('2 runs, 1 of them finished before' in line for line in said)
    assert measured(workdir) == measured(whole[0])
    events = [x for x in read_metrics(workdir / PLACES[1]) if x['kind'] == 'event']
    assert any('resumed from the checkpoint' in x['text'] for x in events)


def test_finished_runs_are_not_touched(broken):
    workdir, at_kill, _, _ = broken
    assert FINISHED in at_kill and marks(workdir / PLACES[0]) == at_kill


def test_results_are_those_of_the_runs(whole):
    workdir, _ = whole
    found = json.loads((workdir / 'results.json').read_text())
    values = {
        place: json.loads((workdir / place / FINISHED).read_text())['metrics'] for place in PLACES
    }
    one, other = (values[place]['probe_accuracy']['value'] for place in PLACES)
    assert one != other
    score = {'mean': one, 'std': None, 'n': 1, 'kind': 'exact', 'by': ''}
    assert found['scores']['plain'] == {'probe_accuracy': score}
    assert found['scores']['z']['probe_accuracy']['mean'] == other
    difference = found['differences']['z']['probe_accuracy']
    assert difference['value'] == pytest.approx(other - one)
    # One seed says nothing of others.
    assert (
        difference['seeds'] == 1 and difference['p'] is None and 'A/A' not in found['differences']
    )
    assert [run['state'] for run in found['runs']] == ['finished'] * 2
    assert [run['steps'] for run in found['runs']] == [20, 20]
    rows = list(csv.DictReader((workdir / 'results.csv').read_text().splitlines()))
    assert [row['arm'] for row in rows] == ['plain', 'z']
    assert float(rows[0]['probe_accuracy']) == one and rows[0]['bits_per_byte'] == ''
    assert int(float(rows[1]['tokens'])) == 20 * 8 * 32


def test_results_come_from_records_alone(whole, tmp_path):
    workdir, _ = whole
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns('checkpoints', 'results.*'))
    results.write(copy, results.collect(Judged(read_grid(copy))))
    for name in ('results.json', 'results.csv'):
        assert (copy / name).read_text() == (workdir / name).read_text()


def test_grid_json_says_what_was_planned_and_proved(whole):
    workdir, said = whole
    facts = json.loads((workdir / 'grid.json').read_text())
    assert facts['name'] == 'tiny' and facts['seeds'] == 1
    assert [arm['name'] for arm in facts['arms']] == ['plain', 'z']
    assert facts['arms'][1]['objective'] == {'class': 'CausalLM', 'z_loss': 0.01}
    assert facts['arms'][0]['model']['dim'] == 16
    assert facts['may_differ'] == ['name', 'objective']
    assert [row['arm'] for row in facts['budget']] == ['plain', 'z']
    assert facts['budget'][0]['tokens'] == facts['held_fixed']['tokens'] == 5120
    assert str(workdir) in facts['command'] and 'jax' in facts['versions']
    assert facts['device'].startswith('1 x ')
    assert any('5,120' in line and line.startswith('plain') for line in said)


def test_everything_a_reader_wants_is_written(whole):
    workdir, said = whole
    for name in ('results.json', 'results.csv', 'report.html'):
        assert (workdir / name).stat().st_size
    assert any(line.startswith('report: ') for line in said)
    for place in PLACES:
        assert 'evaluating' in (workdir / place / 'log.txt').read_text()


@pytest.mark.slow
def test_a_failed_run_is_told_at_the_end_and_the_others_go_on(whole, text, tmp_path):
    workdir = tmp_path / 'failing'
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / 'plain')
    (workdir / 'z/seed-0' / FINISHED).unlink()
    command = ('tiny', '--seeds', 1, '--workdir', workdir)
    said = end(start(text, *command, TINY_BROKEN='plain/seed-0'), 1)
    log = workdir / 'plain/seed-0/log.txt'
    expected = f'plain/seed-0 failed (1): RuntimeError: broken on purpose (all of it in {log})'
    assert said[-1] == f'error: {expected}'
    assert (workdir / 'z/seed-0' / FINISHED).exists()
    found = json.loads((workdir / 'results.json').read_text())
    assert [run['state'].split(':')[0] for run in found['runs']] == ['failed', 'finished']


# --- bad input, in this process -------------------------------------------------------------------


@pytest.fixture
def refused(text, monkeypatch, capsys):
    """Runs experiments.compare with arguments; gives its one line of error."""
    import configs
    from experiments import cli, compare

    monkeypatch.setattr(configs, 'grids', lambda: {'tiny': lambda: tiny.grid(text)})

    def never(*arguments, **options):
        raise AssertionError('this was to be refused before a run')

    monkeypatch.setattr(compare.runner, 'run_all', never)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['compare', *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main(compare.main)
        assert left.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if not line.startswith(('comparing ', 'counting '))]
        assert len(lines) == 1 and lines[0].startswith('error: '), lines
        return lines[0]

    return run


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['tyny'], "no grid is called 'tyny': did you mean 'tiny'?"),
        (['tiny', '--only', 'plian'], "tiny has no arm 'plian': did you mean 'plain'?"),
        (['tiny', '--sedes', '3'], 'there is no option --sedes: did you mean --seeds?'),
        (['tiny', '--train.stpes', '3'], 'no option --train.stpes: did you mean --train.steps?'),
        (['tiny', '--seeds', '0'], '--seeds 0'),
        (['tiny', '--jobs', '0'], '--jobs 0'),
        (['tiny', '--lr-sweep', '-1'], '--lr-sweep -1'),
        (['tiny', '--train.steps', '0'], '--train.steps is 0'),
        (['tiny', '--optimizer.schedule.warmup-steps', '99'], 'warm-up of 99 steps'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_input_is_one_line(refused, tmp_path, arguments, words):
    assert words in refused(*arguments, '--workdir', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_a_directory_of_another_grid_is_refused_with_the_fields(refused, whole):
    workdir, _ = whole
    line = refused('tiny', '--workdir', workdir, '--train.steps', '30')
    assert str(workdir) in line and '--workdir' in line
    assert line.count('train.steps: 20 -> 30') == 1


def test_a_directory_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'file' in refused('tiny', '--workdir', tmp_path / 'file')


def test_a_grid_file_that_is_broken_is_refused(refused, tmp_path):
    (tmp_path / 'grid.json').write_text('{"name": ')
    assert 'grid.json cannot be read' in refused('tiny', '--workdir', tmp_path)


def test_results_measured_by_other_code_are_refused(refused, whole, monkeypatch):
    monkeypatch.setattr(record, 'evaluation_code', lambda: 'other')
    line = refused('tiny', '--workdir', whole[0])
    assert 'code that evaluates has changed' in line and FINISHED in line


def test_runs_of_other_code_or_versions_are_refused(refused, whole, monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(record, 'training_code', lambda: 'other')
        assert 'the code that trains has changed' in refused('tiny', '--workdir', whole[0])
        with pytest.raises(UserError, match='the training code here is not that which began'):
            record.check_here(whole[0])
    monkeypatch.setattr(record, 'versions', lambda: {**versions(), 'jax': '0.0.1'})
    assert 'was begun with other versions: jax: ' in refused('tiny', '--workdir', whole[0])
    with pytest.raises(UserError, match='jax: '):
        record.check_here(whole[0])


@pytest.mark.slow
def test_runs_on_other_text_are_refused(refused, whole, tmp_path):
    """Of the same settings: the files have changed since."""
    workdir = shutil.copytree(whole[0], tmp_path / 'changed')
    facts = record.read(workdir)
    for name in ('documents', 'document order, seed 0', 'initial weights, seed 0'):
        then = {**facts, 'held_fixed': {**facts['held_fixed'], name: 'then'}}
        (workdir / record.NAME).write_text(json.dumps(then))
        said = refused('tiny', '--seeds', 2, '--workdir', workdir)
        assert f'other files, so runs would not be trained alike: changed are {name}.' in said
        assert record.read(workdir) == then


def test_runs_of_another_file_of_ones_own_are_refused(grid, whole, tmp_path):
    """One that defines what trains, whose settings are as before."""
    workdir = tmp_path / 'own'
    shutil.copytree(whole[0], workdir)
    facts = record.read(workdir)
    before, after = (ConfigFile(Path('mine.py'), 'grid', text) for text in (b'a = 1', b'a = 2'))
    facts['configuration'] = before.facts()
    (workdir / record.NAME).write_text(json.dumps(facts))
    record.check_workdir(workdir, grid, after)  # its objectives are the project's
    facts['arms'][0]['objective'] = {'class': 'Mine'}
    (workdir / record.NAME).write_text(json.dumps(facts))
    record.check_workdir(workdir, grid, before)
    with pytest.raises(UserError, match='mine.py defines Mine and has changed since .*own'):
        record.check_workdir(workdir, grid, after)


def test_the_baseline_of_a_run_that_starts_from_another_is_that_one(grid, whole, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        baselines, 'evaluate_trained', lambda trained, *rest: seen.update(it=trained) or Result({})
    )
    mesh = meshes.make(meshes.MeshConfig(), jax.devices()[:1])
    trained = restore.load(whole[0] / PLACES[1], mesh)
    begun = replace(trained.experiment, start=str(whole[0] / PLACES[1]), seed=5)
    warm = replace(grid.arms[0], name='warm', experiment=replace(begun, start='runs/x'))
    cold = replace(warm, name='cold', experiment=replace(warm.experiment, start=None))
    groups = baselines.groups(replace(grid, arms=(warm, cold)))
    assert groups['untrained-warm'] == ['warm'] and groups['untrained-cold'] == ['cold']
    for tune in (Full(), LoRA(rank=2)):
        baselines.untrained(replace(begun, tune=tune), grid.suite, mesh)
        jax.tree.map(np.testing.assert_array_equal, seen['it'].params, trained.params)


def test_a_grid_of_an_older_version_goes_on(grid, whole, tmp_path):
    """Its record lacks a setting that came later: that has its default."""
    facts = record.read(whole[0])
    for arm in facts['arms']:
        del arm['experiment']['optimizer']['moments']
    del facts['suite']['seed']
    (tmp_path / record.NAME).write_text(json.dumps(facts))
    record.check_workdir(tmp_path, grid)
    other = tiny.with_second_arm(grid, lambda x: tiny.changed(x, 'optimizer', moments='bfloat16'))
    with pytest.raises(UserError, match="optimizer.moments: 'float32' -> 'bfloat16'"):
        record.check_workdir(tmp_path, other)


def test_a_grid_goes_on_with_more_seeds_arms_and_another_mesh(grid, whole):
    workdir, _ = whole
    more = replace(grid.arms[0], name='more')
    meshed = tiny.with_second_arm(grid, lambda x: tiny.changed(x, 'mesh', tensor=2))
    record.check_workdir(workdir, meshed)
    record.check_workdir(workdir, replace(grid, arms=(*grid.arms, more)))
    other = tiny.with_second_arm(grid, lambda x: replace(x, objective=CausalLM(z_loss=0.5)))
    with pytest.raises(UserError, match=r'objective.z_loss: 0.01 -> 0.5 \(z\)'):
        record.check_workdir(workdir, other)
    with pytest.raises(UserError, match='the arm z, which is gone'):
        record.check_workdir(workdir, replace(grid, arms=grid.arms[:1]))


@pytest.mark.slow
def test_options_say_which_runs_there_are_and_how_many_at_once(text, monkeypatch, tmp_path):
    import configs
    from experiments import cli, compare

    asked, matched = [], []

    def stopped(planned, workdir, *, command, jobs):
        asked.append(([run.place for run in planned], workdir, command(planned[0]), jobs))
        raise UserError('before a run')

    monkeypatch.setattr(configs, 'grids', lambda: {'tiny': lambda: tiny.grid(text)})
    monkeypatch.setattr(compare.runner, 'run_all', stopped)
    monkeypatch.setattr(compare, 'match_flops', lambda grid: matched.append(grid) or grid)
    monkeypatch.chdir(tmp_path)
    for options in (
        (),
        ('--seeds', 3, '--only', 'z', '--jobs', 4, '--lr-sweep', 3, '--workdir', 'mine'),
        ('--match', 'flops', '--lr-sweep', '--seeds', 1),
    ):
        monkeypatch.setattr(sys, 'argv', ['compare', 'tiny', *map(str, options)])
        with pytest.raises(SystemExit):
            cli.main(compare.main)
    (usual, workdir, command, jobs), (some, mine, _, four), (swept, *_) = asked
    assert usual == ['plain/seed-0', 'z/seed-0', 'plain/seed-1', 'z/seed-1']
    assert (str(workdir), jobs) == ('runs/tiny', 1)
    assert command[-3:] == ['--run', 'runs/tiny', 'plain/seed-0']
    assert some == ['z/seed-0', 'z/seed-1', 'z/seed-2', 'z/lr-0.03/seed-0']
    assert (str(mine), four) == ('mine', 4)
    assert [run for run in swept if 'lr-' not in run] == ['plain/seed-0', 'z/seed-0']
    assert len(swept) == 2 + 2 * 2 and len(matched) == 1  # twice and half the rate


# --- plans ----------------------------------------------------------------------------------------


def test_a_run_is_read_from_the_grid_as_it_was_planned(grid, whole):
    for planned in (*runs(grid), *sweep(grid, (0.3,))):
        assert record.planned(whole[0], planned.place) == (planned, grid.suite)
    with pytest.raises(UserError, match="no arm 'plian': did you mean 'plain'"):
        record.planned(whole[0], 'plian/seed-0')
