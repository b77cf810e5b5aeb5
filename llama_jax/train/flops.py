"""Model FLOPs of a run, as its records, its plan and a comparison's budget count them."""

from __future__ import annotations

from llama_jax.model.tune import flops_share
from llama_jax.train import teacher
from llama_jax.train.experiment import Experiment, steps_of


def flops_per_token(experiment: Experiment) -> float:
    """Of a position of a row, the mean over the steps of the run: what is trained of the model, and
    a teacher that runs in each step."""
    train, objective = experiment.train, experiment.objective
    own = objective.flops_of_run(experiment.model, train.seq_len, steps_of(train))
    return own * flops_share(experiment.tune) + teacher.flops(experiment)
