"""The report of a comparison: its numbers are those of the records, whole or not."""

import json
import math
import re
import shutil
import sys

import pytest

import experiments.report
from experiments import cli
from llama_jax.errors import UserError
from llama_jax.evaluate.metrics import METRICS
from llama_jax.report import accounts, comparison, scores
from llama_jax.report.grid import read_grid
from llama_jax.report.pictures import sections
from llama_jax.report.tables import NOT_YET, Table
from tests.report import compared
from tests.report.compared import THREE, cells, column, judged, page, set_metric, table_of, told
from tests.report.pages import Page, figures, read_off


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return compared.write(tmp_path_factory.mktemp('runs') / 'whole', rates=(1e-3, 1e-2))


@pytest.fixture
def three(tmp_path):
    return compared.write(tmp_path / 'three', arms=THREE)


def assert_said(workdir, *sentences):
    """On the page."""
    text = Page(page(workdir)).text
    for sentence in sentences:
        assert sentence in text


def test_budget_and_cost(three):
    grid = read_grid(three)
    row = cells(accounts.budget(grid), 'masked')
    assert [c.text for c in row.values()] == [
        *(
            '1.64M',
            '1.62M',
            '328k',
            '913k',
            '1.50M',
            '1.2%',
            '50.0%',
            '10.2M',
            '4.28e13',
            '0.96',
            '116',
        ),
    ]
    row = cells(accounts.cost(grid), 'masked')
    seconds = 400 * 0.3 * 26.1 / 27
    assert row['training\ntime'].text == f'1 min {seconds - 60:.0f} s'
    assert row['tokens/s'].text == f'{4096 / 0.3 * 27 / 26.1:,.0f}'
    assert row['clipped'].text == NOT_YET  # no record of gradients
    assert row['tokens'].text == '1.64M' and row['MFU'].text == '40.0%'
    assert row['evaluation\ntime'].text == '32.0 s'  # of 31.5 and 32.5


def test_settings_in_which_arms_differ_stand_with_the_arms(three):
    facts = compared.grid(THREE)
    for arm, decay in zip(facts['arms'], (0.1, 0.1, 1.0), strict=True):
        schedule = {'peak': decay / 10}
        arm['experiment'] = {'optimizer': {'weight_decay': decay, 'schedule': schedule}}
    (three / 'grid.json').write_text(json.dumps(facts))
    table = accounts.arms(read_grid(three))
    differing = [cells(table, arm)['settings, where arms differ'].text for arm in THREE]
    assert differing[0] == differing[1]
    assert differing[0] == 'optimizer.weight_decay 0.1, optimizer.schedule.peak 0.01'
    assert differing[2] == 'optimizer.weight_decay 1.0, optimizer.schedule.peak 0.1'


def test_what_is_planned_beside_the_arms_and_not_there_is_said(three):
    facts = compared.grid(THREE) | {
        'again': True,
        'tuning': {'causal': {'rate': 0.01, 'losses': {'0.01': 2.0}}},
        'baselines': {'counts': [], 'untrained': ['causal']},
    }
    (three / 'grid.json').write_text(json.dumps(facts))
    evaluation = {**compared.evaluation('causal', 0), 'text': {'selection': 'text_files'}}
    (three / 'causal/seed-0/evaluation.json').write_text(json.dumps(evaluation))
    assert_said(
        three,
        'The baseline counts is not finished (0 of 1): what stands in the headline may be below',
        'The baseline untrained is not finished (0 of 2)',
        'The A/A arm is not finished (0 of 2): it is the noise floor.',
        'The texts of text_files chose the learning rates and are measured as well',
    )
    for name, made in (
        ('baselines/counts/seed-0', {'rows': {'chance': {}}}),
        ('baselines/untrained/seed-0', {'metrics': {'alignment': {'value': 1.0}}}),
        ('baselines/untrained/seed-1', {'metrics': {'alignment': {'value': 1.0}}}),
    ):
        (three / name).mkdir(parents=True)
        (three / name / 'evaluation.json').write_text(json.dumps(made))
    for seed in (1000, 1001):
        compared.write_run(three / f'causal/again/seed-{seed}', 'causal', seed)
    assert 'is not finished' not in Page(page(three)).text


def test_what_a_grid_does_not_have_is_said(three):
    facts = compared.grid(THREE) | {'again': False, 'tuned': 'long ago', 'suite': {'rates': [1e-3]}}
    for arm, data in zip(facts['arms'], (None, 1, 2), strict=True):
        arm['experiment'] = {'randomness': {'init': 7, 'data': data, 'masks': 1 - (data == 1)}}
    facts.pop('baselines', None)
    (three / 'grid.json').write_text(json.dumps(facts))
    made = {**compared.evaluation('causal', 0), 'finetuning': {}, 'text': {'selection': 'wiki'}}
    (three / 'causal/seed-0/evaluation.json').write_text(json.dumps(made))
    assert_said(
        three,
        'This grid has no baselines: whether training helps is not seen here.',
        'This grid has no A/A arm: no noise floor stands beside its differences.',
        'Every run has the same init 7 (randomness): what seeds and the A/A arm show is without it',
        'Each run is fine-tuned at one learning rate: another may order the arms otherwise',
        'The texts of wiki chose the learning rates and are measured as well',
    )


def test_a_rate_at_which_training_broke_off_is_no_finished_run(three):
    path = three / 'causal/lr-1/seed-0'
    compared.write_run(path, 'causal', 0, rate=1.0, told={'metrics': {}, 'loss': None}, steps=150)
    (arm, *_) = read_grid(three).arms
    (run,) = arm.sweep
    assert run.state == 'failed: loss not finite at step 150' and not run.trained
    (path / 'evaluation.json').write_text(json.dumps({'metrics': {}, 'loss': 2.5}))
    assert read_grid(three).arms[0].sweep[0].done


@pytest.mark.slow
def test_what_was_not_made_alike_is_said_and_clipping_is_counted(three):
    assert 'they are not equals' not in page(three) and 'Fine-tuning' not in page(three)
    path = three / 'masked/seed-1'
    facts = json.loads((path / 'run.json').read_text('utf-8'))
    facts |= {'code': 'b', 'versions': {'jax': '0.0.1'}}
    facts['experiment']['optimizer'] = {'clip': 1.0}
    (path / 'run.json').write_text(json.dumps(facts))
    for seed, texts in ((0, 'x'), (1, 'y')):
        tuned = {'cut': 1 - seed, 'edge': True}
        made = {**compared.evaluation('masked', seed), 'examples': texts, 'finetuning': tuned}
        (three / f'masked/seed-{seed}/evaluation.json').write_text(json.dumps(made))
    first = three / 'causal/seed-0/run.json'
    first.write_text(json.dumps(json.loads(first.read_text('utf-8')) | {'code': 'a'}))
    lines = [
        {'kind': 'train', 'step': i, 'tokens': i, 'loss': 1.0, 'grad_norm': norm}
        for i, norm in enumerate((3.0, 0.5, 1.5, 0.9))
    ]
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines), 'utf-8')
    assert_said(
        three,
        'Runs were trained by different code: they are not equals.',
        'Runs were trained by different versions of packages: they are not equals.',
        'Runs or baselines were measured on different texts: they are not equals.',
        'Fine-tuning was still getting better at its last step in masked (1 of 2 runs): raise '
        '--suite.steps.',
        'Fine-tuning took the lowest or highest of its learning rates in masked (2 of 2 runs): '
        'widen --suite.rates.',
    )
    assert cells(accounts.cost(read_grid(three)), 'masked')['clipped'].text == '50%'


def test_what_was_compared_and_what_was_held(whole):
    text = Page(page(whole)).text
    for told_once in (
        "Weighted(parts=[CausalLM(z_loss=0.0001), InfoNCE(views='spans', temperature=0.05, "
        'learned=False)], weights=[1.0, 0.1])',
        f'{compared.hash_of("order"):064x}',
        'Arms may differ in: objective, name.',
        'python -m experiments.compare objectives_small --workdir runs/compare',
        'scikit-learn 1.9.0',
    ):
        assert told_once in text
    assert 'where arms differ' not in text
    facts = compared.grid()
    facts['arms'][1]['model'] = {**facts['arms'][1]['model'], 'layers': 8}
    (whole / 'grid.json').write_text(json.dumps(facts))
    table = accounts.arms(read_grid(whole))
    (whole / 'grid.json').write_text(json.dumps(compared.grid()))
    assert column(table, 'settings, where')[0][:2] == ['layers 6', 'layers 8']


def test_curves_lie_where_the_records_say(whole):
    drawn = figures(page(whole))
    both = [
        [x for x in compared.lines('contrastive', seed) if x['kind'] == 'light'] for seed in (0, 1)
    ]
    style = 'arm arm-3'
    for title, name, factor in (
        ('Span to span, recall@1', 'recall_span_1', 100),
        ('Alignment', 'alignment', 1),
    ):
        for axis, x in (('tokens', 'tokens'), ('training FLOPs, logarithmic', 'flops')):
            figure = drawn[title, axis]
            for seen, wanted in (
                (f'{style} seed', [factor * line[name] for line in both[0]]),
                (
                    f'{style} mean',
                    [factor * (a[name] + b[name]) / 2 for a, b in zip(*both, strict=True)],
                ),
            ):
                points = read_off(figure, seen, log=x == 'flops')
                assert [y for _, y in points] == pytest.approx(wanted, rel=0.01)
                assert [p for p, _ in points] == pytest.approx([o[x] for o in both[0]], rel=0.01)
    legend = re.findall(
        r'<span class="key arm arm-(\d) mean">(.*?)</span>', drawn['Alignment', 'tokens']
    )
    assert legend == [(str(i), name) for i, name in enumerate(compared.ARMS)]


def test_pareto(three):
    set_metric(three, 'causal', 'bits_per_byte', [1.0, 1.2])
    set_metric(three, 'causal', 'probe_accuracy', [0.5, 0.6])
    set_metric(three, 'masked', 'bits_per_byte', [1.3, 1.3])
    set_metric(three, 'masked', 'probe_accuracy', [0.4, 0.4])
    set_metric(three, 'contrastive', 'probe_accuracy', [0.7, 0.7])
    pictures = {p.name: p for *_, found in sections(read_grid(three)) for p in found}
    curves = {
        (c.label, c.style): c.points for c in pictures['pareto-bits-per-byte-probe-accuracy'].curves
    }
    assert curves['causal', 'arm arm-0 mean cloud'] == [pytest.approx((1.1, 55))]
    assert curves['', 'arm arm-0 seed'] == [pytest.approx((1.0, 50)), pytest.approx((1.2, 60))]
    # No likelihood: a line at its accuracy, never a point at 0; masked is worse in both.
    assert [y for _, y in curves['contrastive', 'arm arm-2 absent']] == pytest.approx([70, 70])
    assert not [style for _, style in curves if 'arm-2' in style and 'absent' not in style]
    assert ('Pareto front', 'front') not in curves
    set_metric(three, 'masked', 'probe_accuracy', [0.6, 0.6])
    pictures = {p.name: p for *_, found in sections(read_grid(three)) for p in found}
    (front,) = [
        c
        for c in pictures['pareto-bits-per-byte-probe-accuracy'].curves
        if c.label == 'Pareto front'
    ]
    assert front.points == [pytest.approx((1.1, 55)), pytest.approx((1.3, 60))]


def test_path_and_layers(whole):
    pictures = {p.name: p for *_, found in sections(read_grid(whole)) for p in found}
    light = [x for x in compared.lines('spans', 1) if x['kind'] == 'light']
    curves = [c for c in pictures['alignment-uniformity'].curves if 'arm-1' in c.style]
    assert [c.style for c in curves] == ['arm arm-1 seed step'] * 2 + ['arm arm-1 mean cloud']
    assert curves[1].points == [(x['uniformity'], x['alignment']) for x in light]
    assert curves[2].points[1] == (light[-1]['uniformity'], light[-1]['alignment'])
    probes = [compared.evaluation('spans', seed)['layers']['probe'] for seed in (0, 1)]
    (mean,) = [c for c in pictures['probe-layers'].curves if c.label == 'spans']
    wanted = [(float(i), 50 * (a + b)) for i, (a, b) in enumerate(zip(*probes, strict=True))]
    assert [*map(list, mean.points)] == [pytest.approx(list(p)) for p in wanted]


def test_learning_rates(whole, three):
    assert 'Learning-rate sensitivity' not in page(three)
    pictures = {p.name: p for *_, found in sections(read_grid(whole)) for p in found}
    (curve,) = [c for c in pictures['learning-rate-loss'].curves if c.label == 'masked']
    # The grid's own rate is in it, under the seed of the sweep alone.
    bent = {rate: 0.3 * math.log10(rate / 2.5e-3) ** 2 for rate in (1e-3, 1e-2)} | {3e-3: 0.0}
    assert [x for x, _ in curve.points] == [1e-3, 3e-3, 1e-2]
    assert [y for _, y in curve.points] == pytest.approx([bent[x] for x, _ in curve.points])
    (recall,) = [c for c in pictures['learning-rate-recall'].curves if c.label == 'masked']
    own = compared.metrics('masked', 0)['recall_span_1']['value']
    assert recall.points[1] == (3e-3, pytest.approx(100 * own))


def test_unfinished_and_broken_arms(three):
    shutil.rmtree(three / 'contrastive')
    (three / 'masked' / 'seed-0' / 'evaluation.json').write_text('{"metrics": {')
    (three / 'causal' / 'seed-1' / 'evaluation.json').unlink()
    compared.write_run(three / 'causal' / 'seed-1', 'causal', 1, steps=120, evaluated=False)
    broken = {'kind': 'train', 'step': 410, 'tokens': 9, 'loss': None}
    with open(three / 'masked' / 'seed-1' / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps(broken) + '\n{"kind": ')
    (three / 'masked' / 'seed-1' / 'evaluation.json').unlink()
    html = page(three)
    text = Page(html).text
    for sentence in (
        'This grid is not complete: 1 of 6 runs are finished.',
        'causal (1 of 2 finished; seed 1: step 120 of 400)',
        'masked (0 of 2 finished; seed 0: evaluation unreadable; '
        'seed 1: failed: loss not finite at step 410)',
        'contrastive (0 of 2 finished; seed 0: not started; seed 1: not started)',
        'masked/seed-1: 1 unreadable line was left out of metrics.jsonl.',
        'evaluation.json is no JSON object',
    ):
        assert sentence in text and sentence in told(three).replace('\\_', '_')
    table = table_of(three)
    probes = column(table, 'Order of tokens, linear probe')[0]
    own = compared.metrics('causal', 0)['probe_accuracy']['value']
    assert probes == [f'{100 * own:.1f} (1 of 2)', '—', '—']
    # The mean is drawn as far as both seeds go.
    figure = figures(html)['Own loss, training', 'tokens']
    assert read_off(figure, 'arm arm-0 mean')[-1][0] == pytest.approx(120 * 4096, rel=0.01)
    assert 'arm-2' not in figure


def test_a_run_that_failed_says_why(three):
    for place, said in (
        ('causal/seed-0', 'step 5\nerror: no space left: free some\n'),
        ('causal/seed-1', 'step 5\nTraceback:\nValueError: 7 is odd\n\n'),
        ('masked/seed-0', 'error: no space left: free some\nstep 6/400\n'),  # it goes on
    ):
        (three / place / 'evaluation.json').unlink()
        (three / place / 'log.txt').write_text(said)
    (three / 'masked' / 'seed-1' / 'log.txt').write_text('error: before it was finished\n')
    shutil.rmtree(three / 'contrastive' / 'seed-0')
    (three / 'contrastive' / 'seed-0').mkdir()
    (three / 'contrastive' / 'seed-0' / 'log.txt').write_text('error: mesh: 3 devices\n')
    states = [[run.state for run in arm.runs] for arm in read_grid(three).arms]
    assert states == [
        [
            'trained, not evaluated, failed: no space left: free some',
            'trained, not evaluated, failed: ValueError: 7 is odd',
        ],
        ['trained, not evaluated', 'finished'],
        ['failed: mesh: 3 devices', 'finished'],
    ]


def test_a_grid_that_has_only_begun(tmp_path):
    workdir = compared.write(tmp_path / 'young', arms=THREE)
    for arm in THREE:
        shutil.rmtree(workdir / arm)
    html = page(workdir)
    assert '0 of 6 runs are finished' in html and '<figure>' not in html
    (workdir / 'grid.json').write_text('{}')
    assert 'grid.json names no arm.' in Page(page(workdir)).text


def test_a_suite_of_likelihoods_alone_has_no_empty_tables(three):
    for path in three.glob('*/seed-*/evaluation.json'):
        told = json.loads(path.read_text())
        for name in (*scores.HEADLINE, *scores.GEOMETRY):
            told['metrics'][name] |= {'value': None, 'n': 0}
        path.write_text(json.dumps(told))
    parts = {section.title: section for section in comparison.content(judged(three))}
    assert 'measures none of them' in parts['Common metrics'].note
    assert not {'Below a baseline', 'Win matrix', 'Geometry'} & {*parts}
    (likelihoods,) = parts['Metrics of some objectives'].parts
    assert any('Likelihood' in head for head in likelihoods.head)
    assert len([part for part in parts['Differences'].parts if isinstance(part, Table)]) == 1


def test_seeds_beyond_the_plan_are_counted(three):
    compared.write_run(three / 'causal' / 'seed-2', 'causal', 2)
    runs = read_grid(three).arms[0].runs
    assert [run.seed for run in runs] == [0, 1, 2] and all(run.done for run in runs)


def test_names_that_lead_elsewhere_are_not_read(three):
    facts = compared.grid(THREE)
    for entry, name in zip(facts['arms'], ('../three/causal', '..', 7), strict=True):
        entry['name'] = name
    (three / 'grid.json').write_text(json.dumps(facts))
    grid = read_grid(three)
    assert not grid.arms
    assert "names an arm that is no directory: '../three/causal'" in ' '.join(grid.problems)


def test_all_metrics_are_in_one_of_the_tables():
    shown = scores.HEADLINE + scores.GEOMETRY + scores.OTHERS
    assert sorted(shown) == sorted(METRICS)


def test_no_comparison(tmp_path):
    with pytest.raises(UserError, match=r'holds no comparison \(no grid.json\): name the --work'):
        comparison.write(tmp_path)
    with pytest.raises(UserError, match='is no directory: name the --workdir'):
        comparison.write(tmp_path / 'nowhere')
    (tmp_path / 'grid.json').write_text('[')
    with pytest.raises(UserError, match='grid.json is no JSON object'):
        comparison.write(tmp_path)
    assert not (tmp_path / 'report.html').exists()


def test_command_tells_a_comparison_from_a_run(three, monkeypatch, capsys):
    monkeypatch.setattr(comparison.draw, 'write_pngs', lambda folder, pictures: [])
    for path in (three, three / 'causal' / 'seed-0'):
        monkeypatch.setattr(sys, 'argv', ['report', str(path)])
        cli.main(experiments.report.main)
        assert capsys.readouterr().out.strip() == str(path / 'report.html')
    assert 'Win matrix' in (three / 'report.html').read_text('utf-8')
    assert 'Win matrix' not in (three / 'causal' / 'seed-0' / 'report.html').read_text('utf-8')
