"""The standard error of validated bits per byte."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.objectives.base import Loss
from llama_jax.train import validate


@pytest.mark.slow
def test_the_standard_error_is_that_of_a_ratio_over_batches():
    """Beside the spread of the ratio over drawn sets of batches."""
    rng = np.random.default_rng(0)
    n_bytes = rng.integers(300, 500, (4000, 32))
    nll = n_bytes * rng.normal(1.5, 0.1, n_bytes.shape)
    ratios = nll.sum(1) / n_bytes.sum(1) / math.log(2)

    def sums_of(nlls, sizes):
        step = iter([Loss(jnp.zeros(()), jnp.ones(()), {'nll': x}) for x in nlls])
        batches = [{'weights': np.ones(n), 'targets': np.zeros(n, int)} for n in sizes]
        return validate.loss_sums(
            *(lambda params, batch: next(step), {}, batches),
            place=lambda batch: batch,
            byte_lengths=np.ones(1, int),
        )

    told = [validate.standard_error([sums_of(nll[i], n_bytes[i])]) for i in range(20)]
    assert np.mean(told) == pytest.approx(ratios.std(), rel=0.1)
    # That two sets differ is no noise.
    easy = [sums_of(nll[i] / 3, n_bytes[i]) for i in range(20)]
    hard = [sums_of(nll[-i], n_bytes[-i]) for i in range(20)]
    pairs = list(zip(easy, hard, strict=True))
    both = [sum(x['nll'] for x in two) / sum(x['bytes'] for x in two) for two in pairs]
    several = [validate.standard_error(two) for two in pairs]
    assert np.mean(several) == pytest.approx(ratios.std() * math.sqrt(1 + 1 / 9) / 2, rel=0.1)
    assert np.std(both) / math.log(2) == pytest.approx(np.mean(several), rel=0.4)
    sums = sums_of(nll[0], n_bytes[0])
    assert validate.figures(sums).keys() == {'loss', 'nll', 'bytes', 'bits_per_byte'}
    of_none = {'of_it': 0.0, 'weight of_it': 0.0, 'of_other': 3.0, 'weight of_other': 2.0}
    assert validate.figures({'loss': 8.0, 'weight': 4.0, **of_none}) == {'loss': 2, 'of_other': 1.5}
    assert validate.standard_error([sums, sums_of(nll[0, :1], n_bytes[0, :1])]) is None
