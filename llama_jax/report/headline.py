"""The top of the page: what was trained, how well it compresses, what it cost."""

from __future__ import annotations

import statistics

from llama_jax.report.curves import BASELINES
from llama_jax.report.read import Line, RunRecords, inside, last, number
from llama_jax.report.text import compact, escape, power_of_ten, significant
from llama_jax.units import duration

_MODEL = 'this model'


def headline(run: RunRecords) -> str:
    """Name, what it is, bits per byte beside the compressors, and the figures."""
    convention = run.facts.get('peak_convention') or 'The convention of MFU is not recorded.'
    return (
        f'<h1>{escape(run.name)}</h1><p class="lead">{_description(run)}</p>'
        f'<div class="top">{_validation(run)}{_figures(run)}</div>'
        f'<p class="note">{escape(convention)}</p>'
    )


def _description(run: RunRecords) -> str:
    experiment = run.facts.get('experiment')
    experiment = experiment if isinstance(experiment, dict) else {}
    parts = [str(inside(experiment, 'objective', 'class') or '')]
    sources = inside(experiment, 'data', 'sources')
    if isinstance(sources, list):
        names = [str(inside(source, 'name')) for source in sources if inside(source, 'name')]
        parts.append('on ' + ', '.join(names) if names else '')
    steps, planned = last(run.train, 'step'), number(experiment, 'train', 'steps')
    if steps is None:
        progress = 'no step taken yet'
    elif planned and steps < planned:
        progress = f'{steps:,} of {planned:,} steps: not finished'
    else:
        progress = f'{steps:,} steps'
    device = run.facts.get('device')
    devices = number(run.facts, 'devices')
    where = f'{device} × {devices}' if device and devices else str(device or '')
    started = str(run.facts.get('started') or '')[:16].replace('T', ' ')
    what = ' '.join(filter(None, parts))
    return escape(' · '.join(filter(None, (what, progress, where, started))))


def _validation(run: RunRecords) -> str:
    """Bits per byte, where they were measured or will be; else the loss of the objective."""
    if not run.validation or any('bits_per_byte' in line for line in run.validation):
        return _compression(run)
    step, loss = run.validation[-1]['step'], number(run.validation[-1], 'loss')
    known = [line for line in run.validation if number(line, 'loss') is not None]
    best = min(known, key=lambda line: line['loss'], default=None)
    notes = ['It was not finite.'] if loss is None else []
    if best and best['step'] != step:
        notes.append(f'The best was {best["loss"]:.3f} at step {best["step"]:,}.')
    big = f'{"—" if loss is None else f"{loss:.3f}"} <small>at step {step:,}</small>'
    return (
        f'<section class="card"><h3>Validation, loss</h3><p class="big">{big}</p>'
        f'<p class="note">{escape(" ".join(notes))}</p></section>'
    )


def _compression(run: RunRecords) -> str:
    values = [line for line in run.validation if number(line, 'bits_per_byte') is not None]
    if values:
        final = values[-1]
        best = min(values, key=lambda line: number(line, 'bits_per_byte') or 0)
        big = f'{number(final, "bits_per_byte"):.3f} <small>at step {final["step"]:,}</small>'
        notes = []
        if best['bits_per_byte'] < final['bits_per_byte']:
            notes.append(f'The best was {best["bits_per_byte"]:.3f} at step {best["step"]:,}.')
    else:
        final, big, notes = {}, '— <small>not measured yet</small>', []
    newest = run.validation[-1] if run.validation else {}
    if 'bits_per_byte' in newest and newest is not final:
        notes.append(f'At step {newest["step"]:,} it was not finite.')
    rows = [(_MODEL, number(final, 'bits_per_byte'), 'held-out')]
    rows += [(label, number(run.baselines, field), field) for field, label in BASELINES]
    known = [(label, value, style) for label, value, style in rows if value is not None]
    bars = _bars(known) if len(known) > 1 else ''
    if not values and inside(run.facts, 'experiment', 'evaluation', 'every') == 0:
        notes.append('No validation was asked for: --evaluation.every is 0.')
    elif number(run.baselines, 'xz') is None and inside(run.facts, 'experiment', 'start'):
        pass  # answers, which no compressor is compared with
    elif number(run.baselines, 'xz') is None:
        notes.append('baselines.json gives no xz and zlib to compare with.')
    else:
        notes.append(_covered(run.baselines, final))
    if inside(newest, 'likelihood') == 'bound':
        error = number(final, 'bits_per_byte_se')
        draws = '' if error is None else f' (standard error {error:.3f})'
        notes.append(
            f'The model gives no exact likelihood: it is bounded under random masks{draws}.'
        )
    return (
        f'<section class="card"><h3>Validation, {run.likelihood_unit}</h3>'
        f'<p class="big">{big}</p>{bars}'
        f'<p class="note">{escape(" ".join(notes))}</p></section>'
    )


def _bars(rows: list[tuple[str, float, str]]) -> str:
    most = max(value for _, value, _ in rows)
    cells = [
        f'<b>{escape(label)}</b><i class="{style.split("_")[0]}" '
        f'style="width:{100 * value / most:.1f}%"></i><span>{value:.3f}</span>'
        for label, value, style in rows
    ]
    return f'<div class="bars">{"".join(cells)}</div>'


def _covered(baselines: Line, final: Line) -> str:
    """Which text the compressors saw, and whether the model was measured on as much."""
    n_bytes, documents = number(baselines, 'bytes'), number(baselines, 'documents')
    if n_bytes is None or documents is None:
        return ''
    split = baselines.get('split')
    total = number(baselines, 'of_documents') or documents
    part = 'the whole' if documents == total else 'a sample of the'
    of = '' if documents == total else f' of {total:,}'
    text = (
        f'xz -9 of {part} {split or "held-out"} text, zlib -9 of each document: '
        f'{documents:,}{of} documents, {compact(n_bytes)} bytes.'
    )
    measured = number(final, 'bytes')
    if measured is not None and abs(measured - n_bytes) > 0.02 * n_bytes:
        text += f' The model was measured on {compact(measured)} bytes.'
    return text


def _figures(run: RunRecords) -> str:
    tokens, flops, seconds = (last(run.train, name) for name in ('tokens', 'flops', 'seconds'))
    parameters = number(run.facts, 'parameters')
    speed, mfu = _median(run.train, 'tokens_per_second'), _median(run.train, 'mfu')
    waiting = sum(number(line, 'seconds_waiting') or 0.0 for line in run.train)
    skipped = last(run.train, 'skipped')
    peak = number(run.facts, 'peak_flops')
    share = f'{waiting / seconds:.1%} waiting for data' if seconds else ''
    figures = [
        ('Parameters', _short(parameters), f'{parameters:,}' if parameters else ''),
        ('Tokens', _short(tokens), f'{tokens:,} positions' if tokens else ''),
        ('Training FLOPs', '—' if flops is None else power_of_ten(flops), ''),
        ('Training time', '—' if seconds is None else escape(duration(seconds)), share),
        (
            'Tokens per second',
            '—' if speed is None else f'{round(speed):,}',
            'median of the records',
        ),
        (
            'MFU',
            '—' if mfu is None else f'{mfu:.1%}',
            _of_peak(mfu, peak),
        ),
        (
            'Last training loss',
            _last_loss(run.train),
            'nats per token',
        ),
        (
            'Updates skipped',
            '—' if skipped is None else f'{skipped:,.0f}',
            'loss or gradient not finite',
        ),
    ]
    cells = ''.join(
        f'<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
        for name, value, note in figures
    )
    return f'<section class="card"><dl class="facts">{cells}</dl></section>'


def _last_loss(train: list[Line]) -> str:
    if not train:
        return '—'
    loss = number(train[-1], 'loss')
    return 'not finite' if loss is None else f'{loss:.3f}'


def _of_peak(mfu: float | None, peak: float | None) -> str:
    if not peak:
        return 'peak not known'
    busy = '; the machine was busy when that was measured' if mfu and mfu > 1 else ''
    return f'median; peak {_flops(peak)} a device{busy}'


def _flops(rate: float) -> str:
    size, unit = (1e12, 'TFLOP/s') if rate >= 1e12 else (1e9, 'GFLOP/s')
    return f'{significant(rate / size)} {unit}'


def _median(lines: list[Line], name: str) -> float | None:
    values = [value for value in (number(line, name) for line in lines) if value is not None]
    return statistics.median(values) if values else None


def _short(value: float | None) -> str:
    return '—' if value is None else compact(value)
