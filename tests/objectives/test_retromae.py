"""RetroMAE: what the decoder reads, and its loss by its definition."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.objectives import retromae
from llama_jax.objectives.retromae import RetroMAE, seen
from tests.objectives import texts
from tests.objectives.pairs import make_mesh, place

VOCAB = 24
TOKENIZER = SimpleNamespace(
    mask_id=VOCAB - 1, bos_id=VOCAB - 2, byte_lengths=np.array([1] * (VOCAB - 2) + [0, 0])
)
CONFIG = ModelConfig(
    vocab=VOCAB, dim=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, context=32
)
COMPUTE = Compute(attention='reference', unroll=1)
SEQ_LEN = 16


def make_batch(rows=2):
    """Two texts a row, and padding behind them."""
    random, objective = np.random.default_rng(0), RetroMAE()
    made = []
    for n in (5, 8) * rows:
        (example,) = pieces.examples(
            objective, random.integers(0, VOCAB - 2, n), tokenizer=TOKENIZER, seq_len=16, rng=random
        )
        made.append(example)
    return texts.packed(made, objective, seq_len=SEQ_LEN, rows=rows, pad_id=0)


@functools.cache
def parameters():
    with jax.set_mesh(make_mesh('one device')):
        params = layers.create(CONFIG, jax.random.key(0), make_mesh('one device'))
        extra = jax.jit(lambda: RetroMAE().extra(CONFIG, jax.random.key(1)))()
    return params, extra


def test_each_position_reads_the_vector_and_others_of_its_text():
    batch = make_batch(rows=64)
    with jax.set_mesh(make_mesh('one device')):
        read_BTS = np.asarray(
            seen(*(jnp.asarray(batch[name]) for name in ('segments', 'positions')),
                 jax.random.key(0), rate=0.7)
        )  # fmt: skip
    segment_BT, position_BT = batch['segments'], batch['positions']
    same_BTS = (segment_BT[:, :, None] == segment_BT[:, None]) & (segment_BT > 0)[:, :, None]
    is_vector_BTS = same_BTS & (position_BT == 0)[:, None]
    itself_TS = np.eye(SEQ_LEN, dtype=bool)
    assert read_BTS[is_vector_BTS].all()
    others_BTS = same_BTS & ~is_vector_BTS & ~itself_TS
    share = read_BTS[others_BTS].mean()
    assert abs(share - 0.3) < 4 * np.sqrt(0.21 / others_BTS.sum())
    assert not read_BTS[same_BTS & itself_TS & ~is_vector_BTS].any()
    no_text_BT = segment_BT == 0
    assert (read_BTS[no_text_BT] == np.broadcast_to(itself_TS, read_BTS.shape)[no_text_BT]).all()
    assert not read_BTS[~same_BTS & ~no_text_BT[:, :, None]].any()
    per_query = {tuple(row) for row in read_BTS[0][segment_BT[0] == 2]}
    assert len(per_query) > 5  # each position its own


@functools.cache
def program():
    objective = RetroMAE()

    def total(params, extra, batch, key):
        loss = objective.loss(
            layers.bind(CONFIG, params), batch, extra=extra, compute=COMPUTE, key=key
        )
        return loss.total, loss

    @jax.jit
    def both(params, extra, batch):
        """Sums and gradients, and the parts that they are of."""
        _, loss = total(params, extra, batch, None)
        grads = jax.grad(total, argnums=(0, 1), has_aux=True)(params, extra, batch, None)[0]
        model = layers.bind(CONFIG, params)
        x_BTD = objective.masked.read(model, batch, compute=COMPUTE, key=None)
        segment_BT, position_BT = batch['segments'], batch['positions']
        vector_BTD = objective.vectors(x_BTD, segment_BT, position_BT)
        mean_BTD = RetroMAE(pool='mean').vectors(x_BTD, segment_BT, position_BT)
        seen_BTS = seen(segment_BT, position_BT, jax.random.key(0), rate=0.5)
        y_BTD = retromae.bound(CONFIG, extra['decoder'])(
            *(model, vector_BTD, batch['targets']),
            position_BT=position_BT,
            segment_BT=segment_BT,
            seen_BTS=seen_BTS,
            compute=COMPUTE,
            key=None,
        )
        logits = model.logits(x_BTD), model.logits(y_BTD)
        return loss, grads, logits, (x_BTD, vector_BTD, mean_BTD), (seen_BTS, y_BTD)

    def run(batch):
        devices = make_mesh('one device')
        with jax.set_mesh(devices):
            return jax.device_get(both(*parameters(), place(batch, devices)))

    return run


def nll(logit_BTV, target_BT):
    log_p = logit_BTV - np.log(np.exp(logit_BTV.astype(np.float64)).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, target_BT[..., None], -1)[..., 0]


@pytest.mark.slow
def test_loss_is_the_sum_of_two_means():
    batch = make_batch()
    loss, grads, (encoder_BTV, decoder_BTV), vectors, _ = program()(batch)
    masked_BT = batch['weights'] > 0
    written_BT = (batch['segments'] > 0) & (batch['positions'] > 0)
    assert written_BT.sum() == 26 and loss.weight == 26
    assert RetroMAE().loss_tokens(batch) == 26 + masked_BT.sum()
    want = nll(encoder_BTV, batch['targets'])[masked_BT].mean()
    want += nll(decoder_BTV, batch['targets'])[written_BT].mean()
    np.testing.assert_allclose(loss.total / loss.weight, want, rtol=1e-5)
    parts = (loss.metrics[f'{name}_nll'] for name in ('encoder', 'decoder'))
    np.testing.assert_allclose(sum(parts), loss.total, rtol=1e-6)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(grads))
    x_BTD, first_BTD, mean_BTD = vectors
    for row, segment in ((0, 1), (1, 2)):
        here_T = batch['segments'][row] == segment
        of_text_TD = x_BTD[row][here_T]
        np.testing.assert_array_equal(first_BTD[row][here_T] - of_text_TD[0], 0)
        np.testing.assert_allclose(mean_BTD[row][here_T] - of_text_TD.mean(0), 0, atol=1e-6)


@pytest.mark.slow
def test_a_position_is_written_from_what_it_reads_alone():
    """Another token moves the features of exactly those positions that read it; the backbone, whose
    inputs are the same, sees none of the tokens that are written."""
    batch = make_batch()
    *_, (x_BTD, _, _), (seen_BTS, y_BTD) = program()(batch)
    for at in (3, 10):  # of either text of the row
        changed = batch['targets'].copy()
        changed[0, at] = (changed[0, at] + 1) % (VOCAB - 2)
        *_, (other_x_BTD, _, _), (_, other_y_BTD) = program()({**batch, 'targets': changed})
        np.testing.assert_array_equal(x_BTD, other_x_BTD)
        moved_T = (y_BTD[0] != other_y_BTD[0]).any(-1)
        assert moved_T.tolist() == seen_BTS[0, :, at].tolist() and moved_T.any()
        assert not moved_T[at]


def test_settings_that_cannot_be_are_refused():
    for settings in ({'rate': 0.0}, {'rate': 1.0}, {'decoder_rate': 0.0}, {'decoder_rate': 1.1}):
        with pytest.raises(UserError, match='rate'):
            RetroMAE(**settings)
    assert not RetroMAE().causal and not RetroMAE().accumulates and RetroMAE().marks
