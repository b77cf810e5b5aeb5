"""The training loop."""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llama_jax.errors import DivergedError, Stopped, UserError
from llama_jax.train import agreement
from llama_jax.train.config_file import ConfigFile
from llama_jax.train.experiment import Experiment
from llama_jax.train.place import HostBatch, figures, largest
from llama_jax.train.profile import Steps
from llama_jax.train.run import Measure, Run, prepare
from llama_jax.train.signals import Signals, caught, stopped
from llama_jax.train.step import Metrics, State

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Pending(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    batch: HostBatch
    metrics: Metrics
    told: jax.Array | np.ndarray
    """See Told, as of this step."""


class Told(NamedTuple):
    """What all processes know of each other."""

    stopping: int = 0
    """The number of a signal that one of them received; 0: none."""
    due: int = 0
    """1 when it is time to save."""


def train(
    experiment: Experiment,
    workdir: Path,
    *,
    measure: Measure | None = None,
    profile: Steps | None = None,
    wandb: str | None = None,
    config_file: ConfigFile | None = None,
) -> State:
    """Train to the last step, from the newest checkpoint in `workdir` if there is one.

    `measure` is called at each validation, and its figures are recorded as a line 'light'.
    `profile` are steps to trace, `wandb` is a project of wandb that gets the scalars as well, and
    the `config_file` that defines the experiment is kept beside its records.

    Raises UserError for what does not fit together, for a run that is no longer finite and for
    what fails on the way, Stopped after SIGTERM or SIGINT.
    """
    with caught() as signals, agreement.together(), contextlib.ExitStack() as opened:
        with signals.stopping('before a step was taken: nothing is lost'):
            run = opened.enter_context(
                prepare(
                    *(experiment, workdir),
                    measure=measure,
                    profile=profile,
                    wandb=wandb,
                    config_file=config_file,
                )
            )
        opened.enter_context(jax.set_mesh(run.mesh))
        opened.enter_context(run.progress)
        try:
            state = _train(run, signals)
        except BaseException as error:
            told = error if _is_told(error) else _failure(run, 'the training', error)
            with contextlib.suppress(UserError):
                run.checkpoints.wait()  # while the other processes still take part
            agreement.failed(told)
            if told is error:
                raise
            raise told from error
        if signals.number and jax.process_count() == 1:  # it came when all was done
            raise stopped(signals.number, _saved(run))
        return state


def _train(run: Run, signals: Signals) -> State:
    config, saving = run.experiment.train, run.experiment.checkpoint
    first, stopping = run.saved, 0
    # What the run begins with; or a validation in the midst of which it had ended.
    opens = _validates(run, first) and not run.checkpoints.has_score(first)
    if opens and (first or run.experiment.start is not None):
        stopping = _evaluate(run, signals, first)
    pending: Pending | None = None
    since = time.monotonic()
    for step in range(first + 1, config.steps + 1):
        if stopping or run.out_of_patience(step - 1):
            break
        run.profile.begin(step, run.state)
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            batch = _read(run, signals, step, pending)
            run.state, metrics = run.step(run.state, run.place(batch))
        run.profile.end(step, run.state)
        told = _finish(run, pending)  # the step before; the devices work on this one
        due = bool(saving.minutes) and time.monotonic() - since > 60 * saving.minutes
        news = largest((signals.number, due), run.mesh)
        pending, run.cursor = Pending(step, batch, metrics, news), batch['cursor']

        stopping = told.stopping
        validates = _validates(run, step) and not stopping
        saves = stopping or told.due or step == config.steps or _saves(run, step)
        saves = saves or (validates and run.experiment.evaluation.patience > 0)
        if saves or validates:
            # What all were told in this step, no later one says.
            last = _finish(run, pending)
            stopping, saves = last.stopping or stopping, saves or last.due
            pending = None
            with run.progress.paused():
                if saves or stopping:
                    run.save(step)
                    since = time.monotonic()
                if validates and not stopping:
                    stopping = _evaluate(run, signals, step)
                    if stopping and run.saved != step:
                        run.save(step)
    run.checkpoints.wait()
    if stopping:
        raise stopped(stopping, _saved(run))
    if run.saved < config.steps:
        run.progress.note(run.saved, _ended_early(run))
    return run.state


def _ended_early(run: Run) -> str:
    lowest = run.checkpoints.lowest()
    said = 'were not finite'
    if lowest is not None:
        said = f'were no better than that {f"of step {lowest}" if lowest else "before the first"}'
        if lowest == run.checkpoints.best():
            said += f', which is {run.workdir}@best'
    return (
        f'ended after step {run.saved} of {run.experiment.train.steps}: '
        f'{run.experiment.evaluation.patience} validations in a row {said}'
    )


def _saves(run: Run, step: int) -> bool:
    saving = run.experiment.checkpoint
    return any(n and step % n == 0 for n in (saving.every, saving.keep_every))


def _validates(run: Run, step: int) -> bool:
    steps, every = run.experiment.train.steps, run.experiment.evaluation.every
    return run.validate is not None and (step == steps or step % every == 0)


def _saved(run: Run) -> str:
    """What becomes of a run that ends here."""
    if not run.saved:
        return 'before a step was saved: nothing is lost'
    return (
        f'after step {run.saved}, which is saved in {run.workdir}; the same command goes on from '
        'there'
    )


def _evaluate(run: Run, signals: Signals, step: int) -> int:
    """Validate and sample; the number of the signal that ended this, or 0.

    A checkpoint of `step`, where there is to be one, is on disk before this begins.
    """
    run.checkpoints.wait()
    poll = _Poll(run, signals)
    try:
        # One process may stop anywhere, several where all of them ask.
        alone = jax.process_count() == 1
        with signals.stopping(_saved(run), raises=alone, ends=run.saved == step):
            run.evaluate(step, poll)
    except Stopped:
        return signals.number
    except Exception as error:
        _rescue(run, step)
        if _is_told(error):
            raise
        raise _failure(run, f'the validation after step {step}', error) from error
    return poll.number


class _Poll:
    """Whether some process was told to stop. All ask equally often, and know it one question
    later, so that none waits for the devices."""

    def __init__(self, run: Run, signals: Signals):
        self.number = 0
        self._run, self._signals = run, signals
        self._before: jax.Array | np.ndarray = np.zeros(1, np.int32)

    def __call__(self) -> bool:
        news = largest((self._signals.number,), self._run.mesh)
        self.number = self.number or int(self._before[0])
        self._before = news
        return bool(self.number)


def _read(run: Run, signals: Signals, step: int, pending: Pending | None) -> HostBatch:
    try:
        return run.read()
    except Exception as error:
        _finish(run, pending)
        _rescue(run, step - 1)
        if signals.number and run.saved == step - 1:  # the workers have ended at the same signal
            raise stopped(signals.number, _saved(run)) from None
        if _is_told(error):
            raise
        raise _failure(run, f'reading the data of step {step}', error) from error


def _rescue(run: Run, step: int) -> None:
    """Save the sound state of `step` before what failed beside it ends the run. One process of
    several cannot: all of them save a checkpoint together, or none."""
    if run.saved != step and jax.process_count() == 1:
        run.save(step)


def _is_told(error: BaseException) -> bool:
    """Whether whoever runs this says in one line what is the matter."""
    full = isinstance(error, OSError) and error.errno in _NO_ROOM
    return full or isinstance(error, UserError) or not isinstance(error, Exception)


def _failure(run: Run, what: str, error: BaseException) -> UserError:
    """The one line about an unforeseen failure, whose traceback is kept in the workdir."""
    agreement.defer()
    path = run.workdir / f'failure-process-{jax.process_index()}.txt'
    path.write_text(''.join(traceback.format_exception(error)), encoding='utf-8')
    reason = next(iter(str(error).strip().splitlines()), '')[:300]
    text = f'{what} failed: {type(error).__name__}: {reason}'
    run.progress.note(run.saved, text)
    return UserError(f'{text} (all of it in {path}); the run goes on from step {run.saved}')


def _cause(run: Run, step: int, in_a_row: int) -> str:
    """What to look at first."""
    if in_a_row == step:  # from the first one on: no rate has done this
        name = type(run.experiment.objective).__name__
        return f'No step was finite: look at the loss of {name}, or at what the run starts from,'
    return 'Lower --optimizer.schedule.peak'


def _finish(run: Run, pending: Pending | None) -> Told:
    """Wait for a step and record it; what all processes know of each other by then.

    Raises DivergedError when too many steps in a row were not finite.
    """
    if pending is None:
        return Told()
    metrics = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
    metrics |= figures(pending.batch) | run.loader.read(pending.batch['cursor'])
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
        raise DivergedError(
            f'stopped at step {pending.step}: loss or gradient was not finite for {in_a_row} steps '
            f'in a row, last on {lanes} (kept in {kept}); the parameters are those of before. '
            f'{_cause(run, pending.step, in_a_row)} and start again, which goes on from the newest '
            f'checkpoint; or begin with an earlier one, --start {run.workdir}@STEP in another '
            '--workdir; or look at the data'
        )
    return Told(*np.asarray(pending.told).tolist())
