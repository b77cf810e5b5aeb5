"""A schedule of objectives against its parts."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llama_jax import layout
from llama_jax.data import pieces
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.objectives.base import Base, Context, Loss
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.contrastive import InfoNCE
from llama_jax.objectives.distill import Distillation
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.latent import LatentPrediction
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.multi_token import MultiToken
from llama_jax.objectives.switch import Switch
from llama_jax.objectives.weighted import Weighted
from tests.objectives.test_weighted import (
    COMPUTE,
    CONFIG,
    KEY,
    SEQ_LEN,
    TOKENIZER,
    documents,
    make_mesh,
    pack,
)

CONTRAST = InfoNCE(bidirectional=False, learned=True)
OBJECTIVE = Switch((CONTRAST, CausalLM()), begins=(0, 3))


@pytest.mark.slow
def test_each_step_has_the_loss_and_the_gradient_of_its_part():
    devices = make_mesh(1)
    batch = pack(OBJECTIVE, documents(6), rows=8)

    def total(params, extra, batch, step):
        model = layers.bind(CONFIG, params)
        context = Context(step=step)
        loss = OBJECTIVE.loss(model, batch, extra=extra, compute=COMPUTE, key=KEY, context=context)
        alone = [
            part.loss(
                model,
                OBJECTIVE._batch(k, batch),
                extra=extra.get(str(k), {}),
                compute=COMPUTE,
                key=KEY,
            )
            for k, part in enumerate(OBJECTIVE.parts)
        ]
        validated = OBJECTIVE.loss(model, batch, extra=extra, compute=COMPUTE, key=KEY)
        return loss.total, (loss, alone, validated)

    with jax.set_mesh(devices):
        params = layers.create(CONFIG, jax.random.key(0), devices)
        extra = OBJECTIVE.extra(CONFIG, jax.random.key(1))
        assert [*extra] == ['0']
        run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        batch = jax.device_put(batch, NamedSharding(devices, layout.rows()))
        dhead = {}
        for step, k in ((0, 0), (2, 0), (3, 1), (900, 1)):
            (dparams, dextra), found = run(params, extra, batch, jnp.int32(step))
            loss, alone, validated = jax.device_get(found)
            np.testing.assert_allclose(loss.total, alone[k].total, rtol=1e-6)
            assert loss.weight == alone[k].weight and alone[0].weight != alone[1].weight
            assert (float(dextra['0']['log_temperature']) != 0) == (k == 0)
            np.testing.assert_allclose(loss.metrics['accuracy'], alone[k].metrics['accuracy'])
            assert loss.metrics.keys() == {'accuracy'}  # which all of them have
            dhead[k] = np.asarray(dparams['embed_VD'])
            np.testing.assert_allclose(validated.total, alone[1].total, rtol=1e-6)
    assert np.abs(dhead[0] - dhead[1]).max() > 1e-3


def test_every_part_makes_an_example_of_the_same_text_and_the_last_has_plain_names():
    objective = Switch((CausalLM(), MaskedLM()), begins=(0, 5))
    assert objective.lengths(SEQ_LEN) == {'0': SEQ_LEN, '': SEQ_LEN}
    text = np.arange(100) % 60
    rng = np.random.default_rng(0)
    examples = pieces.examples(objective, text, tokenizer=TOKENIZER, seq_len=SEQ_LEN, rng=rng)
    causal = [x for example in examples for x in example['0/targets']]
    masked = [x for example in examples for x in example['targets'][1:]]
    assert causal == [*text, TOKENIZER.eos_id] and masked == text.tolist()
    assert objective.reading.middle.kind == 'pseudo' and not objective.causal
    assert not objective.has_likelihood and objective.ends and objective.accumulates
    assert not OBJECTIVE.accumulates and OBJECTIVE.has_likelihood
    both = [part.flops(CONFIG, 64) for part in objective.parts]
    assert objective.flops(CONFIG, 64) == sum(both) / 2
    batch = pack(objective, [text], rows=2)
    assert objective.loss_tokens(batch) == np.count_nonzero(batch['weights'])


def test_a_run_is_long_enough_for_every_part():
    Switch((CausalLM(), MaskedLM()), (0, 9)).check_steps(10)
    heads = MultiToken(heads=4, curriculum='forward', curriculum_steps=40)
    Switch((CausalLM(), heads), (0, 30)).check_steps(70)


def test_flops_are_those_of_each_part_by_its_steps():
    heads = MultiToken(heads=4, curriculum='forward', curriculum_steps=40)
    one, other = CausalLM().flops(CONFIG, 32), heads.flops(CONFIG, 32)
    switch = Switch((CausalLM(), heads), (0, 30))
    assert switch.flops_of_run(CONFIG, 32, 40) == pytest.approx(0.75 * one + 0.25 * other)
    assert switch.flops(CONFIG, 32) == pytest.approx((one + other) / 2)
    half = switch.stretched(0.5)
    assert half.begins == (0, 15) and half.parts[1].curriculum_steps == 20
    assert half.flops_of_run(CONFIG, 32, 20) == pytest.approx(switch.flops_of_run(CONFIG, 32, 40))
    assert switch.stretched(0.001).begins == (0, 1)


@dataclass(frozen=True)
class Told(Base):
    """Its loss is the step that it is told, and a number of its own."""

    own: float = 0.0

    def loss(self, model, batch, *, context, **how):
        return Loss(context.step + self.own, jnp.float32(1), {})


def test_a_curriculum_of_a_part_counts_from_where_the_part_begins():
    switch = Switch((Told(0.25), Told(0.5)), (0, 3))
    how = {'extra': {}, 'compute': COMPUTE, 'key': None}
    told = [switch.loss(None, {}, **how, context=Context(jnp.int32(step))) for step in range(5)]
    assert [float(loss.total) for loss in told] == [0.25, 1.25, 2.25, 0.5, 1.5]


def test_schedules_that_cannot_be_are_refused():
    two = (CausalLM(), MaskedLM())
    shared = Weighted((CausalLM(), InfoNCE(views='shared'))).parts[1]
    for refused, match in (
        (lambda: Switch((CausalLM(),)), 'of one objective'),
        (lambda: Switch(two, (0,)), 'begins 0: give the step'),
        (lambda: Switch(two, (1, 5)), '0 first'),
        (lambda: Switch(two, (0, 5, 9)), 'each of 2 parts'),
        (lambda: Switch(two, (0, 0)), 'later than the one before'),
        (lambda: Switch((*two, InstructionTuning()), (0, 1, 2)), 'InstructionTuning is no part'),
        (lambda: Switch((CausalLM(), shared), (0, 1)), 'InfoNCE is no part of a schedule'),
        (lambda: Switch(two).check(CONFIG), 'set --objective.begins 0'),
        (lambda: Switch(two, (0, 9)).check_steps(9), 'MaskedLM begins at step 9, .* has 9'),
        (
            lambda: Switch(
                (CausalLM(), MultiToken(heads=4, curriculum='forward', curriculum_steps=40)),
                (0, 50),
            ).check_steps(70),
            'has 20',
        ),
        (lambda: Weighted((CausalLM(), Distillation('a'))), 'Distillation is no part of a sum'),
        (lambda: Switch((CausalLM(), OBJECTIVE), (0, 1)), 'Switch within a schedule'),
        (lambda: Weighted((CausalLM(), OBJECTIVE)), 'Switch within a sum'),
        (
            lambda: Switch((LatentPrediction(), MaskedLM()), (0, 1)).carried(CONFIG, {}, KEY),
            'LatentPrediction carries',
        ),
        (
            lambda: Switch(two, (0, 5)).check(replace(CONFIG, encoder_layers=1)),
            'encoder',
        ),
    ):
        with pytest.raises(UserError, match=match) as error:
            refused()
        assert '\n' not in str(error.value)
