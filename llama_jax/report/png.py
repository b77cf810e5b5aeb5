"""The pictures of a comparison as PNG files, drawn by matplotlib where it is installed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax import installed
from llama_jax.report.chart import Curve, frame_of, on_axis
from llama_jax.report.pictures import Picture
from llama_jax.report.style import ARM_COLOURS
from llama_jax.report.text import power_of_ten, tick_labels

MISSING = f'No PNGs: matplotlib is not installed; {installed.extra("compare")} brings it.'

_INK, _SOFT, _GRID = '#1c1e21', '#5f6670', '#e3e4e6'
# One that has the letters of an arm's name is used for them; those not installed are passed over.
_FONTS = ('DejaVu Sans', 'Noto Sans CJK SC', 'Noto Sans CJK JP', 'WenQuanYi Zen Hei', 'SimHei')
_RAISED = str.maketrans('0123456789−', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻')


def write_pngs(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """One file for each picture in `folder`; the same bytes for the same pictures.

    Raises ImportError where matplotlib is not installed.
    """
    import matplotlib
    from matplotlib import font_manager

    folder.mkdir(exist_ok=True)
    known = {font.name for font in font_manager.fontManager.ttflist}
    settings: Any = {
        'font.family': [name for name in _FONTS if name in known],
        'font.size': 9,
        'axes.unicode_minus': False,
        'text.parse_math': False,
        'text.color': _INK,
        'axes.edgecolor': _SOFT,
        'xtick.color': _SOFT,
        'ytick.color': _SOFT,
    }
    paths = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in letters of no installed font is drawn as boxes; the page has it in full.
        warnings.filterwarnings('ignore', message='Glyph')
        for picture in pictures:
            paths.append(folder / f'{picture.name}.png')
            _draw(picture).savefig(paths[-1], dpi=160)
    return paths


def _draw(picture: Picture) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(picture.title, loc='left', fontsize=10, fontweight='bold')
    axes.set_xlabel(_plain(picture.axis.label), color=_SOFT)
    axes.set_ylabel(_plain(picture.unit), color=_SOFT)
    axes.grid(True, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    curves = on_axis(picture.axis, picture.curves)
    curves = [c for c in curves if any(y is not None for _, y in c.points)]
    for curve in curves:
        xs, ys = zip(*curve.points, strict=True)
        axes.plot(xs, [float('nan') if y is None else y for y in ys], **look(curve))
    # The frame and the ticks are those of the page.
    frame = frame_of(picture.axis, curves, picture.include)
    axes.set_xscale('log' if frame.log else 'linear')
    axes.minorticks_off()
    labels = map(_power, frame.x_ticks) if frame.log else tick_labels(frame.x_ticks)
    axes.set_xticks(frame.x_ticks, list(labels))
    axes.set_yticks(frame.y_ticks, tick_labels(frame.y_ticks))
    axes.set_xlim(frame.left, frame.right)
    axes.set_ylim(frame.low, frame.high)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower left', ncols=3, frameon=False, fontsize=8)
    return figure


def look(curve: Curve) -> dict[str, Any]:
    """matplotlib's way to say what the classes of the style sheet say."""
    classes = curve.style.split()
    colour = next((c for c in classes if c.startswith('arm-')), None)
    seed, spread = 'seed' in classes, 'spread' in classes
    dashed = '--' if {'again', 'front'} & set(classes) else '-'
    # matplotlib hides a name that begins with an underscore from the legend.
    label = curve.label if curve.label[:1] != '_' else f'\u200b{curve.label}'
    return {
        'color': ARM_COLOURS[int(colour[4:])][0] if colour else _SOFT,
        'label': _plain(label) if label else '_',
        'linestyle': (':' if 'absent' in classes else dashed) if curve.line else '',
        'linewidth': 0.9 if seed or spread or 'front' in classes else 1.8,
        'alpha': 0.55 if seed or spread else 1.0,
        'marker': 'o' if curve.dots or not curve.line else '',
        'markersize': 3 if seed else 7 if 'cloud' in classes else 4,
    }


def _power(value: float) -> str:
    """As on the page: 2 × 10¹³."""
    return re.sub('<sup>(.*)</sup>', lambda x: x[1].translate(_RAISED), power_of_ten(value))


def _plain(text: str) -> str:
    """Text without what a font cannot draw: controls are no glyphs."""
    return ''.join(c if c.isprintable() or c == '\u200b' else '\ufffd' for c in text)
