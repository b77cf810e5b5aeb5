"""What a run was trained and validated on, where that is several sources or sets."""

from __future__ import annotations

from llama_jax.report.curves import series
from llama_jax.report.draw import html
from llama_jax.report.picture import Axis, Curve, Picture
from llama_jax.report.read import RunRecords, last, number
from llama_jax.report.style import arm_style
from llama_jax.report.tables import NOT_APPLICABLE, NOT_YET, Cell, Row, Table


def by_set(run: RunRecords, axis: Axis) -> str:
    """Validation against tokens, a curve for each set; '' where there are no several."""
    for figure, unit in (('bits_per_byte', run.likelihood_unit), ('loss', 'nats per token')):
        names = labels(run, 'validation', figure)
        if names:
            curves = [
                Curve(name, points, arm_style(i), dots=len(points) <= 60)
                for i, name in enumerate(names)
                if (points := series(run.validation, 'tokens', f'{figure}/{name}'))
            ]
            return html(Picture('by-set', 'Validation by set', unit, axis, curves, whole=False))
    return ''


def tables(run: RunRecords) -> str:
    """Tables in HTML of what was read in training, and of each set at the newest validation."""
    found = [_trained(run), _validated(run)]
    return ''.join(f'<div class="card">{table.html()}</div>' for table in found if table)


def labels(run: RunRecords, kind: str, figure: str) -> list[str]:
    """The names under which the lines of a kind ('train' or 'validation') have a figure."""
    lines = run.train if kind == 'train' else run.validation
    head = f'{figure}/'
    found = dict.fromkeys(name for line in lines for name in line if name.startswith(head))
    return [name.removeprefix(head) for name in found]


def _trained(run: RunRecords) -> Table | None:
    names = labels(run, 'train', 'epochs')
    if last(run.train, 'epochs') is None and not names:
        return None
    rows = []
    for name in names or ['']:
        end = f'/{name}' if name else ''
        epochs, documents, share = (
            last(run.train, f'{figure}{end}') for figure in ('epochs', 'documents', 'share')
        )
        cells = [
            NOT_YET if epochs is None else f'{epochs:.2f}',
            NOT_YET if documents is None else f'{documents:,.0f}',
        ]
        if names:
            cells.append(NOT_YET if share is None else f'{share:.1%}')
        rows.append(Row(name or 'all', list(map(Cell, cells))))
    shares = ['share of tokens'] * bool(names)
    return Table(['trained on', 'epochs', 'documents read', *shares], rows)


def _validated(run: RunRecords) -> Table | None:
    names = labels(run, 'validation', 'loss')
    if not names:
        return None
    newest = run.validation[-1]
    has_bits = 'bits_per_byte' in newest
    rows = []
    for name in names:
        loss, bits, n_bytes = (
            number(newest, f'{figure}/{name}') for figure in ('loss', 'bits_per_byte', 'bytes')
        )
        cells = [
            NOT_YET if loss is None else f'{loss:.3f}',
            (NOT_YET if has_bits else NOT_APPLICABLE) if bits is None else f'{bits:.3f}',
            NOT_APPLICABLE if n_bytes is None else f'{n_bytes:,.0f}',
        ]
        rows.append(Row(name, list(map(Cell, cells))))
    at = f'validated on, step {newest["step"]:,}'
    return Table([at, 'loss', run.likelihood_unit, 'bytes'], rows)
