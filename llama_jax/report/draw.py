"""Pictures, drawn by matplotlib: as SVG within a page, in the colours of its theme, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.report.picture import Curve, Picture, Point
from llama_jax.report.style import COLOURS, arm_colour
from llama_jax.report.text import escape, power_of_ten, tick_labels

_WIDTH, _HEIGHT = 5.3, 2.75
"""Inches, of a picture on the page: text of 10 points is as large as on a telephone."""
_ROW = 0.24
"""Of a named row, or of a line of its name."""
_LETTER, _COLUMNS = 0.085, 29
"""Width of a letter of such a name, and the most in a line: half of the picture."""
_SIDE, _FOOT, _EDGE = 0.6, 0.3, 0.1
# One that has the letters of an arm's name is used for them; those not installed are passed over.
_FONTS = ('DejaVu Sans', 'Noto Sans CJK SC', 'Noto Sans CJK JP', 'WenQuanYi Zen Hei', 'SimHei')
_RAISED = str.maketrans('0123456789−', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻')


def html(picture: Picture) -> str:
    """A figure of the page: title, legend and labels are HTML, which wraps, the rest is SVG."""
    head = f'<b>{escape(picture.title)}</b> <span>{escape(picture.unit)}</span>'
    head = f'<figcaption>{head}</figcaption>'
    if picture.empty:
        any_point = any(c.points for c in picture.curves)
        missing = 'No finite value recorded.' if any_point else picture.missing
        return f'<figure>{head}<p class="missing">{escape(missing)}</p></figure>'
    hidden = picture.frame_y[2]
    told = [picture.note] * bool(picture.note)
    told += [f'{hidden} points above the frame are not shown.'] * bool(hidden)
    notes = ''.join(f'<p class="note">{escape(text)}</p>' for text in told)
    keys = ''.join(
        f'<span class="key {c.style}">{escape(c.label)}</span>' for c in picture.shown if c.label
    )
    about = f'{picture.title}, {picture.unit}, against {picture.axis.label}'
    return (
        f'<figure>{head}<div class="keys">{keys}</div>{_svg(picture, about)}'
        f'<p class="axis">{escape(picture.axis.label)}</p>{notes}</figure>'
    )


def htmls(pictures: Iterable[Picture]) -> str:
    """One after the other."""
    return ''.join(map(html, pictures))


def write_pngs(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """One file for each picture in `folder`; the same bytes for the same pictures."""
    folder.mkdir(exist_ok=True)
    paths = []
    for picture in pictures:
        paths.append(folder / f'{picture.name}.png')
        _save(picture, paths[-1], 'png', dpi=160)
    return paths


def _svg(picture: Picture, about: str) -> str:
    written = io.StringIO()
    _save(picture, written, 'svg', metadata={'Date': None}, transparent=True)
    svg = written.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = svg[svg.index('</metadata>') + len('</metadata>') : svg.rindex('</svg>')]
    # What the page has itself: its fonts, its colours, and the meaning of a group.
    svg = re.sub(r'font-family: [^;]*; ?', '', svg)
    svg = re.sub(r'#([0-9a-f]{6})(?=[;"])', r'var(--c-\1)', svg)
    svg = re.sub(r'<style.*?</style>', '', svg, flags=re.S)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', _to_hundredths, svg)
    svg = re.sub(r'<g id="curve ([^"]*)">', r'<g class="\1">', svg)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|[xy]tick)_\d+"', '', svg)
    svg = svg.replace(' id="matplotlib.axis_1"', ' class="x"')
    svg = svg.replace(' id="matplotlib.axis_2"', ' class="y"')
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', '', svg).replace('xlink:href', 'href')
    svg = re.sub(r'\s*\n\s*', ' ', svg).replace('> <', '><').strip()
    return f'<svg {box[0]} role="img" aria-label="{escape(about)}">{svg}</svg>'


def _to_hundredths(attribute: re.Match[str]) -> str:
    """Places, in points."""
    return re.sub(r'(\.\d\d)\d+', r'\1', attribute[0])


def _save(picture: Picture, where: Any, kind: str, **options: Any) -> None:
    import matplotlib
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        'font.family': [name for name in _FONTS if name in known],
        'font.size': 10,
        'axes.unicode_minus': False,
        'text.parse_math': False,
        'text.color': COLOURS['ink'][0],
        'axes.edgecolor': COLOURS['soft'][0],
        'axes.labelcolor': COLOURS['soft'][0],
        'xtick.color': COLOURS['soft'][0],
        'ytick.color': COLOURS['soft'][0],
        'svg.fonttype': 'none',
        'path.simplify_threshold': 0.3,
        # Names of markers and frames differ from one picture of a page to the next.
        'svg.hashsalt': picture.name,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in letters of no installed font is drawn as boxes; the page has it in full.
        warnings.filterwarnings('ignore', message='Glyph')
        _figure(picture, whole=kind == 'png').savefig(where, format=kind, **options)


def _figure(picture: Picture, *, whole: bool) -> Any:
    """With title, legend and labels where it is to stand alone."""
    from matplotlib.figure import Figure

    names = [_wrapped(_plain(name)) for name in picture.rows]
    deepest = max((name.count('\n') + 1 for name in names), default=1)
    height = _ROW * deepest * len(names) + 0.5 if names else _HEIGHT
    curves = picture.shown
    named = [c for c in curves if c.label]
    widest = max((_columns(c.label) for c in named), default=0)
    across = max(1, min(3, int(_WIDTH / (0.08 * widest + 0.45))))
    lines = -(-len(named) // across)
    top, bottom = (0.35, 0.3 + 0.2 * lines) if whole else (0.0, 0.0)
    side = _SIDE + 0.25 * whole
    if picture.rows:
        side = _LETTER * max(_columns(line) for name in names for line in name.split('\n')) + 0.15
    total = height + top + bottom
    figure = Figure(figsize=(_WIDTH, total), facecolor='white')
    axes = figure.add_axes(
        (
            side / _WIDTH,
            (_FOOT + bottom) / total,
            (_WIDTH - side - 2 * _EDGE) / _WIDTH,
            (height - _FOOT - _EDGE) / total,
        )
    )
    axes.grid(True, axis='x' if picture.rows else 'both', color=COLOURS['line'][0], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    for curve in curves:
        xs, ys = zip(*curve.points, strict=True)
        axes.plot(xs, [float('nan') if y is None else y for y in ys], **look(curve))
    _marks(axes, picture)
    _scales(axes, picture)
    if names:
        axes.set_yticks(range(len(names)), names)
    if whole:
        axes.set_title(_plain(picture.title), loc='left', fontsize=11, fontweight='bold')
        axes.set_xlabel(_plain(picture.axis.label))
        axes.set_ylabel('' if picture.rows else _plain(picture.unit))
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles, labels, loc='lower left', ncols=across, frameon=False, fontsize=8
            )
    return figure


def _marks(axes: Any, picture: Picture) -> None:
    """Rules, the band around 0, and the vertical line."""
    highest = max((rule.value for rule in picture.rules), default=0.0)
    for rule in picture.rules:
        colour = COLOURS[rule.style][0]
        line = axes.axhline(rule.value, color=colour, linewidth=1.2, linestyle=(0, (5, 4)))
        line.set_gid(f'curve rule {rule.style}')
        axes.text(
            1,
            rule.value,
            f'{rule.label} {rule.value:.3f}',
            color=colour,
            fontsize=9,
            ha='right',
            va='bottom' if rule.value == highest else 'top',
            transform=axes.get_yaxis_transform(),
        )
    if picture.band:
        axes.axvspan(-picture.band, picture.band, color=COLOURS['line'][0], linewidth=0)
    if picture.line is not None:
        axes.axvline(picture.line, color=COLOURS['soft'][0], linewidth=1)


def _scales(axes: Any, picture: Picture) -> None:
    from matplotlib import ticker

    (left, right), (low, high, _) = picture.frame_x, picture.frame_y
    axes.set_xscale('log' if picture.axis.log else 'linear')
    if picture.axis.log:
        # Powers of ten, with some of their multiples where they are few.
        decades = right / left
        multiples = (1,) if decades > 300 else (1, 2, 5) if decades > 5 else (1, 1.5, 2, 3, 4, 5, 7)
        powers = ticker.LogLocator(subs=multiples, numticks=8).tick_values(left, right)
        places = [float(x) for x in powers if left <= x <= right]
        axes.set_xticks(places, [_power(x) for x in places])
    else:
        whole = all(float(x).is_integer() for c in picture.shown for x, _ in c.points)
        places = _places(left, right, whole)
        axes.set_xticks(places, tick_labels(places))
    axes.minorticks_off()
    if picture.rows:
        axes.tick_params(axis='y', length=0)
        axes.spines['left'].set_visible(False)
    else:
        places = _places(low, high, False)
        axes.set_yticks(places, tick_labels(places))
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def _places(low: float, high: float, whole: bool) -> list[float]:
    """Round numbers in the frame."""
    from matplotlib import ticker

    locator = ticker.MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10])
    first, last = sorted((low, high))
    slack = 1e-9 * (last - first)
    places = locator.tick_values(first, last)
    return [float(x) for x in places if first - slack <= x <= last + slack]


def look(curve: Curve) -> dict[str, Any]:
    """matplotlib's way to say what the classes of the style sheet say."""
    classes = curve.style.split()
    seed, spread = 'seed' in classes, 'spread' in classes
    dashed = (0, (6, 4)) if {'again', 'front'} & set(classes) else '-'
    # matplotlib hides a name that begins with an underscore from the legend.
    label = curve.label if curve.label[:1] != '_' else f'\u200b{curve.label}'
    return {
        'color': _colour(classes),
        'label': _plain(label) if label else '_',
        'linestyle': ((0, (1, 2)) if 'absent' in classes else dashed) if curve.line else '',
        'linewidth': 0.9 if seed or spread or {'front', 'raw'} & set(classes) else 1.6,
        'alpha': 0.55 if seed or spread else None,
        'marker': 'o',
        'markevery': None if curve.dots or not curve.line else _alone(curve.points),
        'markersize': 3 if seed else 7 if 'cloud' in classes else 4,
        'gid': f'curve {curve.style}',
    }


def _alone(points: Sequence[Point]) -> list[int]:
    """The points between others that are not finite, which no line would show."""
    ys = [None, *(y for _, y in points), None]
    return [
        i
        for i in range(len(points))
        if ys[i] is None and ys[i + 1] is not None and ys[i + 2] is None
    ]


def _colour(classes: Sequence[str]) -> str:
    for name in classes:
        if name.startswith('arm-'):
            return arm_colour(int(name[4:]))[0]
        if name in COLOURS:
            return COLOURS[name][0]
    return COLOURS['soft'][0]


def _power(value: float) -> str:
    """2 × 10¹³; as it is written otherwise where that is short: a rate of 0.003."""
    if 1e-5 <= value < 1e4:
        return f'{value:g}'
    return re.sub('<sup>(.*)</sup>', lambda x: x[1].translate(_RAISED), power_of_ten(value))


def _plain(text: str) -> str:
    """Text without what a font cannot draw: controls are no glyphs."""
    return ''.join(c if c.isprintable() or c == '\u200b' else '\ufffd' for c in text)


def _wrapped(name: str) -> str:
    """In lines of at most _COLUMNS; a word that is longer is cut."""
    lines = ['']
    for word in re.findall(r'\S+\s*', name):
        if lines[-1] and _columns(lines[-1] + word.rstrip()) > _COLUMNS:
            lines.append('')
        for letter in word:
            if _columns(lines[-1] + letter) > _COLUMNS and not letter.isspace():
                lines.append('')
            lines[-1] += letter
    return '\n'.join(line.rstrip() for line in lines) or name


def _columns(text: str) -> int:
    """How wide a text is, in letters of the Latin alphabet."""
    return sum(2 if ord(c) > 0x2E7F else 1 for c in text)
