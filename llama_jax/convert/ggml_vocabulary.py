"""Tokenizers in the words of GGUF: its settings `tokenizer.*`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from llama_jax.convert import gguf_file
from llama_jax.convert.tokenizer_files import difference
from llama_jax.errors import UserError
from llama_jax.text import json_rules, words
from llama_jax.text.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, WHOLE
from llama_jax.text.sentencepiece_model import SentencePiece, parse
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_json import JsonTokenizer

log = logging.getLogger(__name__)

_GGML = 'tokenizer.ggml.'
_UNLIKELY = -1e6
"""Score of tokens that text does not spell."""


def of_gguf(path: Path) -> dict[str, Any]:
    """Settings of a GGUF file, and what it says of its origin and licence."""
    written = ('architecture', 'file_type', 'quantization_version', 'alignment')
    return {
        name: value
        for name, value in gguf_file.read(path).settings.items()
        if name.startswith(('tokenizer.', 'general.'))
        and name.removeprefix('general.') not in written
    }


def of_tokenizer(
    tokenizer: Tokenizer, *, begin: bool, end_ids: tuple[int, ...], rows: int
) -> dict[str, Any]:
    """Settings of a tokenizer, with a token for each of the `rows` of the embedding: llama.cpp
    takes no other number. `begin`: bos stands before every text; `end_ids`: any ends one.

    Raises UserError for what llama.cpp would not split in the same way.
    """
    assert isinstance(tokenizer, SentencePiece | JsonTokenizer)
    if isinstance(tokenizer, SentencePiece):
        settings = _of_sentencepiece(tokenizer.content)
    else:
        settings = _of_json(tokenizer)
    # GGUF has names for three ids that end a text.
    names = ('eos_token_id', 'eot_token_id', 'eom_token_id')
    if len(end_ids) > len(names):
        log.warning('of the ids %s that end a text, GGUF has names for the first three', end_ids)
    settings |= {
        'add_bos_token': begin and tokenizer.bos_id is not None,
        'add_eos_token': False,
        'bos_token_id': tokenizer.bos_id,
        'padding_token_id': tokenizer.pad_id,
        **dict(zip(names, end_ids, strict=False)),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    return fitted({_GGML + name: value for name, value in settings.items()}, rows)


def fitted(settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`settings` with a token for each row: rows without one get one that no text spells, tokens
    without a row are left out."""
    more = range(len(settings[_GGML + 'tokens']), rows)
    fill: dict[str, list[Any]] = {'tokens': [f'[PAD{i}]' for i in more]}
    fill |= {'token_type': [UNUSED for _ in more], 'scores': [_UNLIKELY for _ in more]}
    fitted = dict(settings)
    for name, values in fill.items():
        if _GGML + name in settings:
            fitted[_GGML + name] = [*settings[_GGML + name][:rows], *values]
    return {
        name: value
        for name, value in fitted.items()
        if not (name.endswith('_token_id') and value >= rows)
    }


def _of_sentencepiece(model: bytes) -> dict[str, Any]:
    proto = parse(model)
    spec, normal = proto.trainer_spec, proto.normalizer_spec
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise UserError(
            'the tokenizer normalises text (another Unicode form, or fewer spaces), and llama.cpp '
            'does not: export to huggingface'
        )
    if spec.model_type != spec.BPE or spec.treat_whitespace_as_suffix:
        raise UserError(
            'the tokenizer is a SentencePiece model of another type than bpe, which llama.cpp '
            'reads otherwise: export to huggingface'
        )
    unknown = [i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    return {
        'model': 'llama',
        'tokens': [piece.piece for piece in proto.pieces],
        'scores': [piece.score for piece in proto.pieces],
        'token_type': [int(piece.type) for piece in proto.pieces],
        'add_space_prefix': normal.add_dummy_prefix,
        'unknown_token_id': unknown[0] if unknown else None,
    }


def _of_json(tokenizer: JsonTokenizer) -> dict[str, Any]:
    content = json.loads(tokenizer.content)
    model, added = content['model'], content.get('added_tokens') or []
    if model.get('type', 'BPE') != 'BPE' or not isinstance(model['vocab'], dict):
        raise UserError(
            f'tokenizer.json is of type {model.get("type")}, which llama.cpp reads otherwise: '
            'export to huggingface'
        )
    names = {i: token for token, i in model['vocab'].items()}
    names |= {token['id']: token['content'] for token in added}
    size = max(names) + 1
    kinds = [NORMAL if i in names else UNUSED for i in range(size)]
    for token in added:
        kinds[token['id']] = CONTROL if token['special'] else WHOLE
        if any(token.get(flag) for flag in ('lstrip', 'rstrip', 'single_word')):
            log.warning('%r takes spaces from the text, which GGUF cannot say', token['content'])
    for i in tokenizer.control.values():
        kinds[i] = CONTROL
    merges = [m.split(' ') if isinstance(m, str) else m for m in model['merges']]
    settings = {
        'tokens': [names.get(i, f'[PAD{i}]') for i in range(size)],
        'token_type': kinds,
    }
    if json_rules.is_byte_level(content):
        joined = [' '.join(pair) for pair in merges]
        return {'model': 'gpt2', 'pre': _split_name(content), 'merges': joined, **settings}
    return _of_merges(tokenizer, merges, settings)


def _split_name(content: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which tokenizer.json splits text into words."""
    whole = bool(content['model'].get('ignore_merges'))
    name = words.name_of(content['pre_tokenizer'], whole_words=whole)
    if content.get('normalizer') or name is None:
        raise UserError(
            'tokenizer.json splits text into words in a way that has no name here for GGUF: export '
            'to huggingface, and try convert_hf_to_gguf.py of llama.cpp'
        )
    return name


def _of_merges(
    tokenizer: JsonTokenizer, merges: list[list[str]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Of a SentencePiece model that only a tokenizer.json is left of: the order of the merges gives
    the scores, if the two agree then."""
    ids = {token: i for i, token in enumerate(settings['tokens'])}
    kinds, scores = settings['token_type'], [0.0] * len(ids)
    for i, kind in enumerate(kinds):
        if kind == NORMAL and settings['tokens'][i] in _BYTE_NAMES:
            kinds[i] = BYTE
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[ids[left + right]] = -float(rank)
    unknown = json.loads(tokenizer.content)['model'].get('unk_token')
    if unknown in ids:
        kinds[ids[unknown]] = UNKNOWN
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = tokenizer.dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in zip(settings['tokens'], scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    other = difference(tokenizer.encode, proto.SerializeToString())
    if other is not None:
        raise UserError(
            f'llama.cpp would give {other!r} other tokens than this tokenizer.json: put the '
            'tokenizer.model that it was made of beside it'
        )
    return {
        'model': 'llama',
        'scores': scores,
        'add_space_prefix': tokenizer.dummy_prefix,
    } | settings


_BYTE_NAMES = frozenset(f'<0x{byte:02X}>' for byte in range(256))
