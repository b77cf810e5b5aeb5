"""Text for the page: escaped, and numbers as people write them."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence

# They reorder the text after them, so that a page can be made to read as what it is not.
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
_PREFIXES = ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k'))


def escape(value: object) -> str:
    """Any text, safe in HTML content and quoted attributes; what cannot be seen is made visible."""
    return html.escape(visible(value))


def visible(value: object) -> str:
    """Any text; what cannot be seen is written out."""
    text = str(value)
    return text if text.isprintable() else ''.join(map(_visible, text))


def _visible(char: str) -> str:
    code = ord(char)
    if char in '\n\t':
        return char
    # Controls, lone surrogates (which UTF-8 cannot hold), code points that are no characters.
    if unicodedata.category(char) in ('Cc', 'Cs', 'Cn', 'Zl', 'Zp') or code in _BIDI:
        return f'\u27e8U+{code:04X}\u27e9'
    return char


def significant(value: float, digits: int = 3) -> str:
    """3 significant digits without an exponent where that reads well: 0.00313, 2.51, 41,300."""
    if value == 0:
        return '0'
    scientific = f'{value:.{digits - 1}e}'  # rounds, so that 9.996 has the power of 10.0
    power = int(scientific.split('e')[1])
    if power < -4 or power >= 12:
        return scientific.replace('e+', 'e').replace('e-0', 'e-')
    return f'{float(scientific):,.{max(digits - 1 - power, 0)}f}'


def compact(value: float) -> str:
    """A count in short: 813, 4.21M, 1.4T."""
    for size, letter in _PREFIXES:
        if abs(value) >= size * 0.9995:
            return significant(value / size) + letter
    return f'{value:,.0f}'


def tick_labels(values: Sequence[float]) -> list[str]:
    """Numbers at equal distances, all with the same unit and decimals: 0, 0.5M, 1.0M."""
    most = max(map(abs, values), default=0.0)
    if most < 1e-4:
        return [f'{x:g}'.replace('e-0', 'e-') for x in values]
    size, letter = next(((s, c) for s, c in _PREFIXES if most >= s), (1.0, ''))
    scaled = [value / size for value in values]
    decimals = next(
        (n for n in range(12) if all(abs(round(x, n) - x) < 1e-6 * 10**-n for x in scaled)), 12
    )
    return [f'{x:.{decimals}f}{letter}' if x else '0' for x in scaled]


def power_of_ten(value: float) -> str:
    """HTML of a large or small number: 2.51 × 10<sup>15</sup>."""
    if value <= 0:
        return significant(value)
    mantissa, power = f'{value:.2e}'.split('e')
    mantissa = mantissa.rstrip('0').rstrip('.')
    times = '' if mantissa == '1' else f'{mantissa}\u202f×\u202f'
    return f'{times}10<sup>{int(power)}</sup>'.replace('-', '−')
