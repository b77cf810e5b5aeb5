"""The baselines of a grid, made as runs of it: WORKDIR/baselines/NAME/seed-K."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llama_jax.compare.budget import Text, budget
from llama_jax.compare.fair import text_of
from llama_jax.compare.grid import FINISHED, Arm, Grid, Planned
from llama_jax.data import order
from llama_jax.data.load_tokenizer import load_tokenizer
from llama_jax.data.recipe import blocks_of
from llama_jax.evaluate import baselines, texts
from llama_jax.evaluate.suite import Suite, evaluate_trained
from llama_jax.model.tune import Full
from llama_jax.objectives.base import backbone
from llama_jax.report.baselines import COUNTS, FOLDER
from llama_jax.train.experiment import Experiment
from llama_jax.train.records import write_atomically
from llama_jax.train.restore import Trained
from llama_jax.train.start import adapted
from llama_jax.train.step import initial_state

UNTRAINED = 'untrained-'
"""A backbone before its first step, as the arm of this name looks at texts."""


def groups(grid: Grid) -> dict[str, list[str]]:
    """Name of each baseline to the arms that it is of; [] for all."""
    found: dict[tuple[object, ...], list[str]] = {}
    for arm in grid.arms:
        experiment = arm.experiment
        begun = (experiment.model, experiment.objective.causal, experiment.start)
        found.setdefault(begun, []).append(arm.name)
    return {COUNTS: [], **{f'{UNTRAINED}{arms[0]}': arms for arms in found.values()}}


def runs(grid: Grid) -> list[Planned]:
    """All of them, an untrained backbone under every seed."""
    base, planned = grid.arms[0], []
    for name, arms in groups(grid).items():
        arm = next((arm for arm in grid.arms if arm.name in arms[:1]), base)
        for seed in range(1 if name == COUNTS else grid.seeds):
            planned.append(at_place(arm, f'{FOLDER}/{name}/seed-{seed}'))
    return planned


def arm_of(place: str, base: str) -> str:
    """The name of the arm whose settings a baseline has."""
    name = place.split('/')[1]
    return name.removeprefix(UNTRAINED) if name.startswith(UNTRAINED) else base


def at_place(arm: Arm, place: str) -> Planned:
    seed = int(place.rpartition('seed-')[2])
    return Planned(arm.name, place, replace(arm.experiment, seed=seed))


def run(planned: Planned, suite: Suite, directory: Path, mesh: Mesh) -> None:
    """Measure a baseline; evaluation.json is written as that of an arm."""
    experiment = planned.experiment
    if planned.place.split('/')[1] == COUNTS:
        text = text_of(experiment.data)
        found = texts.of_run(suite, experiment, text.tokenizer)
        seen = budget(Arm(planned.arm, experiment), text).text_seen
        rows = baselines.counts(found, text.tokenizer, _read(experiment, text, seen))
        result = {'rows': rows, 'examples': texts.digest(found)}
    else:
        result = untrained(experiment, suite, mesh)
    if jax.process_index() == 0:
        write_atomically(directory / FINISHED, json.dumps(result, indent=1))


def untrained(experiment: Experiment, suite: Suite, mesh: Mesh) -> dict:
    """The suite of the backbone that training begins with: drawn, or that of `start`."""
    state = initial_state(
        experiment.model,
        experiment.objective,
        optax.identity(),
        seed=experiment.seed_of('init'),
        mesh=mesh,
    )
    tokenizer = load_tokenizer(experiment.data)
    # All parameters of it, whatever is trained of them.
    state, *_ = adapted(state, replace(experiment, tune=Full()), tokenizer, mesh)
    trained = Trained(experiment, backbone(state.params), {}, tokenizer, step=0)
    return evaluate_trained(trained, experiment, suite, mesh).result


def _read(experiment: Experiment, text: Text, left: int) -> Iterator[np.ndarray]:
    """The training text that a run of the experiment reads, in its order, up to `left` tokens; what
    is read again is counted once."""
    of_sources, tokenizer = text.texts, text.tokenizer
    stream = order.Stream(
        [blocks_of(texts, experiment.train.seq_len) for texts in of_sources],
        text.corpus.weights,
        seed=experiment.seed_of('data'),
        share=experiment.data.share,
    )
    for block in stream:
        tokens = of_sources[block.source][block.document]
        if block.epoch == 0:
            # A unit is a token of the document or its end.
            begin = [tokenizer.bos_id] if block.start == 0 else []
            end = [tokenizer.eos_id] if block.stop > len(tokens) else []
            yield np.concatenate([begin, tokens[block.start : block.stop], end]).astype(np.int32)
        left -= min(block.stop, len(tokens)) - block.start
        if left <= 0:
            return
