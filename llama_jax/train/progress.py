"""What a run tells while it goes on: a bar for people, lines for the records."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from llama_jax.train.experiment import Experiment
from llama_jax.units import duration

if TYPE_CHECKING:  # records tell of themselves with `say`
    from llama_jax.train.records import Records

_SECONDS_BETWEEN_LINES = 10
"""Where there is no terminal to draw a bar on."""


def say(text: str) -> None:
    """One line for people, on standard error, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Speed, bar and records of a run; time in `paused` is not training time."""

    def __init__(
        self,
        experiment: Experiment,
        records: Records,
        *,
        first_step: int,
        seconds: float,
        flops_per_token: float,
        peak_flops: float | None,
    ):
        self._steps = experiment.train.steps
        self._log_every = experiment.train.log_every
        self._tokens_per_step = experiment.train.batch * experiment.train.seq_len
        self._flops_per_token = flops_per_token
        self._peak = peak_flops and peak_flops * jax.device_count()
        self._records = records
        self._seconds = seconds
        self._since = time.perf_counter()
        self._line = (first_step, seconds, 0.0)  # step, seconds and waiting of the last line
        self._printed = 0.0
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal and jax.process_index() == 0:
            self._bar = Bar(
                TextColumn('step {task.completed}/{task.total}'),
                BarColumn(bar_width=None),
                TextColumn('{task.fields[facts]}'),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(
                'train', total=self._steps, completed=first_step, facts=''
            )
            self._bar.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def log(self, step: int, metrics: dict[str, float], *, seconds_waited: float) -> None:
        """Record a finished step: `metrics` are on the host."""
        if step % self._log_every and step != self._steps:
            return
        seconds = self._seconds + time.perf_counter() - self._since
        last_step, last_seconds, last_waited = self._line
        self._line = (step, seconds, seconds_waited)
        speed = (step - last_step) * self._tokens_per_step / max(seconds - last_seconds, 1e-9)
        mfu = speed * self._flops_per_token / self._peak if self._peak else None
        tokens = step * self._tokens_per_step
        metrics = {name: value for name, value in metrics.items() if name != 'skipped_in_a_row'}
        self._records.write(
            'train',
            step,
            tokens=tokens,
            flops=tokens * self._flops_per_token,
            seconds=seconds,
            **metrics,
            tokens_per_second=speed,
            mfu=mfu,
            seconds_waiting=seconds_waited - last_waited,
        )
        left = (self._steps - step) * self._tokens_per_step / speed
        shown = 'reward' if 'reward' in metrics else 'loss'
        self._show(step, f'{shown} {metrics[shown]:.3f}', speed, mfu, left)

    def _show(self, step: int, shown: str, speed: float, mfu: float | None, left: float) -> None:
        facts = f'{shown}  {speed:,.0f} tokens/s'
        if mfu is not None:
            facts += f'  MFU {mfu:.0%}'
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif step == self._steps or time.perf_counter() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.perf_counter()
            say(f'step {step}/{self._steps}  {facts}  {duration(left)} left')

    def validated(self, step: int, result: dict[str, Any]) -> None:
        """Record a validation."""
        self._evaluation('validation', step, result)
        known = [name for name in ('loss', 'bits_per_byte', 'reward') if name in result]
        shown = ', '.join(f'{name.replace("_", " ")} {result[name]:.3f}' for name in known)
        head = f'{known[-1]}/' if known else ''
        of_sets = ', '.join(
            f'{name.removeprefix(head)} {value:.3f}'
            for name, value in result.items()
            if head and name.startswith(head)
        )
        error = f', s.e. {se:.3f}' if (se := result.get('bits_per_byte_se')) else ''
        kind = f' ({result["likelihood"]}{error})' if 'likelihood' in result else ''
        say(f'step {step}  validation: {shown}{kind}{of_sets and f" ({of_sets})"}')

    def measured(self, step: int, result: dict[str, float]) -> None:
        """Record what the caller had measured of the parameters."""
        self._evaluation('light', step, result)

    def _evaluation(self, kind: str, step: int, result: dict[str, Any]) -> None:
        tokens = step * self._tokens_per_step
        flops = tokens * self._flops_per_token
        self._records.write(kind, step, tokens=tokens, flops=flops, seconds=self._seconds, **result)

    def note(self, step: int, text: str) -> None:
        """Record an event, and show it."""
        self._records.write('event', step, text=text)
        say(text)
