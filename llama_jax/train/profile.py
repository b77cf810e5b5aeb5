"""A trace of some steps, as XProf shows it: what the devices and the host do, and when."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llama_jax.errors import UserError
from llama_jax.train.progress import say


class Steps(NamedTuple):
    """The steps that are traced, both ends included."""

    first: int
    last: int


def steps(text: str) -> Steps:
    """'10:15' as steps. Raises UserError for anything else."""
    found = re.fullmatch(r'(\d+):(\d+)', text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(
            f'--profile {text}: give the first and the last step to trace, such as 10:15'
        )
    return Steps(int(found[1]), int(found[2]))


class Profile:
    """Traces the steps given, in process 0, into WORKDIR/profile. No steps: nothing."""

    def __init__(self, traced: Steps | None, workdir: Path, *, taken: int, last: int):
        """Raises UserError for steps that a run from `taken` to `last` does not take."""
        self._steps, self._directory, self._on = traced, workdir / 'profile', False
        if traced is not None and not taken < traced.first <= traced.last <= last:
            left = f'takes steps {taken + 1} to {last}: name some of these, or'
            left = left if taken < last else 'is finished:'
            raise UserError(f'--profile {traced.first}:{traced.last}: this run {left} leave it out')

    def begin(self, step: int, state: Any) -> None:
        """Before `step` is given to the devices: they end first what they have."""
        if self._steps is not None and step == self._steps.first and jax.process_index() == 0:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._on = True

    def end(self, step: int, state: Any) -> None:
        """After `step` was given to the devices, whose new state is `state`."""
        if self._on and self._steps is not None and step == self._steps.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write what was traced so far. A second call does nothing."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            say(
                f'profile: {self._directory}; to look at it: pip install xprof, then '
                f'xprof --port 8791 {self._directory}'
            )
