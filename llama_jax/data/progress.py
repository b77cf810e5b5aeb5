"""How far the work on many bytes is: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

_FIRST_SECONDS = 5.0
_EVERY_SECONDS = 30.0


class Progress:
    """Shows MB done, MB/s and the time left, where the work takes more than a moment.

    Ends with a line end, so that what is printed next stands on a line of its own.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._before = label, total, done, done
        self._begun = time.monotonic()
        self._next = self._begun + _FIRST_SECONDS
        self._bar: tqdm | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._label,
                total=self._total,
                initial=self._done,
                unit='B',
                unit_scale=True,
                delay=0.5,
                file=sys.stderr,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """`count` bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) >= self._next:
            self._next = now + _EVERY_SECONDS
            rate = (self._done - self._before) / max(now - self._begun, 1e-9)
            left = max(self._total - self._done, 0) / rate if rate else float('inf')
            log.info(
                '%s: %s of %s MB, %.0f MB/s, %.0f s left',
                self._label,
                f'{self._done / 1e6:,.0f}',
                f'{self._total / 1e6:,.0f}',
                rate / 1e6,
                left,
            )
