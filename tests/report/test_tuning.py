"""Before and after, in the report of a run that began with trained parameters."""

import json
import re

import pytest

from llama_jax.report import tuning
from llama_jax.report.page import write_report
from llama_jax.report.read import read
from llama_jax.report.tables import NOT_YET
from tests.report import run
from tests.report.pages import Page, figures, read_off


def lines(*, before=0.5, after=0.9):
    """Two validations and one before the first step, of a classifier without a likelihood."""
    found = [line for line in run.metrics(steps=400) if line['kind'] == 'train']
    for step, loss, accuracy in ((0, 1.6, before), (200, 0.3, after), (400, 0.4, 0.87)):
        at = {'step': step, 'tokens': step * 2048, 'flops': float(step), 'seconds': step / 10}
        sets = {'loss/zh': 1.0, 'accuracy/zh': 0.1, 'bits_per_byte_se': 0.2}
        found.append({'kind': 'validation', **at, 'loss': loss, 'accuracy': accuracy, **sets})
        for i in range(8):
            told = {'prompt': f'Q{i}?', 'text': f'at {step} <b>', 'reference': f'right {i}'}
            found.append({'kind': 'sample', 'step': step, **told})
    return found


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    path = run.write(
        tmp_path_factory.mktemp('runs') / 'tuned',
        facts=run.facts(experiment={'start': 'smollm2<', 'train': {'steps': 400}}),
        lines=lines(),
        baselines=False,
    )
    return write_report(path).read_text('utf-8')


def test_figures_before_after_and_of_the_best(html):
    text = Page(html).text
    assert 'before the first step (smollm2<)' in text
    assert 'before after step 400 best, step 200' in text
    assert 'loss 1.60 0.400 0.300' in text and 'accuracy 0.500 0.870 0.900' in text
    assert 'zh' not in text.split('Before and after')[1].split('Learning')[0]
    assert 'Validation, loss 0.400 at step 400' in text
    assert 'The best was 0.300 at step 200.' in text and 'xz' not in text


def test_texts_before_and_after_stand_together(html):
    text = Page(html).text
    assert 'prompt Q0? before at 0 <b> after at 400 <b> wanted right 0' in text
    assert text.count('at 400 <b>') == 16  # here, and among the samples by step
    assert '2 more' in text
    at = html.index('<h2>Before and after')
    assert at < html.index('<h2>Learning')


def test_what_an_objective_measures_is_drawn(html):
    seen = read_off(figures(html)['Accuracy', 'tokens'], 'held-out')
    wanted = [(0, 0.5), (200 * 2048, 0.9), (400 * 2048, 0.87)]
    assert len(seen) == 3 and not any('byte se' in title for title, _ in figures(html))
    for got, point in zip(seen, wanted, strict=True):
        assert got == pytest.approx(point, abs=900, rel=1e-2)


@pytest.mark.parametrize('steps', [(), (0,), (200, 400)])
def test_a_run_without_both_ends_has_no_such_section(tmp_path, steps):
    kept = [x for x in lines() if x['kind'] == 'train' or x['step'] in steps]
    path = run.write(tmp_path / 'run', lines=kept)
    assert tuning.section(read(path)) == ''
    Page(write_report(path).read_text('utf-8'))


def test_figures_that_are_not_finite_are_left_open(tmp_path):
    changed = [{**x, 'loss': None} if x['kind'] == 'validation' else x for x in lines()]
    section = tuning.section(read(run.write(tmp_path / 'run', lines=changed)))
    assert re.search('accuracy</th><td[^>]*>0.500', section) and 'best, step' not in section
    assert NOT_YET in section


def test_tasks_stand_with_their_intervals(tmp_path):
    path = run.write(tmp_path / 'run', lines=lines())
    assert '<h2>Evaluation</h2>' not in write_report(path).read_text('utf-8')
    mine, theirs = ({'value': x, 'low': x - 0.05, 'high': x + 0.05, 'se': 0.02} for x in (0.9, 0.4))
    difference = {'value': 0.5, 'low': 0.43, 'high': 0.57, 'se': 0.03}
    task = {'kind': 'choices', 'items': 200, 'shots': 0, 'chance': 0.25}
    told = {
        'model': 'runs/<x>, step 24',
        'tasks': {'topics': {**task, 'metrics': {'acc': mine, 'acc_chars': {'value': None}}}},
    }
    (path / 'tasks.json').write_text(json.dumps(told))
    text = Page(write_report(path).read_text('utf-8')).text
    assert 'topics, 200 items this run acc 0.900 [0.850, 0.950] acc_chars n/a chance 0.250' in text
    assert 'Of runs/<x>, step 24; in brackets the 95% interval' in text and 'above' not in text
    other = {'topics': {'metrics': {'acc': theirs}, 'difference': {'acc': difference}}}
    (path / 'tasks.json').write_text(
        json.dumps({**told, 'against': {'model': 'b', 'tasks': other}})
    )
    text = Page(write_report(path).read_text('utf-8')).text
    assert 'acc 0.900 [0.850, 0.950] 0.400 [0.350, 0.450] 0.500 [0.430, 0.570]' in text
    assert 'The difference is above b on the same items.' in text
    (path / 'tasks.json').write_text('[]')
    assert 'tasks.json is no JSON object' in Page(write_report(path).read_text('utf-8')).text
