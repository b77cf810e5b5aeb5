"""Vocabularies and chat formats of files that are written here."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from llama_jax.data.train_tokenizer import train
from llama_jax.errors import UserError
from llama_jax.text import files as text_files
from llama_jax.text import gguf_vocabulary
from llama_jax.text.sentencepiece_model import SentencePiece
from llama_jax.text.template import Template
from tests.convert import written
from tests.data.corpus import CHINESE

SPELT = {
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'pad_token': '<|im_end|>',
}
TEXT = f'def f(x):  return x + 1984 {CHINESE[0]} 🙂 <|im_end|> <s>'


def test_gguf_says_how_text_begins_and_ends_and_how_to_chat():
    text = text_files.from_gguf(written.vocabulary())
    assert text.begin == () and text.chat == Template(written.TEMPLATE, SPELT)
    assert text.vocabulary.end_ids == (2,)
    settings = written.vocabulary() | {'tokenizer.ggml.add_bos_token': True}
    settings |= {'tokenizer.ggml.eot_token_id': 0, 'tokenizer.chat_template': '{{ x }}'}
    text = text_files.from_gguf(settings)
    assert text.begin == (1,) and text.chat == Template('{{ x }}', SPELT)
    assert text.vocabulary.end_ids == (2, 0)


@pytest.mark.parametrize(('split', 'whole'), [('llama-bpe', True), ('smollm', False)])
def test_words_that_are_tokens(split, whole):
    """Llama 3 takes a word that is a token, whatever the merges say; GPT-2 does not."""
    settings = written.vocabulary() | {'tokenizer.ggml.pre': split}
    token = next(i for i, t in enumerate(settings['tokenizer.ggml.tokens']) if t == 'in')
    merges = settings['tokenizer.ggml.merges']
    settings['tokenizer.ggml.merges'] = [merge for merge in merges if merge != 'i n']
    ids = text_files.from_gguf(settings).vocabulary.encode('in')
    assert (ids.tolist() == [token]) == whole


def test_padding_token_behind_the_tokens_is_left_out(caplog):
    settings = written.vocabulary()
    settings['tokenizer.ggml.padding_token_id'] = 512
    assert text_files.from_gguf(settings).vocabulary.special.pad_id is None
    assert 'the padding token 512 is behind the 512 tokens: left out' in caplog.text


def test_five_tokens_behind_the_embedding_are_named(caplog):
    for n, ending in ((5, ': a, b, c, d, e'), (6, ': a, b, c, d, e, ...')):
        caplog.clear()
        gguf_vocabulary.tell('abcdef'[:n], 9)
        assert caplog.messages == [f'tokens behind the embedding of 9 rows are left out{ending}']


def test_llama_3_begins_with_bos_where_a_file_does_not_say():
    settings = written.vocabulary() | {'tokenizer.ggml.pre': 'llama-bpe'}
    del settings['tokenizer.ggml.add_bos_token'], settings['tokenizer.chat_template']
    text = text_files.from_gguf(settings)
    assert text.begin == (1,) and text.chat is None
    assert text.vocabulary.decode(text.vocabulary.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'model': 't5'}, "tokenizer.ggml.model = 't5'"),
        ({'pre': 'falcon'}, "split by 'falcon'"),
        ({'pre': None}, 'tokenizer.ggml.pre is missing'),
        ({'merges': None}, 'tokenizer.ggml.merges is missing'),
        ({'merges': ['ab']}, "merge 'ab' is not of two tokens"),
        ({'eos_token_id': None}, 'eos_token_id is missing'),
        ({'eos_token_id': 512}, 'token id 512 is outside the vocabulary of 512'),
        ({'token_type': [1]}, 'token_type is of 1 tokens, and there are 512'),
        ({'token_type': [1] * 513}, 'token_type is of 513 tokens, and there are 512'),
        ({'model': 'llama', 'scores': [0.0]}, 'scores is of 1 tokens, and there are 512'),
    ],
)
def test_unsupported_vocabulary_is_refused_by_name(change, named):
    settings = written.vocabulary() | {f'tokenizer.ggml.{k}': v for k, v in change.items()}
    with pytest.raises(UserError) as refused:
        text_files.from_gguf(settings)
    assert named in str(refused.value)


@pytest.mark.parametrize('space_before', [True, False])
def test_gguf_with_a_sentencepiece_vocabulary(space_before):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train([*CHINESE, 'def f(x):  return x'], vocab=512, kind='bpe')._content)
    model.normalizer_spec.add_dummy_prefix = space_before
    ours = SentencePiece(model.SerializeToString())
    settings = {
        'model': 'llama',
        'tokens': [piece.piece for piece in model.pieces],
        'scores': [piece.score for piece in model.pieces],
        'token_type': [piece.type for piece in model.pieces],
        'bos_token_id': ours.bos_id,
        'eos_token_id': ours.eos_id,
        'add_space_prefix': space_before,
    }
    text = text_files.from_gguf({f'tokenizer.ggml.{k}': v for k, v in settings.items()})
    assert text.vocabulary.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    assert text.vocabulary.decode(ours.encode(TEXT)) == TEXT
    assert text.begin == (ours.bos_id,) and text.vocabulary.end_ids == (ours.eos_id,)


def test_scores_of_gguf_say_what_is_merged_first():
    settings = {
        'model': 'llama',
        'tokens': ['<unk>', '<s>', '</s>', 'a', 'b', 'c', 'ab', 'bc'],
        'token_type': [2, 3, 3, 1, 1, 1, 1, 1],
        'add_space_prefix': False,
        'eos_token_id': 2,
    }
    for ab, bc, ids in ((-1.0, -2.0, [6, 5]), (-2.0, -1.0, [3, 7])):
        settings['scores'] = [0.0, 0.0, 0.0, -9.0, -9.0, -9.0, ab, bc]
        text = text_files.from_gguf({f'tokenizer.ggml.{k}': v for k, v in settings.items()})
        assert text.vocabulary.encode('abc').tolist() == ids


def test_gguf_that_says_no_kinds_of_tokens():
    settings = written.vocabulary()
    whole = text_files.from_gguf(settings).vocabulary
    del settings['tokenizer.ggml.token_type']
    plain = text_files.from_gguf(settings).vocabulary
    assert plain.vocab_size == 512 and plain.control == {'<|im_start|>': 1, '<|im_end|>': 2}
    assert plain.encode(TEXT).tolist() == whole.encode(TEXT).tolist()


def huggingface(directory, *, change=lambda content: None, **files):
    """The vocabulary of a directory with tokenizer.json and other files of settings."""
    content = json.loads(written.trained().to_str())
    change(content)
    (directory / 'tokenizer.json').write_text(json.dumps(content), 'utf-8')
    for name, value in ({'config': {'eos_token_id': 2}} | files).items():
        (directory / f'{name}.json').write_text(json.dumps(value), 'utf-8')
    return text_files.from_huggingface(directory, vocab=520)


def test_tokenizer_json(tmp_path):
    text = huggingface(tmp_path)
    gguf = text_files.from_gguf(written.vocabulary()).vocabulary
    assert text.vocabulary.encode(TEXT).tolist() == gguf.encode(TEXT).tolist()
    assert text.vocabulary.decode(gguf.encode(TEXT)) == TEXT
    assert text.vocabulary.control == gguf.control
    assert text.begin == () and text.chat is None and text.vocabulary.end_ids == (2,)
    # Rows of the embedding that no token uses have no text, and stop nothing.
    assert text.vocabulary.vocab_size == 520 and text.vocabulary.decode([519]) == ''


def test_settings_beside_tokenizer_json(tmp_path):
    settings = {'bos_token': {'content': '<|im_start|>'}, 'pad_token': '<|endoftext|>'}
    text = huggingface(
        tmp_path,
        tokenizer_config=settings | {'chat_template': written.TEMPLATE},
        generation_config={'eos_token_id': [2, 0]},
    )
    assert (text.vocabulary.bos_id, text.vocabulary.pad_id) == (1, 0) and text.begin == ()
    spelt = {'bos_token': '<|im_start|>', 'pad_token': '<|endoftext|>'}
    assert text.vocabulary.end_ids == (2, 0) and text.chat == Template(written.TEMPLATE, spelt)
    (tmp_path / 'chat_template.jinja').write_text('new')
    assert text_files.from_huggingface(tmp_path, vocab=520).chat == Template('new', spelt)


def test_what_tokenizer_json_puts_before_a_text_is_the_beginning(tmp_path, caplog):
    def post(single):
        def change(content):
            ids = {'<|im_start|>': 1, '<|im_end|>': 2}
            content['post_processor'] = {
                'type': 'TemplateProcessing',
                'single': [
                    {'Sequence': {'id': 'A', 'type_id': 0}}
                    if part == '$A'
                    else {'SpecialToken': {'id': part, 'type_id': 0}}
                    for part in single
                ],
                'pair': [{'Sequence': {'id': name, 'type_id': 0}} for name in 'AB'],
                'special_tokens': {
                    name: {'id': name, 'ids': [i], 'tokens': [name]} for name, i in ids.items()
                },
            }

        return change

    text = huggingface(tmp_path, change=post(['<|im_start|>', '$A']))
    assert text.begin == (1,) and text.vocabulary.bos_id == 1
    assert 1 not in text.vocabulary.encode(TEXT)
    text = huggingface(tmp_path, change=post(['<|im_start|>', '$A', '<|im_end|>']))
    assert text.begin == (1,) and 'prompts end without <|im_end|>' in caplog.text
    for says, begin in ((False, ()), (True, (1,))):
        named = {'add_bos_token': says, 'bos_token': '<|im_start|>'}
        assert huggingface(tmp_path, tokenizer_config=named).begin == begin


def test_directories_without_a_vocabulary_or_its_end(tmp_path):
    with pytest.raises(UserError, match='neither tokenizer.model nor tokenizer.json'):
        text_files.from_huggingface(tmp_path, vocab=520)
    with pytest.raises(UserError, match='names eos'):
        huggingface(tmp_path, config={})
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(UserError, match='tokenizer.json is no JSON'):
        text_files.from_huggingface(tmp_path, vocab=520)


def test_tokenizer_model(tmp_path):
    tokenizer = train(CHINESE, vocab=512, kind='bpe')
    tokenizer.save(tmp_path / 'tokenizer.model')
    text = text_files.from_huggingface(tmp_path, vocab=512)
    assert text.vocabulary.digest == tokenizer.digest and text.begin == (tokenizer.bos_id,)
    settings = {'add_bos_token': False, 'chat_template': 'a [INST] <<SYS>>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    text = text_files.from_huggingface(tmp_path, vocab=512)
    assert text.begin == () and text.chat == Template('a [INST] <<SYS>>', {})
