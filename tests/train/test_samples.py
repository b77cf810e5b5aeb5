"""What is written during a run in answer to held-out records."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import mesh as meshes
from llama_jax.data.config import DataConfig, Source
from llama_jax.data.pieces import Encoded
from llama_jax.errors import UserError
from llama_jax.generate.generator import Generator
from llama_jax.mesh import MeshConfig
from llama_jax.model import layers
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.classify import Classification
from llama_jax.objectives.instruct import InstructionTuning
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.text.chat import FORMATS, Conversation
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.tokenizer import TokenizerConfig
from llama_jax.train.experiment import EvaluationConfig, with_tokenizer
from llama_jax.train.sample import _prompt, asked_of, sampler
from llama_jax.train.step import initial_state
from llama_jax.train.validate import Validation
from tests.train.conftest import changed, one_device


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(meshes, 'make', one_device)


@pytest.fixture
def begun(short, tmp_path):
    """An experiment on records, of which 6 are answered."""
    rows = [
        {'text': f'say {i} {i}', 'label': 'ab'[i % 2], 'source': f'Say {i}:', 'target': f'{i}!'}
        for i in range(60)
    ]
    sets = []
    for name, part in (('train', rows[:30]), ('test', rows[30:])):
        path = tmp_path / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in part), 'utf-8')
        sets.append(Source('text_files', files=(str(path),), split='all'))
    return replace(
        short,
        data=DataConfig(
            sources=(sets[0],),
            validation=(sets[1],),
            tokenizer=TokenizerConfig(vocab=512),
        ),
        evaluation=EvaluationConfig(every=4, examples=6, sample_tokens=5),
    )


BYTES = bytes_tokenizer()


def encoded(*parts):
    """Of pairs (text, weights of its bytes)."""
    return Encoded(
        tuple(np.array(BYTES.encode(text), np.int32) for text, _ in parts),
        tuple(np.array(weights, np.float32) for _, weights in parts),
    )


@pytest.mark.parametrize(
    'record, prompt, answer',
    [
        (encoded(('hellothere', [0, 0, 1, 1, 0, 0, 0, 1, 1, 1])), 'helloth', 'ere'),
        (encoded(('hello', [0, 0, 0, 1, 0.5])), 'hel', 'lo'),
        (encoded(('ask', [0, 0, 0]), ('\nme', [0, 1, 1])), 'ask\n', 'me'),
        (encoded(('hi', [0, 0])), 'hi', None),
        (encoded(('ask', [0, 1, 0]), ('asd', [0, 0, 1])), 'a', 's'),
    ],
)
def test_an_answer_is_the_last_learnt_run(record, prompt, answer):
    found = asked_of(record, BYTES, reads=False)
    assert (found.prompt, found.reference) == (prompt, answer)
    assert BYTES.decode(found.tokens) == prompt and found.source is None


def ready(experiment):
    """What samples, what it needs, and a state; the training step is not compiled."""
    devices = meshes.make(MeshConfig())
    experiment, tokenizer = with_tokenizer(experiment)
    validation = Validation(experiment, tokenizer, devices)
    held_out = functools.partial(validation.open, 0)
    sample = sampler(experiment, tokenizer, devices, held_out=held_out)
    tx = optax.identity()
    state = initial_state(experiment.model, experiment.objective, tx, seed=0, mesh=devices)
    return experiment, tokenizer, devices, sample, state


@pytest.mark.slow
def test_records_are_answered_by_the_greedy_text_of_the_model(begun):
    experiment, tokenizer, devices, sample, state = ready(
        replace(begun, objective=SequenceToSequence(between=' '))
    )
    found = list(sample(state))
    generator = Generator(
        experiment.model,
        state.params,
        mesh=devices,
        compute=experiment.compute,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    assert len(found) == 6
    for one in found:
        number = one.reference.removesuffix('!')
        assert one.prompt == f'<s>Say {number}: ' and 30 <= int(number) < 60
        ids = [tokenizer.bos_id, *tokenizer.encode(f'Say {number}:')]
        ids += [*tokenizer.encode(' ', continues=True)]
        (completion,) = generator([ids], max_tokens=5)
        assert one.text == tokenizer.decode(completion.tokens)


@pytest.mark.slow
def test_texts_get_the_label_that_the_head_gives_them(begun):
    experiment, tokenizer, devices, sample, state = ready(
        replace(begun, objective=Classification(labels=('a', 'b')))
    )
    backbone = {name: x for name, x in state.params.items() if name != 'objective'}
    model, head_DC = layers.bind(experiment.model, backbone), state.params['objective']['head_DC']
    with jax.set_mesh(devices):
        found = list(sample(state))
        assert len(found) == 6
        for one in found:
            number = int(one.prompt.split()[1])
            assert one.prompt == f'say {number} {number}' and one.reference == 'ab'[number % 2]
            ids = [tokenizer.bos_id, *tokenizer.encode(one.prompt), tokenizer.eos_id]
            x_BTD, _ = model.features(jnp.array([ids]), compute=experiment.compute)
            assert one.text == 'ab'[int(jnp.argmax(x_BTD[0, -1] @ head_DC))]


def test_what_cannot_be_answered_is_refused(begun):
    with pytest.raises(UserError, match='--evaluation.examples 6 has no effect with CausalLM'):
        ready(replace(begun, objective=CausalLM()))
    long = changed(begun, 'evaluation', sample_tokens=60)
    with pytest.raises(UserError, match='no held-out record leaves room for .*sample-tokens 60'):
        ready(replace(long, objective=SequenceToSequence()))


def test_prompts_are_asked_as_the_objective_reads(begun):
    """In a chat as a user; else as text; by the encoder where there is one."""
    chat, bos = FORMATS['llama2'], BYTES.bos_id
    ids = BYTES.encode('Hi').tolist()
    talking = replace(begun, objective=InstructionTuning())
    asked = chat.encode(Conversation([{'role': 'user', 'content': 'Hi'}]), BYTES, begin=[bos])
    assert _prompt(talking, 'Hi', BYTES, chat)[1:3] == (asked, None)
    assert _prompt(talking, 'Hi', BYTES, None)[1:3] == ([bos, *ids], None)
    assert _prompt(begun, 'Hi', BYTES, chat)[1:3] == ([bos, *ids], None)
    both = changed(begun, 'model', encoder_layers=1)
    assert _prompt(both, 'Hi', BYTES, None)[1:3] == ([bos], ids)
    assert _prompt(both, '', BYTES, None)[1:3] == ([bos], [bos])
