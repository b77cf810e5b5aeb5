"""Mistakes of whoever writes an objective for the first time are told by name."""

import types
from dataclasses import dataclass

import jax.numpy as jnp
import pytest

from llama_jax.errors import UserError
from llama_jax.objectives import REGISTRY, contract, of_text
from llama_jax.objectives.base import Base, Loss
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.weighted import Weighted

GOOD = """
def sizes(self, n, *, seq_len, draw): ...
def example(self, piece, *, tokenizer, seq_len, rng): ...
def loss(self, model, batch, *, extra, compute, key, context=None): ...
def loss_tokens(self, batch): ...
def flops(self, model, seq_len): ...
"""


def made(source, *, base=Base, frozen=True):
    body: dict = {}
    exec(source, body)
    del body['__builtins__']
    cls = types.new_class('Mine', (base,), exec_body=lambda space: space.update(body))
    return dataclass(frozen=frozen)(cls) if frozen else cls


def check(source=GOOD, **settings):
    contract.check(made(source, **settings)())


def test_what_keeps_the_contract_is_taken():
    check()
    check(GOOD.replace(', rng)', ', **rest)'))  # as many as come
    check(GOOD.replace('seq_len)', 'seq_len, more=1)'))
    check(GOOD + 'def _exmaple(self): ...\ndef helper(self): ...')
    check('', base=CausalLM)
    contract.check(Weighted((CausalLM(), made(GOOD)()), (1.0, 1.0), (0.5, 0.5)))


@pytest.mark.parametrize('name', REGISTRY)
def test_every_objective_of_the_project_keeps_it(name):
    contract._check_class(REGISTRY[name])
    if name in of_text():
        contract._check_needed(of_text()[name])


@pytest.mark.parametrize(
    ('before', 'after', 'words'),
    [
        ('def example', 'def exmaple', r'Mine has no example \(there is exmaple\)'),
        ('def sizes', 'def size', r'Mine has no sizes \(there is size\)'),
        ('def sizes(self, n, *, seq_len, draw): ...', '', 'Mine has no sizes'),
        ('def flops(self, model, seq_len): ...', '', 'Mine has no flops'),
        ('def loss_tokens(self, batch): ...', '', 'Mine has no loss_tokens'),
        (', context=None', '', r'Mine.loss takes .*key\), and is called with .*context=...\)'),
        ('context=None', 'context', None),  # it is always given
        ('def sizes', 'rollout = None\ndef sizes', None),
        (
            '(self, model, seq_len)',
            '(self, config, length)',
            'Mine.flops takes .*mend model, seq_l',
        ),
        ('seq_len, rng)', 'seq_len, rng, more)', 'Mine.example .*: mend more'),
        ('n, *, seq_len', 'n, seq_len', 'Mine.sizes takes .*: mend seq_len, draw'),
        ('def sizes', 'causal = property(len)\ndef sizes', None),
        ('def sizes', 'def accumulates(self): ...\ndef sizes', 'accumulates is a method, .*prop'),
    ],
)
def test_what_does_not_is_named(before, after, words):
    assert before in GOOD
    if words is None:
        return check(GOOD.replace(before, after))
    with pytest.raises(UserError, match=words):
        check(GOOD.replace(before, after))


@pytest.mark.parametrize(
    ('more', 'said'),
    [
        ('def carryy(self): ...', 'Mine has carryy, which nobody calls: was carry meant?'),
        ('casual = property(len)', 'Mine has casual, which nobody calls: was causal meant?'),
        ('def encode(self): ...', ''),  # others of the project have it for themselves
        ('def helper(self): ...', ''),
    ],
)
def test_a_member_that_nobody_calls_is_told(caplog, more, said):
    check(GOOD + more)
    assert caplog.text.count('\n') == bool(said) and said in caplog.text
    caplog.clear()
    check('', base=made(GOOD + more))  # that of a base is its own affair
    assert not caplog.text


def test_a_part_of_a_sum_is_looked_at():
    part = made(GOOD.replace('(self, model, seq_len)', '(self, config, length)'))()
    whole = CausalLM()
    object.__setattr__(whole, 'z_loss', (part,))
    with pytest.raises(UserError, match='Mine.flops'):
        contract.check(whole)


def test_kinds_of_classes():
    with pytest.raises(UserError, match='Mine is no frozen dataclass'):
        check(GOOD + '__annotations__ = {"rate": float}\nrate = 0.1', frozen=False)
    check(GOOD, frozen=False)  # it adds no field to those of its base
    check('def loss(self, *args, **how): ...', base=CausalLM)
    with pytest.raises(UserError, match='Mine has no example'):
        check('')
    with pytest.raises(UserError, match='the objective is the class CausalLM'):
        contract.check(CausalLM)

    @dataclass(frozen=True)
    class Inside(CausalLM):
        pass

    with pytest.raises(UserError, match='Inside is defined inside a function'):
        contract.check(Inside())


@pytest.mark.parametrize(
    ('loss', 'words'),
    [
        (jnp.ones(()), 'CausalLM.loss returns .*: return Loss'),
        (None, 'CausalLM.loss returns NoneType'),
        (Loss(jnp.ones(3), jnp.ones(()), {}), r'returns total of shape \[3\]'),
        (Loss(jnp.ones(()), jnp.ones(2), {}), r'returns weight of shape \[2\]'),
    ],
)
def test_a_loss_is_a_sum(loss, words):
    with pytest.raises(UserError, match=words):
        contract.checked(loss, CausalLM())
    good = Loss(jnp.ones(()), 1.0, {'a': jnp.ones(())})
    assert contract.checked(good, CausalLM()) is good
