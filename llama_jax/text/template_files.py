"""Where models keep their chat templates, and which format a user names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.paths import local
from llama_jax.text.chat import FORMATS, ChatFormat, Conversation
from llama_jax.text.template import Template
from llama_jax.text.tokenizer import write

_TOKENS = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')
_DEFAULT = 'default'
_KEPT = 'chat.json'


NAMED_TEMPLATES = 'additional_chat_templates'
"""Beside chat_template.jinja: a folder with those for a purpose, such as tool_use.jinja."""


def of_directory(directory: Path, settings: Mapping[str, Any]) -> Template | None:
    """The template of a Hugging Face model, `settings` being those of its tokenizer: of
    chat_template.jinja, else of tokenizer_config.json, else of chat_template.json."""
    named = _by_name(settings.get('chat_template'))
    beside = directory / 'chat_template.json'
    if not named and beside.is_file():
        content = _json(beside)
        named = _by_name(content.get('chat_template') if isinstance(content, dict) else content)
    own = directory / 'chat_template.jinja'
    if own.is_file():
        named[_DEFAULT] = _read(own)
    for path in sorted((directory / NAMED_TEMPLATES).glob('*.jinja')):
        named[path.stem] = _read(path)
    return _template(named, _spelt(directory, settings))


def of_gguf(settings: Mapping[str, Any]) -> Template | None:
    """The template in the settings of a GGUF file."""
    prefix = 'tokenizer.chat_template'
    named = _by_name(settings.get(prefix))
    for key, source in settings.items():
        if key.startswith(f'{prefix}.') and isinstance(source, str):
            named[key.removeprefix(f'{prefix}.')] = source
    tokens = settings.get('tokenizer.ggml.tokens') or []
    keys = {'unk': 'unknown', 'sep': 'seperator', 'pad': 'padding'}  # so spelled in the format
    ids = {
        name: settings.get(f'tokenizer.ggml.{keys.get(name, name)}_token_id') for name in _TOKENS
    }
    spelt = {
        f'{name}_token': str(tokens[i])
        for name, i in ids.items()
        if isinstance(i, int) and 0 <= i < len(tokens)
    }
    return _template(named, spelt)


def keep(chat: ChatFormat | None, directory: Path) -> None:
    """Writes the format to the directory of a run, where `kept` finds it. Nothing is there
    afterwards for None."""
    path = directory / _KEPT
    name = next((name for name, known in FORMATS.items() if known == chat), None)
    if isinstance(chat, Template):
        content = dataclasses.asdict(chat)
    elif name is not None:
        content = {'format': name}
    else:
        path.unlink(missing_ok=True)
        return
    write(path, json.dumps(content, ensure_ascii=False, indent=1).encode())


def kept(directory: Path) -> ChatFormat | None:
    """The format that `keep` wrote; None where there is none."""
    path = directory / _KEPT
    if not path.is_file():
        return None
    try:
        content = json.loads(_read(path))
        return FORMATS[content['format']] if 'format' in content else Template(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({error}): remove it, and name a format') from None


def chosen(given: str, what: str = '--chat-template') -> ChatFormat:
    """The format that the option `what` names: one of FORMATS, or a file with a Jinja template."""
    if given in FORMATS:
        return FORMATS[given]
    path = local(given, what)
    if not path.is_file():
        raise UserError(
            f'{what} {given}: there is no such file, and the formats by name are '
            f'{", ".join(FORMATS)}'
        )
    return Template(_read(path))


def conversation_of(given: str, what: str = '--messages') -> Conversation:
    """Of a JSON file that the option `what` names: an array of messages, or an object with
    `messages` and other fields of Conversation."""
    path = local(given, what)
    try:
        content = json.loads(_read(path))
    except OSError as error:
        raise UserError(f'{what} {given}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{what} {given} is no JSON: {error}') from None
    fields = {'messages': content} if isinstance(content, list) else content
    if not isinstance(fields, dict) or not isinstance(fields.get('messages'), list):
        raise UserError(
            f'{what} {given} has no messages: give an array of them, or an object with messages'
        )
    known = [field.name for field in dataclasses.fields(Conversation)]
    for name, value in fields.items():
        if name not in known:
            raise UserError(f'{what} {given}: {name!r} is none of {", ".join(known)}')
        kind = {'tools': list, 'documents': list, 'messages': list, 'variables': dict}.get(
            name, bool
        )
        if not isinstance(value, kind):
            raise UserError(f'{what} {given}: {name} is no {kind.__name__}')
    if fields.get('continue_final_message') and fields.get('add_generation_prompt'):
        raise UserError(
            f'{what} {given}: add_generation_prompt and continue_final_message, leave one out'
        )
    return Conversation(**fields)


def _by_name(given: Any) -> dict[str, str]:
    """A template, or several: as a list of names and templates, or as an object."""
    if isinstance(given, str):
        return {_DEFAULT: given} if given else {}
    if isinstance(given, Sequence):
        given = {item.get('name'): item.get('template') for item in given if isinstance(item, dict)}
    if not isinstance(given, Mapping):
        return {}
    named = {_DEFAULT if name is None else str(name): source for name, source in given.items()}
    return {name: source for name, source in named.items() if isinstance(source, str)}


def _template(named: dict[str, str], tokens: Mapping[str, Any]) -> Template | None:
    if not named:
        return None
    source = named.pop(_DEFAULT, None)
    if source is None:
        # As in `transformers`, which takes none of several by itself.
        raise UserError(
            f'the model has chat templates for {", ".join(sorted(named))} and none by the name '
            f'{_DEFAULT}: name a file with --chat-template'
        )
    return Template(source, tokens, named)


def _spelt(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How special tokens are spelled, by their names in templates."""
    beside = directory / 'special_tokens_map.json'
    given: dict[str, Any] = {}
    if beside.is_file():
        given = _json(beside)
    given = {**(given if isinstance(given, dict) else {}), **settings}
    extra = settings.get('extra_special_tokens')
    extra = extra if isinstance(extra, Mapping) else {}
    names = [*(f'{name}_token' for name in _TOKENS), *extra]
    spelt = {name: _content({**given, **extra}.get(name)) for name in names}
    tokens: dict[str, Any] = {name: text for name, text in spelt.items() if text}
    more = given.get('additional_special_tokens')
    if isinstance(more, list):
        tokens['additional_special_tokens'] = [text for one in more if (text := _content(one))]
    return tokens


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get('content')
    return token if isinstance(token, str) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON ({error}): copy it again') from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError:
        raise UserError(f'{path} is no UTF-8: copy it again') from None
