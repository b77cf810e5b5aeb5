"""Where models keep their chat templates, and chats in files."""

import json

import pytest

from llama_jax.errors import UserError
from llama_jax.text import template_files
from llama_jax.text.chat import FORMATS, LLAMA3
from llama_jax.text.template import Template

SAID = [{'role': 'user', 'content': 'Hi'}]
DEEP = '[' * 100_000


def of_directory(directory, settings=None, **files):
    for name, content in files.items():
        path = directory / name.replace('__', '.')
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return template_files.of_directory(directory, settings or {})


def test_one_template(tmp_path):
    assert of_directory(tmp_path) is None
    assert of_directory(tmp_path, {'chat_template': ''}) is None
    # Of these files the later is overruled by the one before it.
    made = of_directory(tmp_path, chat_template__json=json.dumps({'chat_template': 'old'}))
    assert made == Template('old', {})
    made = of_directory(tmp_path, {'chat_template': 'config'})
    assert made.source == 'config'
    made = of_directory(tmp_path, {'chat_template': 'config'}, chat_template__jinja='own ü')
    assert made.source == 'own ü'
    assert of_directory(tmp_path, chat_template__json='"bare"').source == 'own ü'
    (tmp_path / 'chat_template.jinja').unlink()
    assert of_directory(tmp_path).source == 'bare'


@pytest.mark.parametrize('as_list', [True, False])
def test_templates_by_name(tmp_path, as_list):
    named = {'default': 'a', 'tool_use': 'b', 'rag': 3}
    given = (
        [{'name': name, 'template': source} for name, source in named.items()] + ['c']
        if as_list
        else named
    )
    assert of_directory(tmp_path, {'chat_template': given}) == Template('a', {}, {'tool_use': 'b'})
    more = tmp_path / 'additional_chat_templates'
    more.mkdir()
    (more / 'rag.jinja').write_text('d')
    made = of_directory(tmp_path, {'chat_template': 'a'})
    assert made == Template('a', {}, {'rag': 'd'})
    with pytest.raises(UserError, match='chat templates for rag, tool_use and none by the name'):
        of_directory(tmp_path, {'chat_template': {'tool_use': 'b'}})
    assert of_directory(tmp_path, {'chat_template': [{'template': 'nameless'}]}).source == (
        'nameless'
    )


def test_how_special_tokens_are_spelled(tmp_path):
    settings = {
        'chat_template': 'x',
        'bos_token': {'content': '<s>', 'lstrip': False},
        'pad_token': None,
        'cls_token': 3,
        'extra_special_tokens': {'image_token': '<image>', 'none_token': None},
    }
    beside = {
        'bos_token': '[OLD]',
        'eos_token': '</s>',
        'additional_special_tokens': ['<a>', {'content': '<b>'}, 3],
    }
    made = of_directory(tmp_path, settings, special_tokens_map__json=json.dumps(beside))
    assert made.tokens == {
        'bos_token': '<s>',
        'eos_token': '</s>',
        'image_token': '<image>',
        'additional_special_tokens': ['<a>', '<b>'],
    }
    for other in ('[1]', '{"additional_special_tokens": {"a": 1}}'):
        made = of_directory(tmp_path, {'chat_template': 'x'}, special_tokens_map__json=other)
        assert made.tokens == {}


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('chat_template__jinja', b'\xff'),
        ('chat_template__json', b'\xff'),
        ('chat_template__json', '{'),
        ('chat_template__json', DEEP),
        ('special_tokens_map__json', '{'),
        ('special_tokens_map__json', DEEP),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    with pytest.raises(UserError, match=f'{name.replace("__", ".")} is no .*copy it again'):
        of_directory(tmp_path, **{name: content})


def test_gguf():
    settings = {
        'tokenizer.chat_template': 'a',
        'tokenizer.chat_template.tool_use': 'b',
        'tokenizer.chat_template.rag': 3,
        'tokenizer.ggml.tokens': ['<s>', '</s>', '<sep>', '<unk>', '<pad>', 'x'],
        'tokenizer.ggml.bos_token_id': 0,
        'tokenizer.ggml.eos_token_id': 1,
        'tokenizer.ggml.seperator_token_id': 2,
        'tokenizer.ggml.unknown_token_id': 3,
        'tokenizer.ggml.padding_token_id': 4,
        'tokenizer.ggml.mask_token_id': 6,
        'tokenizer.ggml.cls_token_id': -1,
    }
    spelt = {'bos': '<s>', 'eos': '</s>', 'unk': '<unk>', 'sep': '<sep>', 'pad': '<pad>'}
    tokens = {f'{name}_token': token for name, token in spelt.items()}
    assert template_files.of_gguf(settings) == Template('a', tokens, {'tool_use': 'b'})
    for nothing in ('', 3, ['a']):
        assert template_files.of_gguf({'tokenizer.chat_template': nothing}) is None
    assert template_files.of_gguf({}) is None


def test_named_formats(tmp_path):
    assert template_files.chosen('llama3') is LLAMA3
    path = tmp_path / 'mine.jinja'
    path.write_text('{{ messages }}')
    assert template_files.chosen(str(path)) == Template('{{ messages }}')
    for given in (str(tmp_path), 'llama5'):
        with pytest.raises(UserError, match='no such file, and the formats by name are chatml'):
            template_files.chosen(given)


def test_the_format_of_a_run_is_kept(tmp_path):
    template = Template('{{ "中" }}', {'bos_token': '<s>'}, {'tool_use': 'b'})
    for chat in (template, *FORMATS.values(), Template('x')):
        template_files.keep(chat, tmp_path)
        assert template_files.kept(tmp_path) == chat
    template_files.keep(None, tmp_path)
    assert template_files.kept(tmp_path) is None and not list(tmp_path.iterdir())


def chat(directory, content):
    path = directory / 'chat.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return template_files.conversation_of(str(path))


def test_chats(tmp_path):
    assert chat(tmp_path, SAID).messages == SAID
    options = {'tools': [{}], 'documents': [{}], 'variables': {'a': 1}}
    made = chat(tmp_path, {'messages': SAID, 'add_generation_prompt': False, **options})
    assert not made.add_generation_prompt and made.tools == made.documents == [{}]
    assert made.variables == {'a': 1}
    made = chat(tmp_path, {'messages': SAID, 'continue_final_message': True})
    assert made.continue_final_message and not made.add_generation_prompt


@pytest.mark.parametrize(
    ('content', 'named'),
    [
        ('[', 'is no JSON'),
        (DEEP, 'is no JSON'),
        ('3', 'has no messages'),
        ({'messages': {}}, 'has no messages'),
        ({'message': SAID}, 'has no messages'),
        ([3], 'message 0 is no object'),
        ({'messages': SAID, 'tool': []}, "'tool' is none of messages, add_generation_prompt"),
        ({'messages': SAID, 'tools': {}}, 'tools is no list'),
        ({'messages': SAID, 'documents': {}}, 'documents is no list'),
        ({'messages': SAID, 'variables': []}, 'variables is no dict'),
        ({'messages': SAID, 'add_generation_prompt': 1}, 'add_generation_prompt is no bool'),
        (
            {'messages': SAID, 'add_generation_prompt': True, 'continue_final_message': True},
            'leave one out',
        ),
    ],
)
def test_chats_that_are_none(tmp_path, content, named):
    with pytest.raises(UserError) as refused:
        chat(tmp_path, content)
    assert named in str(refused.value)


def test_chat_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='--messages .*No such file'):
        template_files.conversation_of(str(tmp_path / 'none.json'))
