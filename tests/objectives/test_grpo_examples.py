"""GRPO on the host: records to prompts, completions to examples, and the settings it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from llama_jax.data import packing
from llama_jax.data.pieces import Piece
from llama_jax.data.record import Problem
from llama_jax.errors import UserError
from llama_jax.objectives.grpo import GRPO
from llama_jax.objectives.rollout import Drawn, Rollout, prompts_of
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.objectives.test_grpo import END, MODEL, MOST, PAD, ROLLOUT


def test_the_end_token_is_learnt_where_it_is_the_padding():
    one = Drawn(np.array([5, PAD], np.int32), np.array([6, END], np.int32), np.zeros(2), False)
    (group,), _ = GRPO(ROLLOUT).completed([[one, one]], np.array([[1.0, 0.0]]))
    assert group[0]['inputs'].tolist() == [5, PAD, 6]
    assert group[0]['targets'].tolist() == [PAD, 6, END]
    assert group[0]['weights'].tolist() == [0, 1, 1]


def test_a_prompt_goes_to_its_rollout_with_its_origin():
    objective, tokenizer = GRPO(ROLLOUT), bytes_tokenizer()
    problem = Problem('1+1=', '2')
    encoded = objective.encoded(problem, vocabulary=tokenizer, chat=None)
    ids = [tokenizer.bos_id, *tokenizer.encode('1+1=').tolist()]
    assert encoded.parts[0].tolist() == ids
    (size,) = objective.whole((len(ids),), seq_len=64)
    assert size == len(ids) + MOST
    made = [
        objective.example(
            Piece(encoded.parts[0], 0, len(ids), 0.5, (n,), 0, encoded, origin=(2, 1, number)),
            tokenizer=tokenizer,
            seq_len=64,
            rng=np.random.default_rng(0),
        )
        for number, n in ((7, size), (8, size - 2))  # of the second no room for its beginning
    ]
    arrays = packing.layout_of(made[0], pad_id=tokenizer.pad_id)
    batch = packing.empty_rows(arrays, rows=1, lengths={'': 64})
    packing.lay(batch, 0, made, lengths={'': 64})
    (whole, origin), (cut, other) = prompts_of(batch, 0)
    assert whole.tolist() == ids and origin == (2, 1, 7)
    assert cut.tolist() == ids[2:] and other == (2, 1, 8)
    short = Piece(encoded.parts[0], 0, len(ids), 0.5, (MOST,), 0, encoded)
    assert objective.example(short, tokenizer=tokenizer, seq_len=64, rng=None) is None


def test_a_chat_needs_a_format():
    problem = Problem(({'role': 'user', 'content': 'hi'},), '')
    with pytest.raises(UserError, match='--data.chat'):
        GRPO().encoded(problem, vocabulary=bytes_tokenizer(), chat=None)


@pytest.mark.parametrize(
    ('make', 'match'),
    [
        (lambda: Rollout(completions=1), '2 or more'),
        (lambda: Rollout(max_tokens=0), '1 or more'),
        (lambda: Rollout(temperature=0.0), 'above 0'),
        (lambda: Rollout(rewards=()), 'name a reward'),
        (lambda: Rollout(rewards=('answer', 'answer')), 'twice'),
        (lambda: Rollout(weights=(1.0, 2.0)), '2 rollout.weights for 1'),
        (lambda: GRPO(updates=0), '1 or more'),
        (lambda: GRPO(eps_high=0.3), 'no effect on a single update'),
        (lambda: GRPO(updates=2, eps_low=0.0), r'\(0, 1\]'),
        (lambda: GRPO(beta=-1.0), '0 or more'),
        (lambda: GRPO(overlong=200), 'a part of the 128'),
        (lambda: GRPO().check(replace(MODEL, dropout=0.1)), '--model.dropout 0'),
        (lambda: GRPO().check(replace(MODEL, encoder_layers=1)), '--model.encoder-layers 0'),
    ],
)
def test_settings_that_cannot_be(make, match):
    with pytest.raises(UserError, match=match):
        make()
