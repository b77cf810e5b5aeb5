"""Time on the wall."""

from __future__ import annotations

import time
from collections.abc import Callable


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run` takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
