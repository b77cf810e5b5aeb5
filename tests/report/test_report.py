"""The report: its numbers are those of the records, and nothing in the records can break it."""

import json
import math
import re
import sys

import pytest

import experiments.report
from experiments import cli
from llama_jax.errors import UserError
from llama_jax.report.page import write_report
from llama_jax.report.text import escape
from llama_jax.units import duration
from tests.report import run
from tests.report.pages import Page, curve, figures, read_off, report


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    return report(tmp_path_factory.mktemp('runs') / 'quickstart')


def test_headline_numbers_are_those_of_the_records(html, tmp_path):
    text = Page(html).text
    lines = run.metrics()
    train = [line for line in lines if line['kind'] == 'train']
    final = [line for line in lines if line['kind'] == 'validation'][-1]
    baselines = json.loads((run.write(tmp_path / 'again') / 'baselines.json').read_text())
    assert f'Validation, bits per byte {final["bits_per_byte"]:.3f} at step 800' in text
    assert 'The best was' not in text
    assert f'xz -9 {baselines["xz"]:.3f}' in text
    assert f'zlib -9 {baselines["zlib_per_document"]:.3f}' in text
    assert f'{baselines["documents"]} documents' in text
    assert 'The model was measured on' not in text
    assert '3.61M 3,607,808' in text
    assert '1.64M 1,638,400 positions' in text
    assert f'Training time {duration(train[-1]["seconds"])}' in text
    waiting = sum(line['seconds_waiting'] for line in train) / train[-1]['seconds']
    assert f'{waiting:.1%} waiting for data' in text
    by_speed = sorted(train, key=lambda line: line['tokens_per_second'])
    middle = [(a['tokens_per_second'] + b['tokens_per_second']) / 2 for a, b in [by_speed[39:41]]]
    assert f'Tokens per second {round(middle[0]):,}' in text
    assert f'MFU {middle[0] * run.FLOPS_PER_TOKEN / run.PEAK:.1%}' in text
    assert '212 GFLOP/s a device' in text
    assert run.facts()['peak_convention'] in text
    assert f'Last training loss {train[-1]["loss"]:.3f}' in text
    assert '800 steps' in text and 'not finished' not in text
    assert 'busy' not in text


def test_more_than_the_peak_is_explained(tmp_path):
    """What else runs while the peak of a CPU is measured makes it too low."""
    lines = [{**line, 'mfu': 1.2} for line in run.metrics()]
    text = Page(report(tmp_path / 'run', lines=lines)).text
    assert '212 GFLOP/s a device; the machine was busy when that was measured' in text


@pytest.mark.parametrize(
    ('title', 'axis', 'kind', 'style', 'x', 'y'),
    [
        ('Loss', 'tokens', 'train', 'raw', 'tokens', 'loss'),
        ('Loss', 'tokens', 'validation', 'held-out', 'tokens', 'loss'),
        ('Loss', 'training FLOPs, logarithmic', 'train', 'raw', 'flops', 'loss'),
        ('Validation', 'tokens', 'validation', 'held-out', 'tokens', 'bits_per_byte'),
        *(
            ('Validation', 'training FLOPs, logarithmic', 'validation', 'held-out')
            + ('flops', 'bits_per_byte'),
        ),
        ('Learning rate', 'tokens', 'train', 'trend', 'tokens', 'learning_rate'),
        ('Gradient norm', 'tokens', 'train', 'raw', 'tokens', 'grad_norm'),
        ('Speed', 'training time, minutes', 'train', 'raw', 'minutes', 'tokens_per_second'),
    ],
)
def test_curves_lie_where_the_records_say(html, title, axis, kind, style, x, y):
    seen = read_off(figures(html)[title, axis], style, log='FLOPs' in axis)
    lines = [line for line in run.metrics() if line['kind'] == kind]
    wanted = [(line['seconds'] / 60 if x == 'minutes' else line[x], line[y]) for line in lines]
    assert len(seen) == len(wanted)
    # A thousandth of the frame, the precision of the drawing.
    for axis_values, got in zip(zip(*wanted, strict=True), zip(*seen, strict=True), strict=True):
        slack = 1e-3 * max(axis_values)
        assert got == pytest.approx(axis_values, abs=slack, rel=2e-3)


def test_compressors_are_drawn_at_their_values(html, tmp_path):
    told = json.loads((run.write(tmp_path / 'again') / 'baselines.json').read_text())
    for axis in ('tokens', 'training FLOPs, logarithmic'):
        figure = figures(html)['Validation', axis]
        for style, label, name in (('xz', 'xz -9', 'xz'), ('zlib', 'zlib -9', 'zlib_per_document')):
            (_, value), _ = read_off(figure, f'rule {style}', log='FLOPs' in axis)
            assert value == pytest.approx(told[name], abs=5e-3)
            assert f'>{label} {told[name]:.3f}</text>' in figure


def test_waiting_is_a_share_of_the_time_between_records(tmp_path):
    lines = run.metrics(steps=40)
    train = [line for line in lines if line['kind'] == 'train']
    for i, line in enumerate(train):
        line['seconds'], line['seconds_waiting'] = 10.0 * (i + 1), [1.0, 2.0, 0.0, 4.0][i]
    figure = figures(report(tmp_path / 'run', lines=lines))[
        'Waiting for data', 'training time, seconds'
    ]
    seen = [value for _, value in read_off(figure, 'trend')]
    assert seen == pytest.approx([10.0, 20.0, 0.0, 40.0], abs=0.1)


def test_nothing_is_loaded_and_nothing_runs(html):
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in {'script', 'img', 'iframe', 'object', 'embed', 'base', 'form', 'video'}
        assert not [name for name in attributes if name.startswith('on')]
        for name in ('src', 'srcset', 'action', 'data', 'xlink:href', 'href', 'background'):
            assert re.fullmatch('data:,|#m[0-9a-f]+', attributes.get(name, 'data:,'))
        for value in attributes.values():  # a part of the same drawing
            assert re.sub(r'^url\(#p[0-9a-f]+\)$', '', value or '').count('url(') == 0
    style = re.search(r'<style>(.*?)</style>', html, re.S)[1]
    assert 'url(' not in style and '@import' not in style and 'http' not in style
    assert "default-src 'none'" in html
    # The one address in the file is in the text of a sample.
    assert html.count('://') == html.count('&quot;https://example.org/x.png&quot;') == 4


def test_samples_are_shown_as_text(html):
    assert '&lt;b&gt;滾滾</b>&lt;/pre&gt;&lt;script&gt;alert(&quot;1 &amp; 2&quot;)' in html
    shown = [t for t in Page(html).texts if 'esrever' in t]
    assert len(shown) == 4
    assert '青山依舊在\n\U0001f999 \U0001f469\u200d\U0001f52c ends⟨U+2028⟩here⟨U+0085⟩' in shown[0]
    assert '⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩ ⟨U+202E⟩esrever' in shown[0]
    for sample in run.samples(600)[:2]:
        assert escape(sample[1]) in html
    # The newest is first, and the only one open.
    steps = re.findall(r'<details( open)?><summary>Step (\d+)', html)
    assert steps == [(' open', '800'), ('', '600'), ('', '400'), ('', '200')]


def test_hostile_text_is_escaped_everywhere(tmp_path):
    evil = '"><script>x</script>\ud800\x00'
    experiment = {'data': {'sources': [{'name': evil}]}, evil: {evil: evil}, 'seed': evil}
    facts = run.facts(
        **{'name': evil, 'device': evil, 'git_commit': evil, 'started': evil, 'digest': evil},
        **{'versions': {evil: evil}, 'command': [evil], 'peak_convention': evil},
        experiment=experiment,
    )
    lines = [
        *({**line, 'prompt': evil.replace('\ud800', '')} for line in run.metrics(steps=200)),
        {'kind': 'event', 'step': 7, 'text': '<script>x</script>'},
    ]
    html = report(tmp_path / 'run', facts=facts, lines=lines)
    assert '<script' not in html and html.count('&lt;script&gt;') > 12
    assert '⟨U+D800⟩' in html
    Page(html)


def test_configuration_and_provenance(html):
    page = Page(html)
    for name, value in (
        ('train.batch', '8'),
        ('data.sources.0.name', '"python_corpus/stdlib_code"'),
        ('optimizer.schedule.peak', '0.01'),
        ('evaluation.prompts', '["def ", "class ", "import os\\n"]'),
        ('seed', '0'),
        ('objective.class', '"CausalLM"'),
        ('git commit', run.facts()['git_commit']),
        ('jax', '0.10.2'),
        ('command', "experiments/pretrain.py quickstart --workdir 'runs/quick start'"),
    ):
        at = page.texts.index(name)
        assert page.texts[at + 1] == value


def test_a_run_without_a_step_says_what_is_missing(tmp_path):
    path = run.write(tmp_path / 'young', lines=[], baselines=False)
    (path / 'metrics.jsonl').unlink()
    text = Page(write_report(path).read_text('utf-8')).text
    for sentence in (
        'no step taken yet',
        'No training step recorded yet.',
        'No validation with bits per byte recorded yet.',
        'No samples recorded yet.',
        'No events recorded.',
        'baselines.json gives no xz and zlib to compare with.',
    ):
        assert sentence in text


def test_a_run_without_validation_says_that_none_was_asked_for(tmp_path):
    lines = [line for line in run.metrics() if line['kind'] == 'train']
    path = run.write(tmp_path / 'run', lines=lines, baselines=False)
    facts = json.loads((path / 'run.json').read_text())
    facts['experiment'] = {'evaluation': {'every': 0}}
    (path / 'run.json').write_text(json.dumps(facts))
    text = Page(write_report(path).read_text('utf-8')).text
    assert 'No validation was asked for: --evaluation.every is 0.' in text
    assert 'to compare with' not in text


def test_compressors_that_saw_a_sample_say_so(tmp_path):
    path = run.write(tmp_path / 'run')
    told = json.loads((path / 'baselines.json').read_text())
    (path / 'baselines.json').write_text(json.dumps({**told, 'of_documents': 123_456}))
    text = Page(write_report(path).read_text('utf-8')).text
    assert 'xz -9 of a sample of the validation text' in text
    assert f'{told["documents"]} of 123,456 documents' in text


def test_run_json_alone_may_be_nearly_empty(tmp_path):
    (tmp_path / 'run.json').write_text('{}')
    html = write_report(tmp_path).read_text('utf-8')
    assert f'<h1>{tmp_path.name}</h1>' in html
    assert 'run.json holds no configuration.' in Page(html).text


def test_one_line_of_metrics(tmp_path):
    html = report(tmp_path / 'run', lines=run.metrics(steps=10))
    assert '10 of 800 steps: not finished' in html
    # A point that no line joins to another is a dot.
    assert '<use ' in curve(figures(html)['Loss', 'tokens'], 'trend')
    Page(html)


@pytest.mark.parametrize('cut', [1, 20, 60])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, cut):
    line = json.dumps(
        {'kind': 'sample', 'step': 810, 'prompt': 'x', 'text': '滾' * 9}, ensure_ascii=False
    )
    path = run.write(tmp_path / 'run')
    with open(path / 'metrics.jsonl', 'ab') as file:
        file.write(line.encode()[:-cut])
    text = Page(write_report(path).read_text('utf-8')).text
    assert '1 unreadable line was left out of metrics.jsonl.' in text
    assert 'Step 810' not in text and 'Step 800' in text


def test_lines_of_other_kinds_of_values_are_left_out(tmp_path):
    tail = '[]\n3\n{}\n{"kind": "train"}\n{"kind": ["train"], "step": 3}\n' + '[' * 100_000
    html = report(tmp_path / 'run', tail=tail)
    assert '6 unreadable lines were left out of metrics.jsonl.' in html


@pytest.mark.parametrize('bad', [None, math.nan, math.inf])
def test_losses_that_are_not_finite(tmp_path, bad):
    lines = run.metrics(steps=200)
    for line in lines:
        if line['kind'] == 'train' and (line['step'] in (50, 60) or line['step'] > 180):
            line.update(loss=bad, nll=bad, grad_norm=bad, skipped=3.0)
        if line['kind'] == 'validation':
            line.update(loss=bad, nll=bad, bits_per_byte=bad)
    html = report(tmp_path / 'run', lines=lines)
    text = Page(html).text.split('Samples')[0]
    assert 'nan' not in text.lower() and 'inf' not in text.lower().split()
    assert 'Last training loss not finite' in text
    assert 'Updates skipped 3 ' in text
    assert 'At step 200 it was not finite.' in text
    # Two pieces, with a gap where the loss was not finite.
    path = curve(figures(html)['Loss', 'tokens'], 'trend')
    assert path.count('M ') == 2 and len(re.findall('[ML] ', path)) == 16


def test_all_losses_not_finite(tmp_path):
    lines = [{**line, 'loss': None} for line in run.metrics(steps=30)]
    figure = figures(report(tmp_path / 'run', lines=lines))['Loss', None]
    assert 'No finite value recorded.' in figure


def test_a_spike_does_not_flatten_the_curve(tmp_path):
    lines = run.metrics()
    lines[40]['loss'] = 1e6
    figure = figures(report(tmp_path / 'run', lines=lines))['Loss', 'tokens']
    assert 'not shown' in figure
    seen = read_off(figure, 'raw')
    assert seen[0][1] == pytest.approx(lines[0]['loss'], abs=0.02)


def test_steps_taken_again_after_a_kill_count_once(tmp_path):
    lines = run.metrics(steps=400)
    again = {**lines[5], 'loss': 5.25}
    html = report(tmp_path / 'run', lines=[*lines, again])
    seen = read_off(figures(html)['Loss', 'tokens'], 'raw')
    assert len(seen) == 40 and seen[5][1] == pytest.approx(5.25, abs=0.02)


def test_the_final_validation_leads_and_the_best_is_said(tmp_path):
    lines = run.metrics()
    final = [line for line in lines if line['kind'] == 'validation'][-1]
    final['bits_per_byte'] = 1.5
    text = Page(report(tmp_path / 'run', lines=lines)).text
    assert 'Validation, bits per byte 1.500 at step 800' in text
    assert re.search(r'The best was 1\.\d+ at step 600\.', text)


def test_compressors_that_saw_other_text_are_said(tmp_path):
    lines = run.metrics()
    for line in lines:
        if line['kind'] == 'validation':
            line['bytes'] = 1000
    assert 'The model was measured on 1.00k bytes.' in report(tmp_path / 'run', lines=lines)


def test_a_long_run_is_a_small_page(tmp_path):
    lines = run.metrics(steps=200_000, validate_every=2000)
    path = run.write(tmp_path / 'run', lines=lines)
    assert len(lines) > 20_000
    assert write_report(path).stat().st_size < 1_500_000


def test_damaged_baselines_are_said(tmp_path):
    path = run.write(tmp_path / 'run')
    (path / 'baselines.json').write_text('{"xz": 1.')
    assert 'baselines.json is no JSON object' in Page(write_report(path).read_text('utf-8')).text


def test_report_is_the_same_again_and_leaves_nothing_else(tmp_path):
    path = run.write(tmp_path / 'run')
    before = {p.name for p in path.iterdir()}
    first = write_report(path)
    assert first == path / 'report.html'
    content = first.read_bytes()
    assert write_report(path).read_bytes() == content
    assert {p.name for p in path.iterdir()} - before == {'report.html'}


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r'holds no run \(no run.json\): name the --workdir'):
        write_report(tmp_path)
    with pytest.raises(UserError, match='is no directory: name the --workdir'):
        write_report(tmp_path / 'nowhere')
    (tmp_path / 'run.json').write_text('{"name": ')
    with pytest.raises(UserError, match='run.json is no JSON object: restore it'):
        write_report(tmp_path)
    assert not (tmp_path / 'report.html').exists()


def test_command(tmp_path, monkeypatch, capsys):
    path = run.write(tmp_path / 'run')
    monkeypatch.setattr(sys, 'argv', ['report', str(path)])
    cli.main(experiments.report.main)
    assert capsys.readouterr().out.strip() == str(path / 'report.html')
    monkeypatch.setattr(sys, 'argv', ['report', str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main(experiments.report.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith('error: ') and said.count('\n') == 1
