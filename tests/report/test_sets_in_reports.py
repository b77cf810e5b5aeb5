"""What a report says of each source and of each validation set."""

from tests.report import run
from tests.report.pages import Page, figures, report


def of_sets(lines):
    """Lines of a run on two sources and with two validation sets."""
    for line in lines:
        if line['kind'] == 'train':
            told = {'epochs': line['step'] / 400, 'documents': line['step'] * 3}
            line |= {f'{k}/{label}': v for k, v in told.items() for label in ('web', '<b>書')}
            line |= {'share/web': 0.752, 'share/<b>書': 0.248}
        if line['kind'] == 'validation':
            line |= {'loss/zh': 2.5, 'loss/<i>': 3.5, 'bytes/zh': 3_000, 'bytes/<i>': 4_000}
            line |= {'bits_per_byte/zh': 1 + 100 / line['step'], 'bits_per_byte/<i>': 2.25}
    return lines


def test_sources_and_validation_sets_have_their_figures(tmp_path):
    html = report(tmp_path / 'sets', lines=of_sets(run.metrics()))
    figure = next(f for (title, _), f in figures(html).items() if title == 'Validation by set')
    assert 'bits per byte' in figure and figure.count('<g class="arm ') == 2
    assert '>zh</span>' in figure and '>&lt;i&gt;</span>' in figure
    text = Page(html).text
    assert 'trained on epochs documents read share of tokens' in text
    assert 'web 2.00 2,400 75.2%' in text and '<b>書 2.00 2,400 24.8%' in text
    assert 'validated on, step 800 loss bits per byte bytes zh 2.500 1.125 3,000' in text
    assert '<i> 3.500 2.250 4,000' in text


def test_a_bound_is_called_one_wherever_it_stands(tmp_path):
    lines = of_sets(run.metrics())
    for line in lines:
        if line['kind'] == 'validation':
            line |= {'likelihood': 'bound', 'bits_per_byte_se': 0.0123}
    html = report(tmp_path / 'bound', lines=lines)
    text = Page(html).text
    assert 'Validation, bits per byte, upper bound' in text
    assert 'bounded under random masks (standard error 0.012).' in text
    assert 'loss bits per byte, upper bound bytes zh' in text
    drawn = [figure for figure in figures(html).values() if 'bits per byte' in figure]
    assert len(drawn) > 2 and all('bits per byte, upper bound' in figure for figure in drawn)


def test_sets_without_a_likelihood_show_their_loss(tmp_path):
    lines = [
        {k: v for k, v in line.items() if not k.startswith(('bits_per_byte', 'bytes'))}
        for line in of_sets(run.metrics())
    ]
    html = report(tmp_path / 'loss', lines=lines)
    figure = next(f for (title, _), f in figures(html).items() if title == 'Validation by set')
    assert 'nats per token' in figure
    assert 'zh 2.500 n/a n/a' in Page(html).text


def test_one_source_has_its_epochs_and_older_runs_have_no_table(tmp_path):
    lines = [line | {'epochs': 1.5, 'documents': 60} for line in run.metrics()]
    text = Page(report(tmp_path / 'one', lines=lines)).text
    assert 'trained on epochs documents read all 1.50 60' in text
    assert 'validated on' not in text and 'Validation by set' not in text
    assert 'documents read' not in Page(report(tmp_path / 'older')).text
