"""The report of a comparison: its numbers are those of the records, whole or not."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest

import experiments.report
from experiments import cli
from llama_jax.errors import UserError
from llama_jax.evaluate import per_text
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.per_text import PerText
from llama_jax.report import accounts, comparison, scores
from llama_jax.report.grid import read_grid
from llama_jax.report.judged import Judged
from llama_jax.report.pictures import sections
from llama_jax.report.tables import NOT_YET, Table
from tests.report import compared
from tests.report.pages import Page, figures, read_off

THREE = ('causal', 'masked', 'contrastive')


def page(workdir):
    grid = read_grid(workdir)
    return comparison.page(grid, comparison.content(grid))


def told(workdir):
    grid = read_grid(workdir)
    return comparison.text(grid, comparison.content(grid))


def cells(table, arm):
    """The cells of a row by column."""
    row = next(row for row in table.rows if row.name == arm)
    return dict(zip(table.head[1:], row.cells, strict=True))


def column(table, start):
    """Texts, and which of them are bold, of the column whose head starts so."""
    (at,) = [i for i, head in enumerate(table.head[1:]) if head.startswith(start)]
    found = [row.cells[at] for row in table.rows]
    return [cell.text for cell in found], [cell.best for cell in found]


def set_metric(workdir, arm, name, values):
    """One value per seed into evaluation.json."""
    for seed, value in enumerate(values):
        path = workdir / arm / f'seed-{seed}' / 'evaluation.json'
        made = json.loads(path.read_text('utf-8'))
        made['metrics'][name] = {'value': value, 'low': 0.1, 'high': 0.9, 'n': 500}
        path.write_text(json.dumps(made), 'utf-8')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return compared.write(tmp_path_factory.mktemp('runs') / 'whole', rates=(1e-3, 1e-2))


@pytest.fixture
def three(tmp_path):
    return compared.write(tmp_path / 'three', arms=THREE)


def judged(workdir):
    return Judged(read_grid(workdir))


def table_of(workdir):
    return scores.scores(judged(workdir), scores.HEADLINE)


def test_scores_by_hand(three):
    set_metric(three, 'causal', 'probe_accuracy', [0.60, 0.64])
    set_metric(three, 'masked', 'probe_accuracy', [0.58, 0.65])
    set_metric(three, 'contrastive', 'probe_accuracy', [0.40, 0.44])
    table = table_of(three)
    # Seeds move all arms alike: no more than chance sets causal and masked apart, and both are
    # above the third.
    assert column(table, 'Order of tokens, linear probe') == (
        ['62.0 ± 2.8', '61.5 ± 4.9', '42.0 ± 2.8'],
        [True, True, False],
    )
    assert table.head[1] == 'Order of tokens, linear probe\n% ↑'
    assert '<b>62.0 ± 2.8</b>' in table.html() and '<b>42.0' not in table.html()
    assert '| **62.0 ± 2.8** |' in table.markdown() and '| 42.0 ± 2.8 |' in table.markdown()


def test_nothing_is_bold_that_no_interval_carries(three):
    # Best by far under one seed and last under the other.
    set_metric(three, 'causal', 'probe_accuracy', [0.90, 0.10])
    set_metric(three, 'masked', 'probe_accuracy', [0.20, 0.30])
    set_metric(three, 'contrastive', 'probe_accuracy', [0.21, 0.25])
    assert not any(column(table_of(three), 'Order of tokens, linear probe')[1])
    # Geometry ranks nothing, whatever the figures.
    for arm, value in zip(THREE, (0.1, 0.5, 0.9), strict=True):
        set_metric(three, arm, 'alignment', [value, value + 0.001])
    table = scores.scores(judged(three), scores.GEOMETRY)
    assert not any(column(table, 'Alignment')[1])
    assert 'Alignment' not in ' '.join(table_of(three).head)


def test_a_bound_is_not_bold_beside_an_exact_value(three):
    set_metric(three, 'causal', 'bits_per_byte', [1.0, 1.001])
    set_metric(three, 'masked', 'bits_per_byte', [0.5, 0.501])
    set_metric(three, 'contrastive', 'bits_per_byte', [2.0, 2.002])
    path = three / 'masked/seed-0/evaluation.json'
    made = json.loads(path.read_text('utf-8'))
    made['metrics']['bits_per_byte']['kind'] = 'bound'
    path.write_text(json.dumps(made))
    texts, bold = column(scores.scores(judged(three), scores.OTHERS), 'Likelihood')
    assert texts[1] == '0.500 ± 0.001 bound' and bold == [True, False, False]
    found = judged(three).differences('bits_per_byte')
    assert list(found) == ['contrastive']


def keep_texts(path, name, over, document):
    """Into evaluation.npz, and the value into evaluation.json."""
    of = PerText(np.arange(len(over)).astype(str), document.astype(str), over, np.ones(len(over)))
    per_text.save(path.with_suffix('.npz'), {name: of})
    made = json.loads(path.read_text('utf-8'))
    made['metrics'][name] = {'value': over.mean(), 'low': 0.1, 'high': 0.9, 'n': len(over)}
    path.write_text(json.dumps(made))


def test_differences_are_those_of_paired_texts(three):
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(30), 4)
    hard = rng.normal(0.5, 0.3, 120)
    for arm, above in zip(THREE, (0.0, 0.05, 0.0), strict=True):
        for seed in (0, 1):
            over = hard + above + 0.01 * rng.normal(size=120) + 0.002 * seed
            keep_texts(
                three / f'{arm}/seed-{seed}/evaluation.json', 'recall_span_1', over, document
            )
    for seed in (0, 1):
        path = three / f'causal/again/seed-{1000 + seed}'
        compared.write_run(path, 'causal', seed)
        over = hard + 0.01 * rng.normal(size=120)
        keep_texts(path / 'evaluation.json', 'recall_span_1', over, document)
    table = scores.differences(judged(three), scores.HEADLINE)
    texts, bold = column(table, 'Span to span, recall@1\n')
    assert bold == [True, False, False]  # masked, contrastive, the noise floor
    value, low, high = map(float, re.findall(r'[+-][\d.]+', texts[0].replace('−', '-')))
    assert value == pytest.approx(5, abs=0.3) and 4 < low < value < high < 6
    floor = float(texts[2].removeprefix('± '))
    assert table.rows[2].name == scores.NOISE and 0 < floor < 1
    cell = table.rows[0].cells[table.head.index('Span to span, recall@1\n% ↑') - 1]
    assert '2 seeds, 120 texts; p ' in cell.told
    html = page(three)
    assert 'causal, again, seed 1001' in Page(html).text and scores.NOISE in Page(html).text


def test_baselines_are_rows_and_an_arm_below_one_is_marked(three):
    rows = {'TF-IDF': {'probe_accuracy': {'value': 0.61}}, 'chance': {}}
    for name, result in (
        ('counts/seed-0', {'rows': rows}),
        ('untrained/seed-0', {'metrics': {'recall_span_1': {'value': 0.99}}}),
        ('untrained/seed-1', {'metrics': {'recall_span_1': {'value': 0.97}}}),
    ):
        path = three / 'baselines' / name
        path.mkdir(parents=True)
        (path / 'evaluation.json').write_text(json.dumps(result))
    facts = compared.grid(THREE) | {'baselines': {'counts': [], 'untrained': ['causal']}}
    (three / 'grid.json').write_text(json.dumps(facts))
    set_metric(three, 'causal', 'probe_accuracy', [0.60, 0.60])
    set_metric(three, 'masked', 'probe_accuracy', [0.62, 0.62])
    set_metric(three, 'contrastive', 'probe_accuracy', [0.61, 0.61])
    table = table_of(three)
    assert column(table, 'Order of tokens, linear probe')[0] == [
        *('60.0 ± 0.0 ▽', '62.0 ± 0.0', '61.0 ± 0.0 ▽', '61.0', 'n/a'),
    ]
    assert [row.name for row in table.rows[3:]] == ['TF-IDF', 'untrained']
    assert cells(table, 'causal')['Order of tokens, linear probe\n% ↑'].told.endswith(
        'not above TF-IDF'
    )
    spans = column(table, 'Span to span, recall@1\n')[0]
    assert '▽' in spans[0] and '▽' not in spans[1] and spans[-1] == '98.0'
    # What training does not help in is no headline, and has no vote.
    rows['TF-IDF'] |= {f'recall_doc_{k}': {'value': 0.999} for k in (1, 5, 10)}
    (three / 'baselines/counts/seed-0/evaluation.json').write_text(json.dumps({'rows': rows}))
    grid = read_grid(three)
    carried, rest = scores.headline(grid)
    assert rest == ('recall_doc_1', 'recall_doc_5', 'recall_doc_10')
    assert set(carried) | set(rest) == set(scores.measured(grid, scores.HEADLINE))
    html = page(three)
    assert 'Below a baseline' in html and f'The share of the {len(scores.tasks(carried))} ' in html
    assert "'recall_doc_1'" not in str(scores.tasks(carried))


def test_one_seed_has_no_deviation(tmp_path):
    workdir = compared.write(tmp_path / 'one', arms=THREE, seeds=1)
    set_metric(workdir, 'causal', 'uniformity', [-1.5])
    table = scores.scores(judged(workdir), scores.GEOMETRY)
    assert column(table, 'Uniformity')[0][0] == '−1.500'
    assert '±' not in table.markdown()
    # One seed says nothing of others.
    set_metric(workdir, 'causal', 'probe_accuracy', [0.99])
    assert not any(column(table_of(workdir), 'Order of tokens, linear probe')[1])
    table = scores.differences(judged(workdir), scores.HEADLINE)
    assert {cell.told for row in table.rows for cell in row.cells} == {'one seed: no interval'}


def others(workdir):
    """Metrics that not every arm has, without the tasks of no suite."""
    return scores.measured(read_grid(workdir), scores.OTHERS)


def test_what_does_not_apply_is_never_a_number(three):
    table = scores.scores(judged(three), others(three))
    of_likelihood = list(cells(table, 'contrastive').values())[2:]  # after the topics
    assert {cell.text for cell in of_likelihood} == {'n/a'}
    assert not any(cell.best for cell in cells(table, 'contrastive').values())
    assert table.markdown().count(' n/a |') == 3 + 6 + 9  # causal, masked, contrastive
    # Not measured, and measured as what is no number, are other things.
    set_metric(three, 'contrastive', 'infill_exact', [math.nan, math.nan])
    for seed in (0, 1):
        (three / 'masked' / f'seed-{seed}' / 'evaluation.json').unlink()
    table = scores.scores(judged(three), others(three))
    assert column(table, 'Infill')[0] == ['n/a', '—', 'not finite']
    # A zero that was measured is one.
    set_metric(three, 'contrastive', 'infill_exact', [0.0, 0.0])
    table = scores.scores(judged(three), others(three))
    assert column(table, 'Infill')[0][2] == '0.0 ± 0.0'


def test_intervals_over_examples(three):
    set_metric(three, 'causal', 'finetune_accuracy', [0.5, 0.7])
    table = scores.intervals(read_grid(three))
    assert len(table.rows) == 6
    row = cells(table, 'causal, seed 1')
    assert row['Order of tokens, fine-tuned\n% ↑'].text == '70.0 [10.0, 90.0]'
    assert row['Infill, exact match\n% ↑'].text == 'n/a'


def test_wins_by_hand(three):
    """Of four tasks: order frozen and fine-tuned, six recalls each of docstrings and of spans."""
    for arm in THREE:
        for name in scores.HEADLINE:
            set_metric(
                three, arm, name, {'causal': [0.5] * 2, 'masked': [0.6] * 2}.get(arm, [1, 0])
            )
    for kind in ('recall_doc', 'recall_doc_white'):
        for k, value in ((1, 0.4), (5, 0.4), (10, 0.5)):
            set_metric(three, 'masked', f'{kind}_{k}', [value, value])
    table = scores.wins(read_grid(three))
    # Causal wins two of three recalls of docstrings and ties the third, and loses all else.
    assert [c.text for c in table.rows[0].cells] == ['', f'{100 * (2.5 / 3) / 4:.0f}%', '50%']
    assert [c.text for c in table.rows[1].cells][0] == '79%'
    assert not any(c.best for row in table.rows for c in row.cells)


def test_budget_and_cost(three):
    grid = read_grid(three)
    row = cells(accounts.budget(grid), 'masked')
    assert [c.text for c in row.values()] == [
        *('1.64M', '328k', '913k', '1.50M', '1.2%', '50.0%', '10.2M', '4.28e13', '0.96', '116'),
    ]
    row = cells(accounts.cost(grid), 'masked')
    seconds = 400 * 0.3 * 26.1 / 27
    assert row['training\ntime'].text == f'1 min {seconds - 60:.0f} s'
    assert row['tokens/s'].text == f'{4096 / 0.3 * 27 / 26.1:,.0f}'
    assert row['clipped'].text == NOT_YET  # no record of gradients
    assert row['tokens'].text == '1.64M' and row['MFU'].text == '40.0%'
    assert row['evaluation\ntime'].text == '32.0 s'  # of 31.5 and 32.5


def test_what_was_not_made_alike_is_said_and_clipping_is_counted(three):
    assert 'they are not equals' not in page(three)
    path = three / 'masked/seed-1'
    facts = json.loads((path / 'run.json').read_text('utf-8'))
    facts |= {'code': 'b', 'versions': {'jax': '0.0.1'}}
    facts['experiment']['optimizer'] = {'clip': 1.0}
    (path / 'run.json').write_text(json.dumps(facts))
    for seed, texts in ((0, 'x'), (1, 'y')):
        made = {**compared.evaluation('masked', seed), 'examples': texts}
        (three / f'masked/seed-{seed}/evaluation.json').write_text(json.dumps(made))
    first = three / 'causal/seed-0/run.json'
    first.write_text(json.dumps(json.loads(first.read_text('utf-8')) | {'code': 'a'}))
    lines = [
        {'kind': 'train', 'step': i, 'tokens': i, 'loss': 1.0, 'grad_norm': norm}
        for i, norm in enumerate((3.0, 0.5, 1.5, 0.9))
    ]
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines), 'utf-8')
    text = Page(page(three)).text
    for sentence in (
        'Runs were trained by different code: they are not equals.',
        'Runs were trained by different versions of packages: they are not equals.',
        'Runs were measured on different texts: they are not equals.',
    ):
        assert sentence in text
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
    assert 'model, where arms differ' not in text
    facts = compared.grid()
    facts['arms'][1]['model'] = {**facts['arms'][1]['model'], 'layers': 8}
    (whole / 'grid.json').write_text(json.dumps(facts))
    table = accounts.arms(read_grid(whole))
    (whole / 'grid.json').write_text(json.dumps(compared.grid()))
    assert column(table, 'model, where')[0][:2] == ['layers 6', 'layers 8']


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
    parts = {section.title: section for section in comparison.content(read_grid(three))}
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
