"""Weights that are read one at a time make the programs that others make."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert import params
from llama_jax.convert.huggingface import HUGGING_FACE
from llama_jax.generate import prepare as prepare_lib
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.programs import Programs
from llama_jax.generate.quantized import Quantization
from llama_jax.model.config import Compute
from tests.generate.tiny import mesh_of
from tests.parity.cases import CASES, weights

CONFIG = replace(CASES['llama3'], layers=2, vocab=64, ffn=192)
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
TENSORS = {
    name: w.astype(TYPES[i % 3]) for i, (name, w) in enumerate(weights(CONFIG, seed=3).items())
}


@pytest.mark.parametrize('axes', [{}, {'fsdp': 2, 'tensor': 4}], ids=str)
@pytest.mark.parametrize('bits', [None, 'int8', 'int4'])
@pytest.mark.parametrize('platform', ['cpu', 'accelerator'])
def test_unread_parameters_make_what_stacked_ones_make(axes, bits, platform, monkeypatch):
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: platform == 'cpu')
    monkeypatch.setattr(prepare_lib, '_BLOCK', 1000)  # several parts of a matrix
    mesh = mesh_of(8 if axes else 1, **axes)
    config, unread = params.unread(HUGGING_FACE, TENSORS, CONFIG)
    how = {
        'mesh': mesh,
        'compute': Compute(precision='bfloat16' if bits is None else 'float32'),
        'end_ids': (),
        'pad_id': 0,
        'quantization': Quantization(weights=bits, group=8 if bits == 'int4' else None),
    }
    made = Programs(config, unread, **how).params
    expected = Programs(config, jax.device_put(params.stacked(unread)), **how).params
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.sharding == y.sharding
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
