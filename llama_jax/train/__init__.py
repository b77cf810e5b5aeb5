"""Experiment, training step, loop, checkpoints and records of a run."""
