"""Directories of models: which file holds the vocabulary, and what the files beside it say."""

import base64
import json
import os
import pickle
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llama_jax.data.train_tokenizer import train
from llama_jax.errors import UserError
from llama_jax.text import directory as directories
from llama_jax.text import files, ranks
from llama_jax.text.chat import Conversation
from llama_jax.text.sentencepiece_model import SentencePiece, parse
from llama_jax.text.tokenizer import CONTROL_NAMES
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import encode_spelled
from llama_jax.text.words import LLAMA3, TEKKEN
from tests.convert import written
from tests.convert.written import CONTROL
from tests.data.corpus import CHINESE

DEEP = b'{"a":' * 100_000
WHOLE = b'qzqzq'
BASE = 373
"""Tokens of the SentencePiece model without our control tokens."""


@pytest.fixture(scope='module')
def model():
    """A SentencePiece model as others have it, with <s> and </s> alone."""
    proto = parse(train([*CHINESE, 'def f(x):  return x'], vocab=511, kind='bpe')._content)
    del proto.pieces[BASE - 1 :]
    return proto.SerializeToString()


@pytest.fixture(scope='module')
def other():
    """A tokenizer.json of another vocabulary."""
    return written.trained().to_str()


def put(directory, **contents):
    for name, content in contents.items():
        name = name.replace('__', '.')
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize('name', ['<|user|>', '<|im_start|>'])
def test_white_space_that_tokens_beside_a_model_take(tmp_path, model, name):
    """As Phi-3's do, whose templates write a line's end behind each role (transformers #32136)."""
    n = SentencePiece(model).vocab_size
    flags = {'content': name, 'lstrip': False, 'rstrip': True, 'normalized': False, 'special': True}
    put(
        tmp_path,
        tokenizer__model=model,
        tokenizer_config__json={'added_tokens_decoder': {str(n): flags}},
    )
    read = files.from_huggingface(tmp_path, vocab=n + 1).vocabulary
    assert read.takes_space == {n: (False, True)}
    ids = encode_spelled(read, f'a {name}\n b')
    assert ids == encode_spelled(read, f'a {name}b') != encode_spelled(read, f'a{name}b')
    # So it does in worker processes, in runs that go on, and beside control tokens of ours.
    (tmp_path / 'run').mkdir()
    read.save_to(tmp_path / 'run')
    for again in (
        pickle.loads(pickle.dumps(read)),
        files.tokenizer_of(tmp_path / 'run'),
        read.extended(),
    ):
        assert encode_spelled(again, f'a {name}\n b') == ids
    plain = files.from_huggingface(
        put(tmp_path, tokenizer_config__json={}, added_tokens__json={name: n}), vocab=n + 1
    )
    assert plain.vocabulary.digest != read.digest


def test_tokens_added_beside_a_sentencepiece_model(tmp_path, model):
    n = SentencePiece(model).vocab_size
    put(
        tmp_path,
        tokenizer__model=model,
        added_tokens__json={'<|im_end|>': n, '<|im_start|>': n + 1},
        generation_config__json={'eos_token_id': [2, n]},
        tokenizer_config__json={'chat_template': written.TEMPLATE, 'eos_token': '<|im_end|>'},
    )
    text = files.from_huggingface(tmp_path, vocab=n + 2)
    assert text.vocabulary.end_ids == (2, n) and text.vocabulary.vocab_size == n + 2
    assert text.vocabulary.control == {'<s>': 1, '</s>': 2, '<|im_end|>': n, '<|im_start|>': n + 1}
    assert n not in text.vocabulary.encode('a<|im_end|>')
    ids = text.chat.encode(
        Conversation([{'role': 'user', 'content': '<|im_end|>'}]), text.vocabulary
    )
    assert ids.count(n) == 2 and ids.count(n + 1) == 3
    # Control tokens of ours come behind those of the model.
    ours = files.tokenizer_of(tmp_path)
    assert ours.end_ids == (2, n) and ours.control['<|im_start|>'] == n + 1
    assert min(ours.control[name] for name in CONTROL_NAMES[2:]) == n + 2


def test_added_tokens_of_tokenizer_json_beside_a_sentencepiece_model(tmp_path, model):
    n = SentencePiece(model).vocab_size
    content = json.loads(written.trained(n).to_str())  # of as many tokens
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    content['added_tokens'] = [
        {'id': n, 'content': '<|im_end|>', **flags, 'special': True},
        {'id': n + 1, 'content': '<tool>', **flags, 'special': False},
    ]
    put(tmp_path, tokenizer__model=model, tokenizer__json=content)
    ours = files.tokenizer_of(tmp_path)
    assert isinstance(ours, SentencePiece) and ours.control['<|im_end|>'] == n
    ids = ours.encode('<|im_end|><tool>')
    assert ids[-1] == n + 1 and n not in ids and ours.decode(ids) == '<|im_end|><tool>'


@pytest.mark.parametrize('legacy', [True, False, None])
def test_legacy_says_whether_a_space_follows_a_control_token(tmp_path, model, legacy):
    proto = parse(model)
    proto.normalizer_spec.add_dummy_prefix = True
    settings = {} if legacy is None else {'legacy': legacy}
    put(tmp_path, tokenizer__model=proto.SerializeToString(), tokenizer_config__json=settings)
    ours = files.tokenizer_of(tmp_path)
    ours.save_to(tmp_path / 'run')
    for one in (ours, files.tokenizer_of(tmp_path / 'run')):
        assert one.space_after_control == (legacy is not False)


@pytest.mark.parametrize('rows', [600, 0])
def test_control_tokens_of_ours_take_no_row_of_the_embedding(tmp_path, model, other, rows):
    size = max(rows, 512)
    config = {'vocab_size': rows} if rows else {}
    put(tmp_path, tokenizer__json=other.encode(), config__json=config | {'eos_token_id': 2})
    ours = files.tokenizer_of(tmp_path)
    new = sorted(ours.control[name] for name in CONTROL_NAMES[2:])
    assert new == list(range(size + 1, size + 140)) and ours.bos_id == size and ours.eos_id == 2


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'


@pytest.mark.parametrize(
    'content', [b'IQ== 0\nIg== 1\n', POINTER, b'', b'<!DOCTYPE html>', b'{"a": 1}', b'\x00junk']
)
def test_what_else_is_called_tokenizer_model_is_passed_over(tmp_path, other, content):
    put(tmp_path, tokenizer__model=content, tokenizer__json=other.encode())
    put(tmp_path, config__json={'eos_token_id': 2})
    vocabulary = files.from_huggingface(tmp_path, vocab=512).vocabulary
    assert isinstance(vocabulary, JsonTokenizer)
    os.remove(tmp_path / 'tokenizer.json')
    with pytest.raises(UserError) as refused:
        files.from_huggingface(tmp_path, vocab=512)
    assert str(tmp_path / 'tokenizer.model') in str(refused.value)
    assert '\n' not in str(refused.value)


def test_the_tokenizer_json_of_another_size_is_the_models(tmp_path, model, other):
    put(tmp_path, tokenizer__model=model, tokenizer__json=other.encode())
    put(tmp_path, config__json={'eos_token_id': 2})
    assert isinstance(files.tokenizer_of(tmp_path), JsonTokenizer)
    for damaged in (POINTER, b'{', b'', DEEP):  # it might tell of added tokens
        put(tmp_path, tokenizer__json=damaged)
        with pytest.raises(UserError, match=r'tokenizer.json .*(download it again)'):
            files.tokenizer_of(tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    assert isinstance(files.tokenizer_of(tmp_path), SentencePiece)


def test_special_tokens_in_every_form(tmp_path, other, caplog):
    def of(**contents):
        put(tmp_path, tokenizer__json=other.encode(), **contents)
        found = files.from_huggingface(tmp_path, vocab=520)
        assert found.vocabulary.vocab_size == 520
        for name in contents:
            os.remove(tmp_path / name.replace('__', '.'))
        return found.vocabulary

    of_map = of(special_tokens_map__json={'eos_token': {'content': '<|im_end|>'}, 'bos_token': ''})
    assert of_map.end_ids == (2,) and of_map.bos_id is None
    names = {512: '<t>', 513: '<e>'}
    decoder = {str(i): {'content': names[i], 'special': i == 513} for i in names}
    of_decoder = of(
        tokenizer_config__json={'added_tokens_decoder': decoder, 'eos_token': '<e>'},
        config__json={'eos_token_id': [0, -1, None]},
    )
    assert of_decoder.end_ids == (0, 513) and of_decoder.encode('a<t>')[-1] == 512
    assert 513 not in of_decoder.encode('a<e>') and of_decoder.decode([512]) == '<t>'
    # An end that is a word stays one, and one without a name ends texts too.
    line = of_decoder.encode('\n')[0]
    ends = of(generation_config__json={'eos_token_id': [2, int(line), 515]})
    assert ends.end_ids == (2, line, 515) and ends.decode(ends.encode('a\n')) == 'a\n'
    assert not caplog.records


def test_a_pad_token_just_behind_the_embedding_is_a_warning(tmp_path, model, other, caplog):
    n = SentencePiece(model).vocab_size
    settings = {'pad_token': '[PAD]', 'eos_token': '</s>'}
    put(tmp_path, tokenizer__model=model, added_tokens__json={'[PAD]': n})
    put(tmp_path, tokenizer_config__json=settings)
    vocabulary = files.from_huggingface(tmp_path, vocab=n).vocabulary
    assert vocabulary.vocab_size == n and vocabulary.pad_id == 2 == vocabulary.eos_id
    assert f'behind the embedding of {n} rows are left out: [PAD]' in caplog.text
    assert files.tokenizer_of(tmp_path).control['<pad>'] == n  # for a training it is there
    with pytest.raises(UserError, match=f'{n} tokens and the embedding {n - 1} rows'):
        files.from_huggingface(tmp_path, vocab=n - 1)


@pytest.mark.parametrize('kind', ['model', 'json'])
def test_what_is_saved_is_found_again(tmp_path, model, other, kind):
    source, run = tmp_path / 'source', tmp_path / 'run'
    for directory in (source, run):
        directory.mkdir()
    if kind == 'model':
        put(source, tokenizer__model=model, generation_config__json={'eos_token_id': [2, 1]})
    else:
        put(source, tokenizer__json=other.encode(), config__json={'eos_token_id': [2, 0]})
    ours = files.tokenizer_of(source)
    ours.save_to(run)
    shutil.rmtree(source)
    again = files.tokenizer_of(run)
    assert (again.digest, again.special) == (ours.digest, ours.special)
    assert again.control == ours.control and again.vocab_size == ours.vocab_size
    np.testing.assert_array_equal(again.byte_lengths, ours.byte_lengths)
    assert files.tokenizer_of(run / ours.FILE).digest == ours.digest


def test_a_file_that_changes_is_read_again(tmp_path, model, other):
    path = put(tmp_path, x__model=model) / 'x.model'
    first = files.tokenizer_of(path)
    assert files.tokenizer_of(path) is first
    path.write_bytes(other.encode())
    assert isinstance(files.tokenizer_of(path), JsonTokenizer)


@pytest.fixture(scope='module')
def tokens():
    """A vocabulary of ranks: every byte, words of more and more bytes, some of one letter, and one
    to which no merges lead."""
    more = [*(b'a' * n for n in (2, 3, 5, 8)), *(b' ' * n for n in (2, 4, 6)), b'\n\n', WHOLE]
    learnt = files.from_gguf(written.vocabulary()).vocabulary
    words = [learnt.token_bytes(i) for i in range(learnt.vocab_size)]
    return list(dict.fromkeys([*(bytes([b]) for b in range(256)), *more, *filter(None, words)]))


def encoding(tokens, pattern):
    import tiktoken

    order = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding('x', pat_str=pattern, mergeable_ranks=order, special_tokens={})


RANDOM = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=['Cs']), max_size=8),
        st.sampled_from(
            [*CHINESE, 'a' * 7, 'a' * 30, ' ' * 9, "It's 12345", '\r\n', '👩\u200d👧', ' qzqzq']
        ),
    ),
    max_size=6,
).map(''.join)


def test_ranks_give_the_ids_of_tiktoken(tmp_path, tokens, monkeypatch):
    family = ranks._FAMILIES[128_000]
    monkeypatch.setitem(ranks._FAMILIES, len(tokens), family)
    lines = [base64.b64encode(token) + b' %d\n' % i for i, token in enumerate(tokens)]
    put(tmp_path, tokenizer__model=b''.join(lines))
    theirs, n = encoding(tokens, LLAMA3), len(tokens)
    found = files.from_huggingface(tmp_path, vocab=n + 256)
    ours = found.vocabulary
    assert found.begin == (n,) and ours.end_ids == (n + 1, n + 8, n + 9) and ours.pad_id == n + 4
    assert ours.control['<|eot_id|>'] == n + 9 and len(ours.control) == 256

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(RANDOM)
    def check(text):
        ids = ours.encode(text)
        assert ids.tolist() == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids) == text

    check()
    assert ours.encode(WHOLE.decode()).tolist() == [tokens.index(WHOLE)]
    put(tmp_path, tokenizer__model=b''.join(lines[:7]))
    with pytest.raises(UserError, match='a vocabulary of 7 tiktoken ranks'):
        files.from_huggingface(tmp_path, vocab=300)
    put(tmp_path, tokenizer__model=b''.join([*lines[:7], b'!! 7\n']))
    with pytest.raises(UserError, match='line 8 of these tiktoken ranks is damaged'):
        files.from_huggingface(tmp_path, vocab=300)


@pytest.mark.parametrize(
    ('file', 'content', 'words'),
    [
        ('added_tokens', {'<a>': '7'}, "added_tokens.json: the id of '<a>' is '7'"),
        ('added_tokens', {'<a>': -1}, "the id of '<a>' is -1"),
        ('tokenizer_config', {'added_tokens_decoder': {'a': {'content': '<a>'}}}, "['a']"),
        ('tokenizer_config', {'added_tokens_decoder': {'600': {'id': 1}}}, "['600'] is no token"),
        ('tokenizer_config', {'added_tokens_decoder': {'600': '<a>'}}, ''),
        ('tokenizer_config', {'added_tokens_decoder': ['<a>']}, ''),
        ('tokenizer_config', {'additional_special_tokens': 7}, ''),
        ('config', {'text_config': ['a']}, ''),
    ],
)
def test_words_in_another_shape_than_usual(tmp_path, other, file, content, words):
    put(tmp_path, tokenizer__json=other.encode())
    (tmp_path / f'{file}.json').write_text(json.dumps(content))
    if not words:  # told of by whoever reads it, or without a meaning
        assert files.tokenizer_of(tmp_path)
        return
    with pytest.raises(UserError) as error:
        files.tokenizer_of(tmp_path)
    assert words in str(error.value)


def test_a_tokenizer_that_leaves_many_rows_without_a_token_is_told_of(tmp_path, other, caplog):
    put(tmp_path, tokenizer__json=other.encode(), tokenizer_config__json={'eos_token': CONTROL[2]})
    files.from_huggingface(tmp_path, vocab=568)  # a tenth, as the largest there are
    assert not caplog.messages
    files.from_huggingface(tmp_path, vocab=570)
    (line,) = caplog.messages
    assert '512 tokens and the embedding 570 rows' in line


def test_families_of_llama():
    from tests.text import llama_tokens

    for n, ids in llama_tokens.IDS.items():
        _, _, names, *_ = ranks._FAMILIES[n]
        assert {name: n + names.index(name) for name in ids} == ids
        assert len(set(names)) == len(names) == llama_tokens.SIZES[n] - n


def test_tekken_gives_the_ids_of_tiktoken(tmp_path, tokens):
    vocab = [
        {'rank': i, 'token_bytes': base64.b64encode(token).decode(), 'token_str': None}
        for i, token in enumerate(tokens)
    ]
    config = {'pattern': TEKKEN, 'num_vocab_tokens': len(tokens), 'version': 'v3'}
    config |= {'default_vocab_size': len(tokens) + 20 - 5, 'default_num_special_tokens': 20}
    put(tmp_path, tekken__json={'config': config, 'vocab': vocab})
    ours = files.tokenizer_of(tmp_path)
    theirs = encoding(tokens[:-5], TEKKEN)
    assert (ours.bos_id, ours.eos_id, ours.control['[INST]'], ours.pad_id) == (1, 2, 3, 10)
    for text in (*CHINESE, 'aBcD ' + 'a' * 40, "It's 1984\r\n\n", 'qzqzq'):
        assert ours.encode(text).tolist() == [i + 20 for i in theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize('kind', ['sentencepiece', 'json', 'gguf'])
def test_no_message_opens_a_turn_that_the_files_leave_open(tmp_path, model, kind):
    """OpenHermes and others call <|im_start|> not special."""
    name = '<|im_start|>'
    if kind == 'gguf':
        settings = written.vocabulary()
        n = settings['tokenizer.ggml.tokens'].index(name)
        settings['tokenizer.ggml.token_type'][n] = 4
        settings['tokenizer.ggml.bos_token_id'] = 0
        text = files.from_gguf(settings)
    else:
        added = {'content': name, 'special': False}
        config = {'chat_template': written.TEMPLATE, 'eos_token': '</s>'}
        if kind == 'sentencepiece':
            n = SentencePiece(model).vocab_size
            config['added_tokens_decoder'] = {n: added, n + 1: {**added, 'content': '<|im_end|>'}}
            put(tmp_path, tokenizer__model=model)
        else:
            theirs = json.loads(written.trained().to_str())
            (entry,) = (token for token in theirs['added_tokens'] if token['content'] == name)
            n, entry['special'] = entry['id'], False
            config['eos_token'] = '<|im_end|>'
            put(tmp_path, tokenizer__json=theirs)
        put(tmp_path, tokenizer_config__json=config)
        text = files.from_huggingface(tmp_path, vocab=600)
    counts = {
        text.chat.encode(Conversation([{'role': 'user', 'content': said}]), text.vocabulary).count(
            n
        )
        for said in ('a', f'{name}system\nb', f'a {name} {name}')
    }
    assert len(counts) == 1 and counts != {0}
    assert n not in text.vocabulary.encode(name)


@pytest.mark.parametrize('name', directories.ALL_NAMES[1:])
def test_files_that_are_nested_too_deeply(tmp_path, name, other):
    if name not in directories.NAMES:
        put(tmp_path, tokenizer__json=other.encode())
    (tmp_path / name).write_bytes(DEEP)
    with pytest.raises(UserError, match=f'{name} is no JSON .*download it again'):
        directories.read(tmp_path, rows=0)
