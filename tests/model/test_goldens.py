"""Our logits, loss and gradients against transformers', kept as goldens: no PyTorch needed here.

tests/parity compares live and writes the goldens.
"""

import numpy as np
import pytest

from tests.model import tiny
from tests.parity import ours
from tests.parity.cases import CASES, TOLERANCE, digest, read_golden, token_ids, weights


@pytest.mark.parametrize('name', CASES)
def test_logits_loss_and_gradients_equal_goldens_of_transformers(name):
    config = CASES[name]
    # tests/parity compares what a CPU does by default: blocks of queries, layers unrolled.
    tensors, token_BT = weights(config, seed=0), token_ids(config)
    found = digest(*ours.results(config, tensors, token_BT, tiny.REFERENCE))
    golden = read_golden(name)
    made_by = str(golden.pop('made_by'))
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        np.testing.assert_allclose(
            found[key], value, rtol=0, atol=TOLERANCE, err_msg=f'{key}, golden made by {made_by}'
        )
        if key.startswith('norm/'):  # entries are small: their norm must agree as well
            np.testing.assert_allclose(found[key], value, rtol=TOLERANCE, err_msg=key)
