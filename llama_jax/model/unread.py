"""Parameters that are still in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unread:
    """A parameter of the host that is read when it is asked for, and kept by nobody: a leaf of
    parameters with layers apart (model/layers.py)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """Of the file."""
    read: Callable[[], np.ndarray]
    """All of it, as its letters say; maybe a view in another order. Raises UserError when the file
    is damaged."""

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)
