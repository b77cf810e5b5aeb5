"""The tokenizer of a model's directory, which several files tell of.

Two may hold the vocabulary (tokenizer.model, tokenizer.json); the others name tokens that were
added, and those that begin, end and pad.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text import ranks
from llama_jax.text.gguf_vocabulary import tell
from llama_jax.text.sentencepiece_model import SentencePiece
from llama_jax.text.special import Added, Special
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import TURNS

log = logging.getLogger(__name__)

Vocabulary = SentencePiece | JsonTokenizer
MODEL, JSON, TEKKEN = NAMES = 'tokenizer.model', 'tokenizer.json', 'tekken.json'
ALL_NAMES = (
    *NAMES,
    *('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'),
    *('generation_config.json', 'config.json'),
)
"""Every file that is looked at."""
_NAMED = (
    'bos_token',
    'eos_token',
    'pad_token',
    'unk_token',
    'sep_token',
    'cls_token',
    'mask_token',
)

_USUAL = 0.9
"""Of the rows of an embedding, at least so many have a token: makers round them up to multiples of
64 to 1,024, and keep a few hundred free."""


@dataclass(frozen=True)
class Beside:
    """What the files beside the vocabulary say."""

    settings: Mapping[str, Any]
    """tokenizer_config.json; the special tokens that it lacks are of special_tokens_map.json."""
    added: tuple[Added, ...]
    ends: tuple[int, ...]
    """Ids that end a text, as generation_config.json and config.json say."""
    rows: int
    """Of the model's embedding; 0: not known."""

    def token(self, which: str) -> str | None:
        """The token that is called `which`, such as bos_token."""
        return _content(self.settings.get(which))


def read(directory: Path, *, file: Path | None = None, rows: int) -> Vocabulary:
    """The tokenizer of a directory, or of a `file` in it, with the ids of its makers.

    `rows` of the embedding, 0 where it is not known: there are as many ids, and what was added
    behind it is left out with a warning. Raises UserError where there is none, for damaged files,
    and for a vocabulary that is larger without added tokens already.
    """
    beside = look_beside(directory)
    file, vocabulary = _found(directory) if file is None else (file, _vocabulary(file))
    try:
        if file.name == MODEL and isinstance(vocabulary, SentencePiece):
            added = {token.content: token for token in _added_of(directory / JSON)}
            added |= {token.content: token for token in beside.added}
        else:
            added = {token.content: token for token in beside.added}
        return _with(vocabulary, beside, list(added.values()), rows)
    except UserError as error:
        raise UserError(f'{file}: {error}') from None


def _found(directory: Path) -> tuple[Path, Vocabulary]:
    """The file with the vocabulary, and that. SentencePiece is taken where the tokenizer.json
    beside it has as many tokens; what else is called tokenizer.model is taken where there is no
    other."""
    found = [directory / name for name in NAMES if (directory / name).is_file()]
    if not found:
        raise UserError(
            f'{directory} has neither tokenizer.model nor tokenizer.json: put the one of the '
            'model there'
        )
    if found[0].name != MODEL or len(found) == 1 or found[1].name != JSON:
        return found[0], _vocabulary(found[0])
    model, other = found[:2]
    beside = other, _vocabulary(other)
    try:
        content = content_of(model)
        if ranks.is_ranks(content):  # which take seconds to make
            return beside
        vocabulary = _of_content(model, content)
    except UserError:
        return beside
    same = isinstance(vocabulary, SentencePiece)
    same = same and vocabulary.base_size == beside[1].base_size
    return (model, vocabulary) if same else beside


def _vocabulary(path: Path) -> Vocabulary:
    """Whatever kind the file is of. Raises UserError, which names it, for one that is damaged."""
    return _of_content(path, content_of(path))


def _of_content(path: Path, content: bytes) -> Vocabulary:
    try:
        if content.lstrip()[:1] == b'{':
            settings = json.loads(content)
            if 'default_vocab_size' in settings.get('config', ()):
                return ranks.from_tekken(settings)
            return JsonTokenizer(content)
        return ranks.from_ranks(content) if ranks.is_ranks(content) else SentencePiece(content)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON ({error}): download it again, whole') from None


def content_of(path: Path) -> bytes:
    """A file's content. Raises UserError for one that is not there, or visibly another."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f'cannot read the tokenizer {str(path)!r} ({error.strerror}): give a SentencePiece '
            '.model, a tokenizer.json, a .gguf file or the directory of a model'
        ) from None
    start = content[:200].lstrip().lower()
    kinds = {
        'is empty': not start,
        'is a pointer of git-lfs and not the file': start.startswith(b'version https://git-lfs'),
        'is a web page': start.startswith((b'<!doctype', b'<html')),
    }
    for words, found in kinds.items():
        if found:
            raise UserError(f'{path} {words}: download it again, whole')
    return content


def alone(path: Path) -> Vocabulary:
    """The tokenizer of a file that no other belongs to."""
    try:
        return _with(_vocabulary(path), Beside({}, (), (), 0), (), 0)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def look_beside(directory: Path) -> Beside:
    """Raises UserError for files that are damaged."""
    settings = _object(directory / 'tokenizer_config.json')
    names = _object(directory / 'special_tokens_map.json')
    generation, config = (_object(directory / f'{n}config.json') for n in ('generation_', ''))
    settings = names | {key: value for key, value in settings.items() if value is not None}
    closed = {_content(settings.get(which)) for which in _NAMED}
    more = settings.get('additional_special_tokens')
    listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    closed |= {_content(token) for token in listed}
    added = {}
    for i, token in _within(settings, 'added_tokens_decoder').items():
        name = _content(token)
        if name is None or not i.isdecimal():
            path = directory / 'tokenizer_config.json'
            raise UserError(f'{path}: added_tokens_decoder[{i!r}] is no token: copy it again')
        special = isinstance(token, dict) and bool(token.get('special')) or name in closed
        flags = token if isinstance(token, dict) else {}
        strips = (flags.get('lstrip') is True, flags.get('rstrip') is True)
        added[name] = Added(name, int(i), special, *strips)
    for name, i in _object(directory / 'added_tokens.json').items():
        if not isinstance(i, int) or i < 0:
            path = directory / 'added_tokens.json'
            raise UserError(f'{path}: the id of {name!r} is {i!r}: copy it again')
        added.setdefault(name, Added(name, i))
    rows = config.get('vocab_size', _within(config, 'text_config').get('vocab_size'))
    ends = (*_ids(generation.get('eos_token_id')), *_ids(config.get('eos_token_id')))
    return Beside(
        settings,
        tuple(added.values()),
        tuple(dict.fromkeys(ends)),
        rows if isinstance(rows, int) else 0,
    )


def _with(vocabulary: Vocabulary, beside: Beside, added: Sequence[Added], rows: int) -> Vocabulary:
    outside: list[str] = []
    if rows:
        vocabulary, outside = vocabulary.within(rows)
        outside += [token.content for token in added if token.id >= rows]
        added = [token for token in added if token.id < rows]
    size = max([vocabulary.vocab_size, *(token.id + 1 for token in added)])
    ids = {token.content: token.id for token in added}

    def id_of(which: str) -> int | None:
        name = beside.token(which)
        return None if name is None else ids.get(name, vocabulary.token_id(name))

    own, named = vocabulary.special, id_of('eos_token')
    ends = [*own.ends, *beside.ends, *([] if named is None else [named])]
    unnamed = sorted({i for i in ends if i >= size})
    outside += [str(i) for i in unnamed if i >= max(rows, size)]
    added = [*added, *(Added(f'<row_{i}>', i) for i in unnamed if i < rows)]
    ends = [i for i in dict.fromkeys(ends) if i < max(rows, size)]
    found = {name: ids.get(name, vocabulary.token_id(name)) for name in sorted(TURNS)}
    turns = [Added(name, i) for name, i in found.items() if i is not None]
    closed = (token for token in added if token.special or token.content in TURNS)
    every = ((token.id, token.lstrip, token.rstrip) for token in closed)
    takes = tuple(sorted(one for one in every if any(one[1:])))
    added = [*(token for token in added if token.content not in TURNS), *turns]
    tell(outside, rows)
    bos_id, pad_id = id_of('bos_token'), id_of('pad_token')
    if bos_id is None and isinstance(vocabulary, JsonTokenizer):
        begin, _ = vocabulary.around()
        bos_id = begin[0] if begin else None
    special = Special(
        own.bos_id if bos_id is None else bos_id,
        ends[0] if ends else None,
        own.pad_id if pad_id is None else pad_id,
        tuple(ends[1:]),
        spaced=bool(beside.settings.get('legacy', True)),
        takes=takes if isinstance(vocabulary, SentencePiece) else (),  # a tokenizer.json has them
    )
    made = vocabulary.with_tokens(added, special)
    if made.vocab_size < _USUAL * rows:
        log.warning(
            'the vocabulary has %d tokens and the embedding %d rows, more than makers leave free: '
            'is the tokenizer of this model?',
            *(made.vocab_size, rows),
        )
    return made.padded(rows)


def _added_of(path: Path) -> Iterator[Added]:
    """The added tokens of a tokenizer.json, if there is one."""
    for token in _object(path).get('added_tokens') or ():
        strips = (token.get('lstrip') is True, token.get('rstrip') is True)
        yield Added(token['content'], token['id'], token['special'], *strips)


def _content(token: Any) -> str | None:
    """A token as these files name it; None where it is none."""
    if isinstance(token, dict):
        token = token.get('content')
    return token if isinstance(token, str) and token else None


def _within(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings under a name; none where something else is there."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _object(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(content_of(path))
        if not isinstance(found, dict):
            raise ValueError('it holds no names')
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is no JSON ({error}): download it again, whole') from None
    return found
