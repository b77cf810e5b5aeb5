"""Masked inputs in a causal model: which are masked, and what is asked of all targets."""

from types import SimpleNamespace

import numpy as np
import pytest

from llama_jax.data.pieces import Piece
from llama_jax.errors import UserError
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.masked_inputs import MaskedInputs

TOKENIZER = SimpleNamespace(bos_id=256, eos_id=257, mask_id=258)
TOKENS = np.arange(40) + 100


@pytest.mark.parametrize(('start', 'stop', 'n'), [(0, 41, 6), (7, 27, 3), (0, 2, 1), (0, 1, 0)])
def test_some_inputs_are_masked_and_no_target(start, stop, n):
    piece = Piece(TOKENS, start, stop, draw=0.5, sizes=(stop - start,), identity=0)
    how = {'tokenizer': TOKENIZER, 'seq_len': 64}
    plain = CausalLM().example(piece, rng=np.random.default_rng(0), **how)
    seen = np.zeros(stop - start, bool)
    for seed in range(200):
        one = MaskedInputs().example(piece, rng=np.random.default_rng(seed), **how)
        masked = one['inputs'] == 258
        seen |= masked
        assert masked.sum() == n
        np.testing.assert_array_equal(one['inputs'][~masked], plain['inputs'][~masked])
        for name in ('targets', 'weights'):
            np.testing.assert_array_equal(one[name], plain[name])
    # The begin token alone is always to be seen.
    np.testing.assert_array_equal(~seen, (np.arange(start, stop) == 0) | (n == 0))


def test_its_own_loss_is_no_likelihood():
    assert not MaskedInputs().has_likelihood and MaskedInputs().marks
    assert MaskedInputs().reading == CausalLM().reading


@pytest.mark.parametrize('rate', [0.0, 1.0])
def test_bad_rates_are_named(rate):
    with pytest.raises(UserError, match=f'rate is {rate}'):
        MaskedInputs(rate=rate)
