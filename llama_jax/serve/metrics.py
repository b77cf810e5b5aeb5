"""What Prometheus reads: counts and times of the server, and the numbers of its engine."""

from __future__ import annotations

import bisect
import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
_PREFIX = 'llama_jax_'
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of seconds in buckets; safe between threads."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float, times: int = 1) -> None:
        place = bisect.bisect_left(self._bounds, seconds)
        with self._lock:
            self._counts[place] += times
            self._sum += seconds * times

    def lines(self, name: str) -> Iterator[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
            below += count
            label = '+Inf' if bound == math.inf else f'{bound:g}'
            yield f'{name}_bucket{{le="{label}"}} {below}'
        yield f'{name}_sum {total:.6f}'
        yield f'{name}_count {below}'


class Metrics:
    """What the server itself counts."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self._first = Histogram(_FIRST)
        self._between = Histogram(_BETWEEN)
        self._whole = Histogram(_WHOLE)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def between_tokens(self, seconds: float, tokens: int) -> None:
        """`tokens` arrived together, `seconds` after those before."""
        self._between.observe(seconds / tokens, tokens)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """On the event loop. `path` is one of the routes, so that there are few."""
        self._answers[method, path, status] += 1
        if path.startswith('/v1/') and method == 'POST':
            self._whole.observe(seconds)

    def text(self, stats: Any) -> str:
        """The page; `stats` is the dataclass of the engine."""
        lines = list(_of_engine(stats))
        lines += _head('http_requests_total', 'counter', 'Answers by route and status.')
        for (method, path, status), count in sorted(self._answers.items()):
            labels = _labels({'method': method, 'path': path, 'status': status})
            lines.append(f'{_PREFIX}http_requests_total{labels} {count}')
        for name, histogram, told in (
            ('time_to_first_token_seconds', self._first, 'From the queue to the first token.'),
            ('time_between_tokens_seconds', self._between, 'Between tokens of a choice.'),
            ('request_seconds', self._whole, 'From the request to the end of the answer.'),
        ):
            lines += [*_head(name, 'histogram', told), *histogram.lines(_PREFIX + name)]
        resident = resident_bytes()
        if resident is not None:
            name = 'process_resident_memory_bytes'  # the name that every exporter gives it
            lines += [f'# TYPE {name} gauge', f'{name} {resident}']
        return '\n'.join(lines) + '\n'


def resident_bytes() -> int | None:
    """Memory of this process; None where the system does not tell."""
    try:
        for line in Path('/proc/self/status').read_text(encoding='ascii').splitlines():
            if line.startswith('VmRSS:'):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _of_engine(stats: Any) -> Iterator[str]:
    """Every number under its own name: `_total` are counters; a dict's keys are labels."""
    for field in dataclasses.fields(stats):
        name, value = field.name, getattr(stats, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
            continue
        yield from _head(name, 'counter' if name.endswith('_total') else 'gauge', 'Of the engine.')
        if isinstance(value, Mapping):
            for key, number in sorted(value.items()):
                yield f'{_PREFIX}{name}{_labels({"reason": key})} {number}'
        else:
            yield f'{_PREFIX}{name} {value}'


def _head(name: str, kind: str, told: str) -> list[str]:
    return [f'# HELP {_PREFIX}{name} {told}', f'# TYPE {_PREFIX}{name} {kind}']


def _labels(labels: Mapping[str, object]) -> str:
    def escaped(value: object) -> str:
        return str(value).replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')

    return '{' + ','.join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + '}'
