"""InfoNCE against loops over pairs in float64, whole and in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.objectives import info_nce as info_nce_module
from llama_jax.objectives.info_nce import info_nce
from tests.objectives.pairs import MESHES, make_mesh, oracle, place


@pytest.mark.parametrize(
    ('name', 'block'),
    [
        *((name, info_nce_module.BLOCK) for name in MESHES),
        # The last block is not full: 24 rows on one device, 3 or 6 on each of several.
        ('one device', 7),
        ('one device', 1),
        ('fsdp 8', 2),
        ('data 2 fsdp 2 tensor 2', 4),
    ],
)
def test_sums_and_gradients_equal_loops_over_pairs(name, block, monkeypatch):
    monkeypatch.setattr(info_nce_module, 'BLOCK', block)
    B, M, D = 8, 3, 5
    random = np.random.default_rng(0)
    valid_BM = random.random((B, M)) < 0.7
    valid_BM[0] = False  # a row of padding
    document_BM = random.integers(0, 9, (B, M)).astype(np.int32)  # some are there twice
    a_BMD, b_BMD = random.normal(size=(2, B, M, D))
    b_BMD += a_BMD
    a_BMD, b_BMD = (
        (x / np.linalg.norm(x, axis=-1, keepdims=True) * valid_BM[..., None]).astype(np.float32)
        for x in (a_BMD, b_BMD)
    )
    want = oracle(a_BMD[valid_BM], b_BMD[valid_BM], document_BM[valid_BM], 0.1)
    assert 0 < want['correct'] < want['weight'] < valid_BM.size
    assert len(set(document_BM[valid_BM])) < want['weight']

    def total(a_BMD, b_BMD, log_temperature, document_BM, valid_BM):
        sums = info_nce(
            a_BMD,
            b_BMD,
            document_BM=document_BM,
            valid_BM=valid_BM,
            temperature=jnp.exp(log_temperature),
        )
        return sums.total, sums

    devices = make_mesh(name)
    with jax.set_mesh(devices):
        a, b, document, valid = place((a_BMD, b_BMD, document_BM, valid_BM), devices)
        gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
        (_, sums), (da, db, dlog) = jax.device_get(gradient(a, b, np.log(0.1), document, valid))
    for field in sums._fields:
        np.testing.assert_allclose(getattr(sums, field), want[field], rtol=2e-6, err_msg=field)
    np.testing.assert_allclose(da[valid_BM], want['da'], atol=2e-6)
    np.testing.assert_allclose(db[valid_BM], want['db'], atol=2e-6)
    np.testing.assert_allclose(dlog, want['dlog_temperature'], rtol=1e-5)
    assert not da[~valid_BM].any() and not db[~valid_BM].any()


def test_identical_vectors_cost_log_n_and_duplicates_nothing():
    B, M, D = 4, 2, 3
    same_BMD = np.full((B, M, D), D**-0.5, np.float32)
    with jax.set_mesh(make_mesh('one device')):

        @jax.jit
        def loss(document_BM, valid_BM):
            sums = info_nce(
                same_BMD,
                same_BMD,
                document_BM=document_BM,
                valid_BM=valid_BM,
                temperature=jnp.float32(0.05),
            )
            return sums.total / sums.weight

        apart_BM = np.arange(B * M, dtype=np.int32).reshape(B, M)
        every_BM = np.ones((B, M), bool)
        assert loss(apart_BM, every_BM) == pytest.approx(np.log(8), rel=1e-6)
        assert loss(apart_BM, apart_BM < 5) == pytest.approx(np.log(5), rel=1e-6)
        assert loss(apart_BM // 2, every_BM) == pytest.approx(np.log(7), rel=1e-6)
        assert loss(apart_BM * 0, every_BM) == 0  # nothing is left but the positive


def test_nothing_at_all_has_a_loss_and_a_gradient_of_zero():
    with jax.set_mesh(make_mesh('one device')):

        @jax.jit
        @jax.value_and_grad
        def total(x_BMD):
            sums = info_nce(
                x_BMD,
                x_BMD,
                document_BM=jnp.zeros((2, 2), jnp.int32),
                valid_BM=jnp.zeros((2, 2), bool),
                temperature=jnp.float32(0.05),
            )
            return sums.total + sums.uniformity + sums.alignment

        value, dx_BMD = total(np.zeros((2, 2, 3), np.float32))
    assert value == 0 and not dx_BMD.any()


@pytest.mark.parametrize('name', ['one device', 'fsdp 8'])
def test_memory_is_that_of_blocks(name, monkeypatch):
    """The gradient takes a fraction of the memory of one table; whole it takes two."""
    monkeypatch.setattr(info_nce_module, 'BLOCK', 32)
    devices = make_mesh(name)

    def total(a_BMD, b_BMD, document_BM, valid_BM):
        return info_nce(
            a_BMD,
            b_BMD,
            document_BM=document_BM,
            valid_BM=valid_BM,
            temperature=jnp.float32(0.05),
        ).total

    B, M, D = 64 * devices.size, 16, 8
    x_BMD = np.zeros((B, M, D), np.float32)
    document_BM = np.arange(B * M, dtype=np.int32).reshape(B, M)
    arguments = place((x_BMD, x_BMD, document_BM, document_BM >= 0), devices)
    with jax.set_mesh(devices):
        program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments).compile()
    own_table = 4 * (64 * M) * (B * M)  # bytes, of one device
    assert program.memory_analysis().temp_size_in_bytes < own_table * devices.size / 3
