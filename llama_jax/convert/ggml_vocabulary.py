"""Vocabularies in the words of GGUF: its settings `tokenizer.*`, of whatever files they come."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama_jax.convert import gguf_file
from llama_jax.convert.stored import read_object
from llama_jax.errors import UserError
from llama_jax.text.bpe import SPLITS, splitter

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, WHOLE, UNUSED, BYTE = range(1, 7)
"""Kinds of token in a GGUF file; SentencePiece has the same numbers."""
GGML = 'tokenizer.ggml.'
IGNORE_MERGES = ('llama-bpe',)
"""Ways to split text after which a word that is a token is that token, whatever the merges say."""


@dataclass(frozen=True)
class Ids:
    """Tokens with a part in generation."""

    bos: int | None
    end: tuple[int, ...]
    """Any of them ends a text."""
    pad: int | None


def of_sentencepiece(model: bytes, ids: Ids, *, begin: bool) -> dict[str, Any]:
    """Settings of a SentencePiece model. `begin`: bos stands before every text.

    Raises UserError for a model that changes text before it encodes it: llama.cpp does not.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise UserError(
            'the tokenizer normalises text (another Unicode form, or fewer spaces), which cannot '
            'be exported: train one with normalization_rule_name=identity and '
            'remove_extra_whitespaces=False'
        )
    if spec.model_type not in (spec.BPE, spec.UNIGRAM) or spec.treat_whitespace_as_suffix:
        raise UserError(
            'the tokenizer is no SentencePiece model of type bpe or unigram with spaces before '
            'words: others cannot be exported'
        )
    unknown = [i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    settings = {
        'model': 'llama' if spec.model_type == spec.BPE else 't5',
        'tokens': [piece.piece for piece in proto.pieces],
        'scores': [piece.score for piece in proto.pieces],
        'token_type': [int(piece.type) for piece in proto.pieces],
        'add_space_prefix': normal.add_dummy_prefix,
        'unknown_token_id': unknown[0] if unknown else None,
        **_special(ids, begin),
    }
    return {GGML + name: value for name, value in settings.items() if value is not None}


def of_gguf(path: Path) -> dict[str, Any]:
    """Settings of a GGUF file, and what it says of its origin and licence."""
    written = ('architecture', 'file_type', 'quantization_version', 'alignment')
    return {
        name: value
        for name, value in gguf_file.read(path).settings.items()
        if name.startswith(('tokenizer.', 'general.'))
        and name.removeprefix('general.') not in written
    }


def to_sentencepiece(settings: Mapping[str, Any]) -> bytes:
    """The SentencePiece model, of type bpe, of which `settings` are."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.add_dummy_prefix = settings.get(GGML + 'add_space_prefix', True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    names = ('tokens', 'scores', 'token_type')
    for piece, score, kind in zip(*(settings[GGML + name] for name in names), strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    spec = proto.trainer_spec
    spec.byte_fallback = BYTE in settings[GGML + 'token_type']
    for name, default in {'unk': 'unknown', 'bos': 'bos', 'eos': 'eos', 'pad': 'padding'}.items():
        i = settings.get(f'{GGML}{default}_token_id', -1)
        setattr(spec, f'{name}_id', i)
        if i >= 0:
            setattr(spec, f'{name}_piece', settings[GGML + 'tokens'][i])
    return proto.SerializeToString()


def of_huggingface(directory: Path, ids: Ids, *, begin: bool) -> dict[str, Any]:
    """Settings of the tokenizer in the directory of a Hugging Face model. `begin`: as above.

    Raises UserError for a kind that llama.cpp does not have.
    """
    content = _json(directory / 'tokenizer.json')
    template = chat_template(directory)
    chat = {'tokenizer.chat_template': template} if template else {}
    if content and 'ByteLevel' in json.dumps(content.get('pre_tokenizer')):
        return _of_byte_level(content, ids, begin) | chat
    path = directory / 'tokenizer.model'
    if not path.is_file():
        raise UserError(
            f'{directory}: the tokenizer is neither byte-level (tokenizer.json) nor SentencePiece '
            '(tokenizer.model), and GGUF has no other kind for Llama models'
        )
    settings = of_sentencepiece(path.read_bytes(), ids, begin=begin)
    added = content.get('added_tokens') or _added(directory)
    for token in sorted(added, key=lambda token: token['id']):
        _set(settings, token['id'], token['content'], CONTROL if token['special'] else WHOLE)
    return settings | chat


def chat_template(directory: Path) -> str | None:
    """The template of chats in the directory of a Hugging Face model."""
    path = directory / 'chat_template.jinja'
    if path.is_file():
        return path.read_text(encoding='utf-8')
    template = _json(directory / 'tokenizer_config.json').get('chat_template')
    if isinstance(template, list):  # several by name
        template = next((t['template'] for t in template if t['name'] == 'default'), None)
    return template


def _of_byte_level(content: Mapping[str, Any], ids: Ids, begin: bool) -> dict[str, Any]:
    model, added = content['model'], content.get('added_tokens') or []
    names = {i: token for token, i in model['vocab'].items()}
    names |= {token['id']: token['content'] for token in added}
    size = max(names) + 1
    kinds = [NORMAL if i in names else UNUSED for i in range(size)]
    for token in added:
        kinds[token['id']] = CONTROL if token['special'] else WHOLE
        if any(token.get(flag) for flag in ('lstrip', 'rstrip', 'single_word')):
            raise UserError(
                f'{token["content"]!r} takes spaces from the text, which GGUF cannot say: the '
                'vocabulary cannot be exported'
            )
    merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
    settings = {
        'model': 'gpt2',
        'pre': _split_name(content),
        'tokens': [names.get(i, f'[PAD{i}]') for i in range(size)],
        'token_type': kinds,
        'merges': merges,
        **_special(ids, begin),
    }
    return {GGML + name: value for name, value in settings.items() if value is not None}


def _split_name(content: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which tokenizer.json splits text into words."""
    if content.get('normalizer'):
        raise UserError(
            f'tokenizer.json has the normalizer {content["normalizer"].get("type")}, which GGUF '
            'cannot say: the vocabulary cannot be exported'
        )
    own = _effective(content['pre_tokenizer'])
    for name in SPLITS:
        known = json.loads(splitter(name).__getstate__())
        ignores = bool(content['model'].get('ignore_merges'))
        if _effective(known) == own and ignores == (name in IGNORE_MERGES):
            return name
    raise UserError(
        f'tokenizer.json splits text into words in a way that has no name in GGUF among '
        f'{", ".join(SPLITS)}: export to huggingface, and let convert_hf_to_gguf.py of llama.cpp '
        'convert that'
    )


def _effective(part: Any) -> Any:
    """The settings of a pre-tokenizer that change ids."""
    if isinstance(part, dict):
        parts = part.get('pretokenizers', [])
        if len(parts) == 1:
            return _effective(parts[0])
        return {name: _effective(x) for name, x in part.items() if name != 'trim_offsets'}
    return [_effective(x) for x in part] if isinstance(part, list) else part


def _set(settings: dict[str, Any], i: int, token: str, kind: int) -> None:
    """A token that was added to the vocabulary in `settings`, or that changes its kind."""
    lists = [settings[GGML + name] for name in ('tokens', 'token_type', 'scores')]
    while len(lists[0]) <= i:
        for values, value in zip(lists, (f'[PAD{len(lists[0])}]', UNUSED, -1000.0), strict=True):
            values.append(value)
    if lists[1][i] != UNKNOWN:
        lists[0][i], lists[1][i] = token, kind


def _added(directory: Path) -> list[dict[str, Any]]:
    special = json.dumps(_json(directory / 'special_tokens_map.json'))
    return [
        {'id': i, 'content': token, 'special': json.dumps(token) in special}
        for token, i in _json(directory / 'added_tokens.json').items()
    ]


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _special(ids: Ids, begin: bool) -> dict[str, Any]:
    # GGUF has names for three ids that end a text.
    names = ('eos_token_id', 'eot_token_id', 'eom_token_id')
    if len(ids.end) > len(names):
        log.warning('of the ids %s that end a text, GGUF has names for the first three', ids.end)
    return {
        'add_bos_token': begin and ids.bos is not None,
        'add_eos_token': False,
        'bos_token_id': ids.bos,
        'padding_token_id': ids.pad,
        **dict(zip(names, ids.end, strict=False)),
    }


def fitted(settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`settings` with a token for each row of the embedding: llama.cpp takes no other number.

    Rows without a token get one that no text spells; tokens without a row are left out.
    """
    tokens = settings[GGML + 'tokens']
    more = range(len(tokens), rows)
    fill: dict[str, list[Any]] = {'tokens': [f'[PAD{i}]' for i in more]}
    fill |= {'token_type': [UNUSED for _ in more], 'scores': [-1000.0 for _ in more]}
    fitted = dict(settings)
    for name, values in fill.items():
        if GGML + name in settings:
            fitted[GGML + name] = [*settings[GGML + name][:rows], *values]
    return {
        name: value
        for name, value in fitted.items()
        if not (name.endswith('_token_id') and value >= rows)
    }
