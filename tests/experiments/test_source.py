"""Encoder-decoders in the scripts: what the encoder reads, from the command line and in samples."""

import types

import jax
import pytest

from experiments import generate, models
from llama_jax.errors import UserError
from llama_jax.mesh import MeshConfig, make
from llama_jax.model import layers
from llama_jax.objectives.spans import SpanCorruption
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from llama_jax.text.vocabulary import TooLongError
from llama_jax.train import sample
from llama_jax.train.experiment import EvaluationConfig
from tests.train.every import BOTH, DECODER

TOKENIZER = bytes_tokenizer()


@pytest.fixture
def ask(monkeypatch, capsys):
    """The script on a random model; what it prints."""

    def ask(config, *arguments):
        mesh = make(MeshConfig(), jax.devices()[:1])
        model = models.Pretrained(
            'random',
            config,
            layers.create(config, jax.random.key(0), mesh),
            TOKENIZER,
            begin=(TOKENIZER.bos_id,),
            chat=None,
            end_ids=TOKENIZER.end_ids,
        )
        monkeypatch.setattr(models, 'load', lambda *args, **options: model)
        monkeypatch.setattr('llama_jax.mesh.make', lambda config: mesh)
        monkeypatch.setattr('sys.argv', ['generate', *arguments, '--max-tokens', '9'])
        generate.main()
        return capsys.readouterr().out

    return ask


@pytest.mark.slow
def test_a_source_changes_what_is_written(ask):
    written = {ask(BOTH, '--source', text, '--temperature', '0') for text in ('a<mask>', 'bcd')}
    assert len(written) == 2
    assert ask(BOTH, '--source', 'a', '--prompt', 'def ').startswith('def ')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'arguments', 'message'),
    [
        (BOTH, ('--prompt', 'a'), r'sources is missing.*--source'),
        (DECODER, ('--source', 'a'), 'this model has no encoder'),
        (BOTH, ('--source', 'a', '--chat', 'b'), 'does not chat'),
        (BOTH, ('--source', ''), 'source 0 is empty'),
    ],
)
def test_bad_sources_are_named(ask, config, arguments, message):
    with pytest.raises(UserError, match=message):
        ask(config, *arguments)


def test_names_of_control_tokens_in_a_source():
    model = models.Pretrained('x', BOTH, {}, TOKENIZER, (), None, ())
    mask, last = TOKENIZER.mask_id, TOKENIZER.control['<sentinel_12>']
    assert model.source('你<mask>b<sentinel_12>') == [
        *TOKENIZER.encode('你'),
        mask,
        *TOKENIZER.encode('b'),
        last,
    ]
    assert model.source('<mask') == TOKENIZER.encode('<mask').tolist()
    assert len(model.source('<mask>a<mask>', most=1)) == 3, 'the caller counts the names'
    with pytest.raises(TooLongError):
        model.source('a<mask>你好' * 2000, most=8)


@pytest.mark.slow
def test_samples_of_a_training():
    mesh = make(MeshConfig(), jax.devices()[:1])
    experiment = types.SimpleNamespace(
        model=BOTH,
        compute=generate.Compute(),
        evaluation=EvaluationConfig(prompts=('a', ''), sample_tokens=8, every=1),
        objective=SpanCorruption(encoder=True),
    )
    params = layers.create(BOTH, jax.random.key(0), mesh)
    run = sample.sampler(experiment, TOKENIZER, mesh)
    assert [one.prompt for one in run(types.SimpleNamespace(evaluated=params))] == ['a', '']
