"""Rates are chosen by each arm's own held-out loss, in one command that goes on where it stood; and
how many seeds a difference needs."""

import json
import math
import sys

import pytest

import configs
from experiments import cli, compare
from llama_jax.compare import record, tune
from llama_jax.compare.fair import EVALUATION_CODE, TRAINING_CODE, Proof
from llama_jax.compare.grid import FINISHED, runs
from llama_jax.errors import UserError
from llama_jax.train.code import evaluation_code, training_code
from tests.compare import tiny
from tests.report import compared


@pytest.fixture
def started(text, monkeypatch, tmp_path):
    """Runs experiments.compare; a run is made by `losses` of arm and rate, and told in `made`."""
    made = []
    best = {'plain': 3e-3, 'z': 9e-3}

    def run_all(planned, workdir, *, command, jobs):
        failed = []
        for run in planned:
            directory = run.directory(workdir)
            if run.finished(workdir):
                continue
            assert record.planned(workdir, run.place) == (run, tiny.grid(text).suite)
            made.append(run.place)
            rate = run.experiment.optimizer.schedule.peak
            directory.mkdir(parents=True, exist_ok=True)
            if '/lr-' in run.place:
                (directory / 'weights').write_text(f'{rate:g}')
                diverged = rate > 0.02
                loss = None if diverged else math.log(rate / best[run.arm]) ** 2
                result = {'metrics': {}, 'loss': loss}
            else:
                (directory / 'run.json').write_text('{"experiment": {}}')
                result = {'metrics': {'probe_accuracy': {'value': rate}}}
            (directory / FINISHED).write_text(json.dumps(result))
        return failed

    monkeypatch.setattr(configs, 'grids', lambda: {'tiny': lambda: tiny.grid(text)})
    held = {EVALUATION_CODE: evaluation_code(), TRAINING_CODE: training_code()}
    monkeypatch.setattr(compare.fair, 'check', lambda grid, say: Proof(held, []))
    monkeypatch.setattr(compare.fair, 'resolved', lambda grid: tiny.grid(text, seeds=grid.seeds))
    monkeypatch.setattr(compare.runner, 'run_all', run_all)

    def run(*arguments):
        made.clear()
        monkeypatch.setattr(
            sys, 'argv', ['compare', 'tiny', '--workdir', str(tmp_path), *map(str, arguments)]
        )
        cli.main(compare.main)
        return list(made)

    return run


def test_all_seeds_are_run_at_the_rate_that_each_arm_chose(started, tmp_path, capsys):
    made = started('--tune-rates', '--seeds', 2)
    # Rates x 0.03 to 3 of 0.01; then all seeds.
    assert made[:2] == ['plain/lr-0.0003/seed-0', 'z/lr-0.0003/seed-0'] and len(made) == 10 + 4
    facts = json.loads((tmp_path / 'grid.json').read_text())
    assert {arm: told['rate'] for arm, told in facts['tuning'].items()} == {
        'plain': 3e-3,
        'z': 0.01,
    }
    losses = facts['tuning']['z']['losses']
    assert list(losses) == ['0.0003', '0.001', '0.003', '0.01', '0.03'] and losses['0.03'] is None
    assert facts['may_differ'] == ['name', 'objective', tune.FIELD]
    for arm, rate in (('plain', 3e-3), ('z', 0.01)):
        for seed in (0, 1):
            told = json.loads((tmp_path / arm / f'seed-{seed}' / FINISHED).read_text())
            assert told['metrics']['probe_accuracy']['value'] == rate
        # The first seed goes on from the run that chose the rate.
        assert (tmp_path / arm / 'seed-0/weights').read_text() == f'{rate:g}'
        assert not (tmp_path / arm / 'seed-1/weights').exists()
    html = (tmp_path / 'report.html').read_text()
    assert 'Learning rates' in html and '(untuned)' not in html and 'not finite' in html
    assert 'at the edge' not in facts['tuning'] and 'edge' not in capsys.readouterr().err
    # The same command goes on, and finds all finished; more seeds are at the same rates.
    assert started('--tune-rates', '--seeds', 2) == []
    (tmp_path / 'z/lr-0.003/seed-0' / FINISHED).unlink()  # what is chosen stays chosen
    assert started('--tune-rates', '--seeds', 3) == ['plain/seed-2', 'z/seed-2']


def test_arms_that_are_tuned_apart_keep_each_others_rates(started, tmp_path):
    """As slices of a pod do: one arm each, one directory."""
    assert {x.split('/')[0] for x in started('--tune-rates', '--seeds', 1, '--only', 'z')} == {'z'}
    made = started('--tune-rates', '--seeds', 1, '--only', 'plain')
    assert {x.split('/')[0] for x in made} == {'plain'}
    assert record.rates(tmp_path) == {'plain': 3e-3, 'z': 0.01}
    assert started('--tune-rates', '--seeds', 2) == ['plain/seed-1', 'z/seed-1']


def test_a_rate_at_the_edge_is_said(started, tmp_path, capsys):
    started('--tune-rates', 0.3, 0.5, '--seeds', 1)
    assert 'z: learning rate 0.005, at the edge of those tried' in capsys.readouterr().err
    assert '0.005, at the edge' in (tmp_path / 'report.html').read_text()


def test_a_comparison_at_one_rate_is_called_untuned(started, tmp_path):
    started('--seeds', 1)
    assert '(untuned)</h1>' in (tmp_path / 'report.html').read_text()
    assert '(untuned)' in (tmp_path / 'report.md').read_text().splitlines()[0].replace('\\', '')


@pytest.mark.parametrize(
    'first, second, words',
    [
        ((), ('--tune-rates',), 'was begun without --tune-rates'),
        (('--tune-rates',), (), 'was begun with --tune-rates: give it again'),
        (
            ('--tune-rates',),
            ('--tune-rates', 1, 0.3, 0.2),
            'the rate of plain was chosen in',
        ),
        (None, ('--tune-rates', 0), '--tune-rates 0: it must be positive'),
        (None, ('--tune-rates', 2), 'give two factors or more'),
        (None, ('--tune-rates', '--lr-sweep'), 'give one of the two'),
        (None, ('--tune-rates', 5, 9), 'no finite loss at any rate (0.05, 0.09)'),
        (None, ('--power', 'recal_span_1=0.1', '--sd', 1), "did you mean 'recall_span_1'"),
        (None, ('--power', 'recall_span_1=x', '--sd', 1), 'a number above 0'),
        (None, ('--power', 'recall_span_1=0.1'), 'holds no comparison'),
        (None, ('--sd', 1), '--sd is of --power'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line(started, capsys, first, second, words):
    if first is not None:
        started(*first, '--seeds', 1)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        started(*second, '--seeds', 1)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert words in line


def test_arms_that_are_matched_stay_so(started, text, monkeypatch, capsys):
    matched = tiny.grid(text, match='flops')
    monkeypatch.setattr(configs, 'grids', lambda: {'tiny': lambda: matched})
    with pytest.raises(SystemExit):
        started('--match', 'tokens')
    assert '--match tokens has no effect: tiny is matched by flops' in capsys.readouterr().err
    monkeypatch.setattr(configs, 'grids', lambda: {'tiny': lambda: tiny.grid(text)})
    assert started('--match', 'tokens', '--seeds', 1) == ['plain/seed-0', 'z/seed-0']


def test_a_choice_needs_a_held_out_loss(grid):
    blind = tiny.with_second_arm(grid, lambda x: tiny.changed(x, 'evaluation', every=0))
    with pytest.raises(UserError, match='arm z: .*--evaluation.every is 0'):
        tune.check(blind, tune.FACTORS)
    places = [run.place for run in tune.runs(grid, (1.0, 0.1))]
    assert places == [f'{arm}/lr-{x}/seed-0' for x in ('0.001', '0.01') for arm in ('plain', 'z')]
    assert not set(places) & {run.place for run in runs(grid)}


def test_power_before_the_first_step(started, tmp_path, capsys):
    started('--power', 'recall_span_10=0.05', 'bits_per_byte=0.01', '--sd', 0.02)
    one, other = capsys.readouterr().out.splitlines()
    assert one.startswith('recall_span_10: a difference of 0.05 is shown by 4 seeds')
    assert int(other.split(' is shown by ')[1].split()[0]) > 20 and 'as given' in other
    assert not list(tmp_path.iterdir())
    # From the records of an earlier comparison.
    compared.write(tmp_path, arms=('causal', 'masked'), seeds=3)
    started('--power', 'probe_accuracy=0.05')
    assert 'of the paired seeds of earlier runs' in capsys.readouterr().out
