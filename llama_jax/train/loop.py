"""The training loop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llama_jax.errors import Stopped, UserError
from llama_jax.train.experiment import Experiment
from llama_jax.train.run import HostBatch, Measure, Run, prepare
from llama_jax.train.step import Metrics, State


class Pending(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    batch: HostBatch
    metrics: Metrics
    told: jax.Array | int
    """Number of the signal that some process had received by this step; 0: none."""


def train(experiment: Experiment, workdir: Path, *, measure: Measure | None = None) -> State:
    """Train to the last step, from the newest checkpoint in `workdir` if there is one.

    `measure` is called at each validation, and its figures are recorded as a line 'light'.

    Raises UserError for what does not fit together and for a run that is no longer finite, Stopped
    after SIGTERM or SIGINT.
    """
    config, evaluation = experiment.train, experiment.evaluation
    with (
        _signals() as received,
        prepare(experiment, workdir, measure=measure) as run,
        jax.set_mesh(run.mesh),
        run.progress as progress,
    ):
        pending: Pending | None = None
        stopping = 0
        steps = range(int(run.state.step) + 1, config.steps + 1)
        for step, batch in zip(steps, run.loader, strict=False):
            run.state, metrics = run.step(run.state, run.place(batch))
            stopping = _finish(run, pending)  # the step before; the devices work on this one
            told = run.largest(max(received, default=0))
            pending, run.cursor = Pending(step, batch, metrics, told), batch['cursor']

            last = step == config.steps
            validates = run.validate and (last or step % evaluation.every == 0)
            if validates or stopping or last or step % experiment.checkpoint.every == 0:
                _finish(run, pending)
                pending = None
                with progress.paused():
                    evaluates = validates and (last or not stopping)
                    run.save(step, run.evaluate(step) if evaluates else None)
            if stopping:
                break
        run.checkpoints.wait()
        if stopping and step < config.steps:
            raise Stopped(
                f'stopped by {signal.Signals(stopping).name} after step {step}, which is saved in '
                f'{workdir}; the same command goes on from there',
                exit_code=128 + stopping,
            )
        return run.state


def _finish(run: Run, pending: Pending | None) -> int:
    """Wait for a step and record it; the signal of which all processes know by then, or 0.

    Raises UserError when too many steps in a row were not finite.
    """
    if pending is None:
        return 0
    metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    metrics |= run.loader.read(pending.batch['cursor'])
    run.progress.log(pending.step, metrics, seconds_waited=run.loader.seconds_waited)
    in_a_row = int(metrics['skipped_in_a_row'])
    lanes = f'batch {pending.step} of the data order'
    if in_a_row:
        run.progress.note(
            pending.step,
            f'step {pending.step}: loss or gradient not finite on {lanes}; update skipped '
            f'({int(metrics["skipped"])} in all)',
        )
    if in_a_row >= run.experiment.train.max_nonfinite:
        kept = run.workdir / f'nonfinite-batch-{pending.step}-process-{jax.process_index()}.npz'
        np.savez(kept, allow_pickle=False, **pending.batch)
        raise UserError(
            f'stopped at step {pending.step}: loss or gradient was not finite for {in_a_row} steps '
            f'in a row, last on {lanes} (kept in {kept}); the parameters are those of before. '
            'Lower --optimizer.schedule.peak, or look at the data'
        )
    return int(pending.told)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT is obeyed at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        # Not print: the signal may have come in the midst of one, which cannot be entered twice.
        os.write(2, f'{signal.Signals(number).name}: saving after this step\n'.encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
