"""Heads of a model draft: what they expect after the whole text, and the text as it is without."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.generate import programs as programs_lib
from llama_jax.generate.generator import Generator
from llama_jax.generate.speculative.draft import Heads
from llama_jax.generate.speculative.loop import draw_some
from llama_jax.model import heads, layers
from llama_jax.model.layers import HEADS
from tests.generate.drafting import CONTROLS, check_equal, repeating
from tests.generate.tiny import COMPUTE, CONFIG, mesh_of, prompt_of, weights

N = 30


@functools.cache
def beside(n=2):
    """Heads of tokens two and three places ahead, and on: some of their drafts hold."""
    drawn = heads.create(CONFIG, 1 + n, jax.random.key(5))
    return jax.tree.map(lambda x: np.asarray(x) * (0.3 if x.ndim > 1 else 1), drawn)


@functools.cache
def generator(cpu=True, **axes):
    """`cpu`: what programs.is_cpu says where it is made."""
    return Generator(
        CONFIG,
        {**repeating(), HEADS: beside()},
        mesh=mesh_of(2 if axes else 1, **axes),
        compute=COMPUTE,
        eos_ids=(3,),
        pad_id=0,
        prefill_chunk=16,
    )


@functools.cache
def forward():
    def likeliest(params, token_BT):
        logits_BTV, _ = layers.bind(CONFIG, params)(token_BT, compute=COMPUTE)
        return logits_BTV.argmax(-1)

    return jax.jit(likeliest)


def expected(text, params=None, beside_=None):
    """Oracle: the likeliest tokens after each place by the model, and by plain models that have a
    head for their last layer [1 + n, T]."""

    def model(block):
        blocks = jax.tree.map(lambda x, y: np.stack([*x[:-1], y]), params['blocks'], block)
        return {**params, 'blocks': blocks}

    params, beside_ = params or repeating(), beside_ or beside()
    variants = [params, *(model(beside_[j]) for j in sorted(beside_))]
    token_BT = np.zeros((1, 64), np.int32)
    token_BT[0, : len(text)] = text
    with jax.set_mesh(mesh_of()):
        return [np.asarray(forward()(params, token_BT))[0, : len(text)] for params in variants]


def counted(text, start, said):
    """Oracle: steps and accepted drafts where `text` is written from place `start` on, the first
    token apart, and heads say this after each place."""
    steps = accepted = 0
    at, draft = start, []
    while at < len(text) - 1:
        n = 0
        while n < len(draft) and at + 1 + n < len(text) and draft[n] == text[at + 1 + n]:
            n += 1
        new = min(n + 1, len(text) - 1 - at)
        steps, accepted = steps + 1, accepted + min(n, new)
        draft = [one[at + new - 1] for one in said[1:]]
        at += new
    return steps, accepted


@pytest.mark.slow
@pytest.mark.parametrize('cpu', [True, False])
def test_drafts_are_those_of_the_whole_text_and_greedy_text_stays(monkeypatch, cpu):
    """In columns, and as on an accelerator."""
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: cpu)
    prompts = [prompt_of(17), prompt_of(20)]
    done = generator(cpu)(prompts, max_tokens=N, ignore_end=True, speculate=Heads(2))
    for prompt, one in zip(prompts, done, strict=True):
        text = [*prompt, *one.tokens]
        said = expected(text)
        np.testing.assert_array_equal(said[0][len(prompt) - 1 : -1], one.tokens)
        steps, accepted = counted(text, len(prompt), said)
        assert (one.speculation.steps, one.speculation.accepted) == (steps, accepted)
        assert 0 < accepted < 2 * steps, 'some hold and some do not'
    if cpu:  # drawn text is the very same too
        drawn = {'max_tokens': N, 'temperature': 0.7, 'seed': 3}
        one, other = (
            generator()(prompts, **drawn),
            generator()(prompts, speculate=Heads(2), **drawn),
        )
        assert [x.tokens for x in one] == [x.tokens for x in other]
        assert sum(x.speculation.accepted for x in other) > 0


@pytest.mark.slow
@pytest.mark.parametrize('cpu', [True, False])
def test_what_heads_expect_after_some_steps(monkeypatch, cpu):
    """Of heads that say other things than the model, and than each other."""
    monkeypatch.setattr(programs_lib, 'is_cpu', lambda mesh: cpu)
    strong = jax.tree.map(lambda x: x * (10 if x.ndim > 1 else 1), beside())
    params = {**weights(), HEADS: strong}
    sizes = {'eos_ids': (), 'pad_id': 0, 'prefill_chunk': 16}
    ours = Generator(CONFIG, params, mesh=mesh_of(), compute=COMPUTE, **sizes)
    controls, shape = ours._checked([prompt_of(20)], {'max_tokens': 16})
    programs, how = ours.programs, Heads(2)
    with jax.set_mesh(programs.mesh):
        state, _, rows, _ = ours._read([prompt_of(20)], controls, shape)
        text_BS = np.zeros((1, 64), np.int32)
        text_BS[0, :21] = [*prompt_of(20), int(state.token_B[0])]
        nothing = programs.place(np.full((1, 2), -1, np.int32))
        state = dataclasses.replace(state, text_BS=programs.place(text_BS), draft_BK=nothing)
        step = jax.jit(functools.partial(draw_some, programs.model, how, slots=12, n_top=None))
        different = []
        for _ in range(12):
            state, _, counts = step(programs.params, state, rows, np.int32(1), np.bool_(True))
            assert counts.step_B[0] == 1
            at = int(state.position_B[0])
            text = np.asarray(state.text_BS)[0, : at + 1].tolist()
            said = [one[at - 1] for one in expected(text, weights(), strong)]
            assert said[0] == text[at]
            np.testing.assert_array_equal(state.draft_BK[0], said[1:])
            different.append(len({*said, text[at - 1]}))
    assert max(different) == 4


@pytest.mark.slow
def test_drawn_rows_under_all_controls():
    check_equal(generator(), Heads(2), **CONTROLS['all'])


def test_fewer_heads_than_there_are_and_more():
    ours = generator()
    assert ours.programs.heads == 2
    with pytest.raises(UserError, match='3 heads are to draft, and the model has 2'):
        ours([[1]], max_tokens=3, speculate=Heads(3))


@pytest.mark.slow
def test_several_devices():
    check_equal(generator(tensor=2), Heads(1), **CONTROLS['drawn'])
