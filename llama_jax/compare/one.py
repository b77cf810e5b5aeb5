"""One run of a grid: trained as pretrain does it, then evaluated."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from llama_jax import mesh as meshes
from llama_jax.compare import baselines, record
from llama_jax.compare.grid import FINISHED, PER_TEXT
from llama_jax.compare.runner import leave_with_parent
from llama_jax.compare.tune import LOSS
from llama_jax.data.prepare import locked
from llama_jax.errors import DivergedError
from llama_jax.evaluate import per_text
from llama_jax.evaluate.light import light
from llama_jax.evaluate.suite import evaluate
from llama_jax.report.baselines import FOLDER
from llama_jax.train.experiment import Experiment
from llama_jax.train.loop import train
from llama_jax.train.progress import say
from llama_jax.train.records import read_metrics, write_atomically


def run(workdir: Path, place: str) -> None:
    """Train and evaluate the run `place` of the grid in `workdir`, from where it stands.

    evaluation.json is written last. Only one process (of each host) works on a run at a time: a
    second one waits, and then finds the run finished.
    """
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        leave_with_parent()
    planned, suite = record.planned(workdir, place)
    experiment, directory = planned.experiment, planned.directory(workdir)
    first = jax.process_index() == 0
    with locked(directory / 'lock') if first else contextlib.nullcontext():
        if planned.finished(workdir):
            return
        record.check_here(workdir)
        if place.startswith(f'{FOLDER}/'):
            baselines.run(planned, suite, directory, meshes.make(experiment.mesh))
            return
        if _chooses_a_rate(workdir, place):
            _train_alone(experiment, directory, first)
            return
        train(experiment, directory, measure=light)
        say('evaluating')
        evaluation = evaluate(directory, experiment, suite, meshes.make(experiment.mesh))
        if first:
            per_text.save(directory / PER_TEXT, evaluation.texts)
            write_atomically(directory / FINISHED, json.dumps(evaluation.result, indent=1))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f'{place} is evaluated')
        say(f'evaluated in {evaluation.result["seconds"]:.0f} s')


def _chooses_a_rate(workdir: Path, place: str) -> bool:
    return record.rates(workdir) is not None and '/lr-' in place


def _train_alone(experiment: Experiment, directory: Path, first: bool) -> None:
    """Train to see the held-out loss at the end, which is null where there is no finite one."""
    loss = None
    try:
        train(experiment, directory, measure=light)
        lines = [line for line in read_metrics(directory) if line['kind'] == 'validation']
        loss = lines[-1]['loss'] if lines else None
    except DivergedError as error:
        say(str(error))
    if first:
        write_atomically(directory / FINISHED, json.dumps({'metrics': {}, LOSS: loss}))
