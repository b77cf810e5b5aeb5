"""Every named grid is laid out well and differs in what it names; one run of a grid, alone."""

import inspect
import json
import threading
from dataclasses import replace

import pytest

import configs
from llama_jax.compare import baselines, fair, one, power, record
from llama_jax.compare.fair import Proof
from llama_jax.compare.grid import (
    FINISHED,
    PER_TEXT,
    Arm,
    allowed,
    check_names,
    check_steps,
    runs,
)
from llama_jax.data.prepare import locked
from llama_jax.errors import DivergedError, UserError
from llama_jax.evaluate import suite as suites
from llama_jax.evaluate.light import light
from llama_jax.objectives.masked import MaskedLM
from llama_jax.train.workdir import held

NAMED = sorted(configs.grids())


def test_the_grids_of_the_documentation_are_there():
    assert {'objectives', 'objectives_small', 'objectives_1b', 'dropout_masks', 'fim'} <= {*NAMED}
    assert not set(NAMED) & set(configs.named())


@pytest.mark.parametrize('name', NAMED)
def test_named_grid(name):
    grid = configs.grid(name)
    assert grid.name == name
    check_names(grid)
    fair._check_fields(grid)
    assert fair._matched(grid) or grid.match == 'text'
    for arm in grid.arms:
        assert arm.experiment.name == arm.name
        fair._check_settings(arm.experiment)
        suites.check(grid.suite, arm.experiment)
    notebook = inspect.getdoc(configs.grids()[name])
    assert 'Launch' in notebook and 'Expected' in notebook and f'compare {name}' in notebook


def test_may_differ_names_no_more_than_differs():
    for name in NAMED:
        grid = configs.grid(name)
        first, *others = [fair.to_dict(arm.experiment) for arm in grid.arms]
        lines = [line for other in others for line in fair.difference(first, other)]
        for field in grid.may_differ:
            assert any(allowed(line.split(':')[0], [field]) for line in lines), (name, field)


# --- one run --------------------------------------------------------------------------------------


@pytest.fixture
def workdir(grid, tmp_path):
    record.write(tmp_path, grid, Proof({}, []), 'a command')
    (tmp_path / 'z/seed-1').mkdir(parents=True)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What was done, in order; neither training nor evaluation takes place."""
    found = []
    monkeypatch.setattr(one, 'leave_with_parent', lambda: None)
    monkeypatch.setattr(one, 'train', lambda *args, measure: found.append((*args, measure)))

    def evaluate(path, experiment, suite, mesh):
        found.append(suite)
        return suites.Evaluation({'metrics': {}, 'seconds': 1.0}, {})

    monkeypatch.setattr(one, 'evaluate', evaluate)
    return found


def test_a_run_is_trained_evaluated_and_marked_once(grid, workdir, calls):
    one.run(workdir, 'z/seed-1')
    planned = next(run for run in runs(grid) if run.place == 'z/seed-1')
    assert calls == [(planned.experiment, workdir / 'z/seed-1', light), grid.suite]
    assert json.loads((workdir / 'z/seed-1' / FINISHED).read_text())['metrics'] == {}
    assert (workdir / 'z/seed-1' / PER_TEXT).is_file()
    one.run(workdir, 'z/seed-1')
    assert len(calls) == 2


def test_a_run_that_chooses_a_rate_is_trained_alone(grid, workdir, calls, monkeypatch):
    place = 'z/lr-0.001/seed-0'
    directory = workdir / place
    directory.mkdir(parents=True)
    lines = [{'kind': 'validation', 'step': i, 'loss': loss} for i, loss in ((1, 3.0), (2, 2.5))]
    (directory / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    record.retune(workdir, grid, {})
    one.run(workdir, place)
    (called,) = calls
    assert called[0].optimizer.schedule.peak == 0.001
    assert json.loads((directory / FINISHED).read_text()) == {'metrics': {}, 'loss': 2.5}

    def diverge(*arguments, measure):
        raise DivergedError('not finite')

    monkeypatch.setattr(one, 'train', diverge)
    (workdir / 'z/lr-1/seed-0').mkdir(parents=True)
    one.run(workdir, 'z/lr-1/seed-0')
    assert json.loads((workdir / 'z/lr-1/seed-0' / FINISHED).read_text())['loss'] is None
    with pytest.raises(DivergedError):  # where no rate is chosen it is a failure
        one.run(workdir, 'z/seed-1')


def test_baselines_are_runs_of_the_grid(grid, workdir, calls, monkeypatch):
    masked = replace(grid.arms[1].experiment, objective=MaskedLM())
    three = (*grid.arms, Arm('masked', masked))
    wide = replace(grid, arms=three, baselines=True)
    record.write(workdir, wide, Proof({}, []), 'a command')
    # Arms that look at texts alike share a backbone.
    wanted = {'counts': [], 'untrained-plain': ['plain', 'z'], 'untrained-masked': ['masked']}
    assert record.read(workdir)['baselines'] == wanted
    places = [run.place for run in baselines.runs(wide)]
    assert places == [
        'baselines/counts/seed-0',
        *(
            f'baselines/untrained-{arm}/seed-{seed}'
            for arm in ('plain', 'masked')
            for seed in (0, 1)
        ),
    ]
    made = []
    monkeypatch.setattr(one.baselines, 'run', lambda *given: made.append(given))
    for run in baselines.runs(wide):
        run.directory(workdir).mkdir(parents=True)
        one.run(workdir, run.place)
    assert [run for run, *_ in made] == baselines.runs(wide) and not calls
    assert made[4][0].experiment == replace(masked, seed=1)


def test_an_evaluation_that_fails_leaves_no_mark(workdir, calls, monkeypatch):
    def fail(*arguments):
        raise RuntimeError

    monkeypatch.setattr(one, 'evaluate', fail)
    with pytest.raises(RuntimeError):
        one.run(workdir, 'z/seed-1')
    assert not (workdir / 'z/seed-1' / FINISHED).exists()


def test_a_second_process_waits_and_finds_the_run_finished(workdir, calls):
    directory = workdir / 'z/seed-1'
    with locked(directory / 'lock'):
        second = threading.Thread(target=one.run, args=(workdir, 'z/seed-1'))
        second.start()
        second.join(0.5)
        assert second.is_alive() and not calls
        (directory / FINISHED).write_text('{}')
    second.join(30)
    assert not second.is_alive() and not calls


def test_arms_are_matched_by_their_steps():
    grid = configs.grid('objectives_small')
    for section, setting in (('train', 'epochs'), ('train', 'tokens'), ('evaluation', 'patience')):
        arm = grid.arms[1]
        inner = replace(getattr(arm.experiment, section), **{setting: 2})
        changed = replace(arm, experiment=replace(arm.experiment, **{section: inner}))
        with pytest.raises(UserError, match=f'--{section}.{setting} 2 cannot be set in a grid'):
            check_steps(replace(grid, arms=(grid.arms[0], changed)))
    check_steps(grid)


def test_the_directory_of_a_comparison_is_that_of_no_run(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').write_text('{}')
    with pytest.raises(UserError, match='holds a run, and no comparison'):
        record.check_place(tmp_path / 'run')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='is no directory'):
        record.check_place(tmp_path / 'file')
    with pytest.raises(UserError, match='cannot write in .*: give another --workdir'):
        record.check_place(tmp_path / 'file' / 'below')
    record.check_place(tmp_path / 'a' / 'grid')
    assert not (tmp_path / 'a').exists()
    (tmp_path / 'a' / 'grid').mkdir(parents=True)
    record.check_place(tmp_path / 'a' / 'grid')
    (tmp_path / 'a' / 'grid' / record.NAME).write_text('{}')
    with pytest.raises(UserError, match='holds a comparison'), held(tmp_path / 'a' / 'grid'):
        pass


def test_power_counts_the_arms_that_have_the_figure():
    grid = configs.grid('block_size')  # three bounds, and blocks of one token, exact
    assert [power._compared(grid, x) for x in ('bits_per_byte', 'recall_span_10')] == [2, 3]
    exact = replace(grid, arms=(grid.arms[3], *grid.arms[:3]))
    with pytest.raises(UserError, match='no arm of block_size has a figure of it .* of block_1'):
        power._compared(exact, 'bits_per_byte')
    small = configs.grid('objectives_small')  # causal cannot be asked for what stands between
    for metric in ('infill_exact', 'middle_pseudo_bits_per_byte', 'suffix_ordinary_bits_per_byte'):
        with pytest.raises(UserError, match=f'--power {metric}: no arm of objectives_small'):
            power._compared(small, metric)
    with pytest.raises(UserError, match='does not ask this task: name it in --suite.tasks'):
        power._compared(small, 'task_star_graph')
    assert power._compared(configs.grid('star_graph'), 'task_star_graph') == 2


def test_another_suite_is_refused_once_something_was_measured(tmp_path):
    grid = configs.grid('objectives_small')
    record.write(tmp_path, grid, Proof({}, []), 'x')
    other = replace(grid, suite=replace(grid.suite, topics_field='genre', windows=8))
    record.check_workdir(tmp_path, other)
    with pytest.raises(UserError, match='holds another grid; it differs in name'):
        record.check_workdir(tmp_path, replace(other, name='else'))
    (tmp_path / 'causal' / 'seed-0').mkdir(parents=True)
    (tmp_path / 'causal' / 'seed-0' / FINISHED).write_text('{}')
    with pytest.raises(UserError, match='suite.topics_field.*suite.windows'):
        record.check_workdir(tmp_path, other)
