"""Sequence to sequence: the target and its end are learnt, given the source."""

import dataclasses

import numpy as np
import pytest

from llama_jax.data.record import BadRecordError, Pair
from llama_jax.errors import UserError
from llama_jax.model.config import ModelConfig
from llama_jax.objectives.flops import decoder_flops, encoder_decoder_flops, prefix_flops
from llama_jax.objectives.seq2seq import SequenceToSequence
from llama_jax.text.chat import FORMATS
from llama_jax.text.sentencepiece_model import bytes_tokenizer
from tests.objectives import reading
from tests.objectives.records import batch_of, example

TOKENIZER = bytes_tokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
DECODER, ENCODER = SequenceToSequence(), SequenceToSequence(encoder=True)
PAIR = Pair('abc', 'de')


def ids(text):
    return TOKENIZER.encode(text).tolist()


def test_decoder_learns_the_target_after_the_source():
    for objective, between in (
        (DECODER, ''),
        (SequenceToSequence(between=' ->'), ' ->'),
    ):
        made = example(objective, PAIR, TOKENIZER)
        whole = [BOS, *ids('abc'), *ids(between), *ids('de'), EOS]
        assert made['inputs'].tolist() == whole[:-1] and made['targets'].tolist() == whole[1:]
        learnt = made['targets'][made['weights'] == 1].tolist()
        assert learnt == [*ids('de'), EOS] and set(made['weights'].tolist()) == {0, 1}
        assert 'prefix' not in made


def test_source_in_full_view():
    made = example(SequenceToSequence(prefix=True, between='>'), PAIR, TOKENIZER)
    assert made['prefix'].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert made['weights'].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_encoder_reads_the_source():
    made = example(ENCODER, PAIR, TOKENIZER)
    assert made['encoder/inputs'].tolist() == ids('abc')
    assert made['inputs'].tolist() == [BOS, *ids('de')]
    assert made['targets'].tolist() == [*ids('de'), EOS]
    assert made['weights'].tolist() == [1, 1, 1]
    assert ENCODER.lengths(10) == {'encoder': 5, '': 5}
    assert dataclasses.replace(ENCODER, share=0.7).lengths(10) == {'encoder': 7, '': 3}
    assert DECODER.lengths(10) == {'': 10}


def test_chat_asks_as_generation_does():
    objective = SequenceToSequence(chat=True)
    made = example(objective, PAIR, TOKENIZER, chat=FORMATS['llama2'])
    text = TOKENIZER.decode([*made['inputs'][:1], *made['targets']], show_control=True)
    assert text == '<s>[INST] abc [/INST] de </s>'
    learnt = TOKENIZER.decode(made['targets'][made['weights'] > 0], show_control=True)
    assert learnt == 'de </s>'
    prefixed = dataclasses.replace(objective, prefix=True)
    prefix = example(prefixed, PAIR, TOKENIZER, chat=FORMATS['llama2'])['prefix']
    assert prefix.tolist() == [1] * len(ids(' [INST] abc [/INST] ')) + [0] * 3
    with pytest.raises(UserError, match='no chat template'):
        objective.encoded(PAIR, vocabulary=TOKENIZER, chat=None)


def test_source_and_target_are_tokenised_apart():
    """So that a prompt has the same tokens whatever follows it."""

    class Pairs:
        bos_id, eos_id = 1, 2

        def encode(self, text, *, continues=False):
            return np.array([hash(text) % 97 + 3, 3 + continues], np.int32)

    encoded = DECODER.encoded(Pair('a', 'b'), vocabulary=Pairs(), chat=None)
    assert [len(part) for part in encoded.parts] == [3, 3]
    # The target goes on from the source, where no space is put before it; a decoder's own begins.
    assert encoded.parts[0][-1] == 3 and encoded.parts[1][1] == 4
    alone = ENCODER.encoded(Pair('a', 'b'), vocabulary=Pairs(), chat=None)
    assert alone.parts[0].tolist()[1] == 3 and alone.parts[1].tolist()[1] == 3


@pytest.mark.parametrize('objective', [DECODER, ENCODER, SequenceToSequence(chat=True)])
def test_cut_examples(objective):
    pair, chat = Pair('abcdefgh', 'xyz'), FORMATS['llama2']
    whole = example(objective, pair, TOKENIZER, chat=chat)
    if objective.encoder:
        made = example(objective, pair, TOKENIZER, room=(5, 2))
        assert made['encoder/inputs'].tolist() == ids('abcde')
        assert made['targets'].tolist() == ids('xy') and made['inputs'].tolist() == [BOS, *ids('x')]
        return
    for room in range(1, len(whole['inputs']) + 1):
        made = example(objective, pair, TOKENIZER, chat=chat, room=(room,))
        if objective.chat:  # loses its end, and nothing within
            n = 0 if made is None else len(made['inputs'])
            assert (n == room) == bool(whole['weights'][:room].any())
            continue
        # The source goes first, from its end; what is left of the target is learnt.
        assert len(made['inputs']) == room and made['inputs'][0] == BOS
        learnt = made['targets'][made['weights'] > 0].tolist()
        assert learnt == [*ids('xyz'), EOS][:room]
        rest = max(room - 4, 0)
        assert made['inputs'][1 : 1 + rest].tolist() == ids('abcdefgh')[:rest]


@pytest.mark.parametrize('name', ['source', 'target'])
def test_empty_texts_are_refused(name):
    with pytest.raises(BadRecordError, match=f'{name} is empty'):
        DECODER.encoded(dataclasses.replace(PAIR, **{name: ' \n'}), vocabulary=TOKENIZER, chat=None)


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'share': 0.5}, 'share for the encoder has no effect'),
        ({'share': 1.0, 'encoder': True}, r'must be in \(0, 1\)'),
        ({'encoder': True, 'chat': True}, 'chat has no effect'),
        ({'encoder': True, 'between': ' '}, 'between has no effect'),
        ({'encoder': True, 'prefix': True}, 'prefix has no effect'),
        ({'chat': True, 'between': ' '}, 'between has no effect in a chat'),
    ],
)
def test_settings_without_effect_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        SequenceToSequence(**settings)


def test_architectures():
    sizes = {'dim': 8, 'layers': 2, 'heads': 1, 'kv_heads': 1, 'head_dim': 8, 'ffn': 8}
    decoder = ModelConfig(vocab=16, context=8, **sizes)
    both = dataclasses.replace(decoder, encoder_layers=2)
    with pytest.raises(UserError, match='encoder=True needs an encoder-decoder'):
        ENCODER.check(decoder)
    with pytest.raises(UserError, match='encoder=False trains a decoder alone'):
        DECODER.check(both)
    with pytest.raises(UserError, match='no room for an encoder and a decoder'):
        ENCODER.lengths(1)
    assert DECODER.flops(decoder, 8) == decoder_flops(decoder, 8, causal=True, predicted=4)
    prefix = SequenceToSequence(prefix=True)
    assert prefix.flops(decoder, 8) == prefix_flops(decoder, 8, prefix=4, predicted=4)
    assert ENCODER.flops(both, 8) == encoder_decoder_flops(both, 4, 4)
    assert (DECODER.causal, prefix.causal) == (True, False)
    different = {SequenceToSequence(**s).encoding for s in ({}, {'chat': True}, {'between': 'x'})}
    assert len({*different, ENCODER.encoding}) == 4 and prefix.encoding == DECODER.encoding


@pytest.mark.parametrize(
    ('objective', 'config'), [(DECODER, reading.DECODER), (ENCODER, reading.BOTH)], ids=str
)
def test_packed_pairs_have_the_losses_of_each_alone(objective, config):
    pairs = [PAIR, Pair('x', 'long target'), Pair('a longer source', 'y')]
    packed = batch_of(objective, [pairs[:2], pairs[2:]], TOKENIZER, seq_len=48)
    together = reading.loss(objective, config, packed)
    apart = [
        reading.loss(objective, config, batch_of(objective, [[one], []], TOKENIZER, seq_len=48))
        for one in pairs
    ]
    np.testing.assert_allclose(together.total, sum(one.total for one in apart), rtol=1e-6)
    assert (
        together.weight
        == sum(one.weight for one in apart)
        == sum(len(ids(pair.target)) + 1 for pair in pairs)
    )
