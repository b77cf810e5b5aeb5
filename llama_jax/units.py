"""Times and sizes as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds: 2 d 7 h, 1 h 04 min, 4 min 07 s, 8.1 s."""
    if seconds < 60:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes} min {rest:02} s'
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f'{hours} h {minutes:02} min'
    return f'{hours // 24} d {hours % 24} h'


def size(n: float) -> str:
    """Bytes, in decimal units of three digits: 813 B, 1.34 kB, 93.1 MB, 2.47 GB."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if float(f'{n:.3g}') < 1000:
            return f'{n:.3g} {unit}'
        n /= 1000
    return f'{n:.3g} TB'
