"""Drafting changes how often the model runs, and nothing else."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.generator import Generator
from llama_jax.generate.quantized import Quantization
from llama_jax.generate.speculative.draft import Draft, Lookup
from llama_jax.model import layers
from llama_jax.model.patterns import Window
from tests.generate.drafting import (
    CONTROLS,
    PROMPTS,
    SMALL,
    N,
    by_small_model,
    check_equal,
    generator,
)
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, tokens_of


@pytest.mark.slow
def test_a_small_model_leaves_greedy_rows_as_they_are():
    for settings in ({}, {**CONTROLS['all'], 'temperature': 0.0}):
        check_equal(generator(), by_small_model(), **settings)


@pytest.mark.slow
def test_drafts_of_the_model_itself_are_accepted():
    ours = generator(loops=False)
    how = Draft(ours.programs, n_draft=3)
    assert check_equal(ours, how) > 3.5
    drawn = ours(PROMPTS, max_tokens=N, temperature=1.0, seed=range(5), speculate=how)
    for one in drawn:
        assert one.speculation.acceptance > 0.98, 'but for rounding'


@pytest.mark.slow
def test_several_devices_an_accelerators_step_and_int8(monkeypatch):
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: False)
    axes = (('data', 2), ('tensor', 2))
    ours = generator(quantization=Quantization(cache='int8'), axes=axes, n=8)
    assert check_equal(ours, Lookup(n_draft=5), **CONTROLS['drawn']) > 1.2
    small = generator(config=SMALL, small=True, axes=axes, n=8)
    check_equal(ours, Draft(small.programs, n_draft=3))


@pytest.mark.slow
def test_a_ring():
    """Under a window drafts go round with the tokens, and take the place of none in sight."""
    ours = generator(config=replace(CONFIG, pattern=Window(6)))
    assert ours.shape(5, 30, N + 15).slots == 32
    for n_draft in (5, 15):
        assert check_equal(ours, Lookup(n_draft=n_draft)) > 1.5


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Lookup(n_draft=0), 'n_draft 0: draft 1 to 15'),
        (lambda: Lookup(n_draft=16), 'n_draft 16'),
        (lambda: Lookup(n_gram=2, least=3), 'lookup of 3 to 2'),
        (lambda: Lookup(n_gram=16), 'lookup of 1 to 16 tokens'),
        (
            lambda: generator()(PROMPTS[:1], max_tokens=3, speculate=Lookup),
            'give a Lookup, Heads or a Draft',
        ),
        (lambda: Draft(generator().programs, n_draft=16), 'n_draft 16'),
        (
            lambda: generator(config=SMALL, small=True, axes=(('data', 2),), n=2)(
                PROMPTS[:1], max_tokens=3, speculate=by_small_model()
            ),
            'same mesh',
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_another_vocabulary_is_refused():
    other = replace(CONFIG, vocab=64)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), layers.abstract(other))
    theirs = Generator(
        other, params, mesh=mesh_of(), compute=COMPUTE, eos_ids=(), pad_id=0
    ).programs
    with pytest.raises(UserError, match='vocabulary of 64, the large one of 96'):
        generator()(PROMPTS[:1], max_tokens=3, speculate=Draft(theirs))


@pytest.mark.slow
def test_a_text_longer_than_the_small_models_context_is_refused():
    short = generator(config=replace(SMALL, context=16), small=True).programs
    ours, how = generator(), Draft(short, n_draft=2)
    assert ours([[1] * 8], max_tokens=8, speculate=how)[0].speculation.steps
    with pytest.raises(UserError, match='context of 16, and prompt and max_tokens are 17'):
        ours([[1] * 8, [1]], max_tokens=[9, 2], speculate=how)


def test_tokens_alone_say_nothing_of_drafts():
    assert tokens_of(generator()(PROMPTS[:1], max_tokens=3))
    assert generator()(PROMPTS[:1], max_tokens=3)[0].speculation is None
