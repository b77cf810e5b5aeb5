"""What a comparison's report says of its arms: scores, differences and what is bold."""

import json
import math
import re

import numpy as np
import pytest

from llama_jax.compare import power, results
from llama_jax.evaluate import paired, per_text
from llama_jax.evaluate.per_text import PerText
from llama_jax.report import accounts, comparison, difference_pictures, scores
from llama_jax.report.grid import read_grid
from llama_jax.report.text import escape
from tests.report import compared
from tests.report.compared import THREE, cells, column, judged, page, set_metric, table_of
from tests.report.pages import Page


@pytest.fixture
def three(tmp_path):
    return compared.write(tmp_path / 'three', arms=THREE)


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


def test_a_damaged_file_of_texts_is_told(three):
    path = three / 'masked/seed-0/evaluation.npz'
    path.write_bytes(b'PK\x03\x04, cut off')
    found = judged(three)
    (note,) = found.grid.problems
    assert note.startswith('masked/seed-0: ') and 'evaluation.npz cannot be read' in note
    assert escape(note) in page(three)
    assert found.grid.arms[1].runs[0].done  # its means are known all the same


def test_a_report_judges_each_metric_once(three, monkeypatch):
    made = []
    for name in ('noise', 'differences'):
        kept = getattr(paired, name)
        monkeypatch.setattr(paired, name, lambda *x, n=name, f=kept: made.append(n) or f(*x))
    found = judged(three)
    metrics = scores.measured(found.grid, (*scores.HEADLINE, *scores.OTHERS, *scores.GEOMETRY))
    comparison.content(found)
    # The A/A arm once a metric; to the base, and all pairs for what is bold.
    assert 0 < made.count('noise') <= len(metrics)
    assert len(metrics) < made.count('differences') <= 2 * len(metrics)


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
    # Nor do its seeds say how many the others need, however much they vary.
    set_metric(three, 'masked', 'bits_per_byte', [0.5, 9.0], kind='bound')
    variance, _ = paired.seed_variance(judged(three).comparable('bits_per_byte'))
    assert variance == pytest.approx(5e-7)
    spread = power._spread(judged(three), 'bits_per_byte', None)
    assert spread == (variance, 0.0, 'of the paired seeds of earlier runs')
    # Bounds are compared with bounds, and every table says that it is.
    for arm in ('causal', 'masked'):
        of = {'kind': 'bound', 'standard_error': 0.012}
        set_metric(three, arm, 'bits_per_byte', [1.0, 1.001], **of)
    found = judged(three)
    each = {row.name: row.cells for row in scores.intervals(found).rows}
    assert ' bound (s.e. 0.0120)' in ' '.join(cell.text for cell in each['masked, seed 0'])
    less = column(scores.differences(found, scores.OTHERS), 'Likelihood')[0]
    assert less[0].endswith('] bound') and less[1] == 'n/a'
    assert difference_pictures.forest(found, 'bits_per_byte').unit == 'bits per byte ↓, bound'
    # An accuracy is one however choices were weighed, and says how.
    for arm, values in (
        ('causal', [0.2, 0.2]),
        ('masked', [0.9, 0.9]),
        ('contrastive', [0.2, 0.2]),
    ):
        set_metric(three, arm, 'infill_exact', values, by='exact' if arm == 'causal' else 'bound')
    texts, bold = column(scores.scores(judged(three), scores.OTHERS), 'Infill')
    assert [text.partition(' ± ')[2] for text in texts] == ['0.0', '0.0 by bound', '0.0 by bound']
    assert bold == [False, True, False]
    less = column(scores.differences(judged(three), scores.OTHERS), 'Infill')[0]
    assert [text.endswith('] by bound') for text in less] == [True, True]
    found = results.collect(judged(three))
    assert found.scores['masked']['infill_exact'].by == 'bound'
    assert {run.kinds.get('infill_exact') for run in found.runs if run.arm == 'masked'} == {
        'by bound'
    }


def test_what_a_baseline_reaches_is_not_bold(three):
    for name, values in (
        ('causal', [1.0, 1.001]),
        ('masked', [2.0, 2.002]),
        ('contrastive', [2, 2]),
    ):
        set_metric(three, name, 'bits_per_byte', values)
    assert column(scores.scores(judged(three), scores.OTHERS), 'Likelihood')[1] == [
        True,
        False,
        False,
    ]
    path = three / 'baselines/counts/seed-0/evaluation.json'
    path.parent.mkdir(parents=True)
    rows = {'3-gram': {'bits_per_byte': {'value': 0.9}}}
    rows['3-gram'] |= {name: {'value': 0 if 'alig' in name else 1.0} for name in scores.HEADLINE}
    path.write_text(json.dumps({'rows': rows}))
    facts = compared.grid(THREE) | {'baselines': {'counts': []}}
    (three / 'grid.json').write_text(json.dumps(facts))
    texts, bold = column(scores.scores(judged(three), scores.OTHERS), 'Likelihood')
    assert texts[0].endswith('▽') and not any(bold)
    # Where nothing is above its baselines, nothing is won.
    assert scores.headline(read_grid(three))[0] == ()
    assert 'Win matrix' not in page(three)


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
    assert scores.intervals(judged(three)).rows[-1].name == scores.NOISE
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
    # A baseline of other texts is none.
    assert not accounts.code(read_grid(three))
    for arm, path in (('masked/seed-0', 'arm'), ('baselines/untrained/seed-1', 'baseline')):
        path = three / arm / 'evaluation.json'
        path.write_text(json.dumps(json.loads(path.read_text('utf-8')) | {'examples': arm}))
    assert accounts.code(read_grid(three)) == [
        'Runs or baselines were measured on different texts: they are not equals.'
    ]
    spans = column(table, 'Span to span, recall@1\n')[0]
    assert '▽' in spans[0] and '▽' not in spans[1] and spans[-1] == '98.0'
    # What is not measured yet is not what does not apply.
    (three / 'contrastive/seed-0/evaluation.json').unlink()
    (three / 'contrastive/seed-1/evaluation.json').unlink()
    less = scores.differences(judged(three), ('probe_accuracy',))
    assert [row.cells[0].text for row in less.rows[1:2]] == ['—']
    # A bound may be of what is above a baseline; nothing is said of it.
    rows['3-gram'] = {'bits_per_byte': {'value': 0.5}}
    (three / 'baselines/counts/seed-0/evaluation.json').write_text(json.dumps({'rows': rows}))
    for kind, mark in (('exact', True), ('order', True), ('bound', False), ('pseudo', False)):
        set_metric(three, 'causal', 'bits_per_byte', [1.0, 1.1], kind=kind)
        causal = read_grid(three).arms[0]
        assert causal.kind('bits_per_byte') == kind
        assert bool(scores.below(read_grid(three), causal, 'bits_per_byte')) is mark
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
    # Nor what the best arm had before its first step, whoever else has learned.
    set_metric(three, 'causal', 'recall_span_1', [0.97, 0.97])
    assert 'recall_span_1' in carried
    assert 'recall_span_1' in scores.headline(read_grid(three))[1]


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
    table = scores.intervals(judged(three))
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
