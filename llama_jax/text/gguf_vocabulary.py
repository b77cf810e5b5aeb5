"""The tokenizer that a GGUF file holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.text import ranks, words
from llama_jax.text.sentencepiece_model import SentencePiece
from llama_jax.text.special import Special
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.vocabulary import TURNS

log = logging.getLogger(__name__)
Kind = TypeVar('Kind', SentencePiece, JsonTokenizer)

NORMAL, UNKNOWN, CONTROL, WHOLE, UNUSED, BYTE = range(1, 7)
"""Kinds of token; SentencePiece has the same numbers."""


def read(settings: Mapping[str, Any], *, rows: int) -> SentencePiece | JsonTokenizer:
    """Of the settings of a file, with as many ids as the embedding has `rows` (0: not known).
    Raises UserError for a kind that is not supported."""

    def get(name: str) -> Any:
        value = settings.get(f'tokenizer.ggml.{name}')
        if value is None:
            raise UserError(f'GGUF: tokenizer.ggml.{name} is missing')
        return value

    def optional(name: str, default: Any = None) -> Any:
        return settings.get(f'tokenizer.ggml.{name}', default)

    kind, tokens = get('model'), get('tokens')
    if kind not in ('gpt2', 'llama'):
        raise UserError(
            f'GGUF: tokenizer.ggml.model = {kind!r} is not supported: gpt2 (byte-level) and llama '
            '(SentencePiece) are'
        )
    kinds = optional('token_type') or [NORMAL] * len(tokens)
    scores = get('scores') if kind == 'llama' else tokens
    for name, column in (('token_type', kinds), ('scores', scores)):
        if len(column) != len(tokens):
            raise UserError(
                f'GGUF: tokenizer.ggml.{name} is of {len(column)} tokens, and there are '
                f'{len(tokens)}: the file is damaged, download it again'
            )
    kinds = [CONTROL if tokens[i] in TURNS else kind for i, kind in enumerate(kinds)]
    pad_id = optional('padding_token_id')
    if pad_id is not None and pad_id >= len(tokens):
        log.warning('the padding token %d is behind the %d tokens: left out', pad_id, len(tokens))
        pad_id = None
    ends = [optional(f'{name}_token_id') for name in ('eot', 'eom')]
    special = Special(
        optional('bos_token_id'),
        get('eos_token_id'),
        pad_id,
        tuple(i for i in ends if i is not None),
    )
    for i in special.ids:
        if i >= len(tokens):
            raise UserError(f'GGUF: token id {i} is outside the vocabulary of {len(tokens)}')
    if kind == 'llama':
        made = _sentencepiece(
            tokens, scores, kinds, space=optional('add_space_prefix', True)
        ).with_tokens((), special)
        return fitted(made, rows)
    split = get('pre')
    numbered = list(enumerate(zip(tokens, kinds, strict=True)))

    def of(*wanted: int) -> dict[str, int]:
        return {token: i for i, (token, kind) in numbered if kind in wanted}

    made_of_bytes = ranks.byte_level(
        of(NORMAL, UNUSED, BYTE),
        [_pair(merge) for merge in get('merges')],
        splitter=words.splitter(split),
        control=of(CONTROL, UNKNOWN),
        whole=of(WHOLE),
        special=special,
        ignore_merges=split in words.WHOLE_WORDS,
        begins=begins_with_bos(settings),
    )
    return fitted(made_of_bytes, rows)


def fitted(vocabulary: Kind, rows: int) -> Kind:
    """With as many ids as an embedding has `rows` (0: not known). Tokens that were added behind it
    are left out with a warning; raises UserError where others are there."""
    if not rows:
        return vocabulary
    vocabulary, outside = vocabulary.within(rows)
    tell(outside, rows)
    return vocabulary.padded(rows)


def tell(outside: Sequence[str], rows: int) -> None:
    if outside:
        log.warning(
            'tokens behind the embedding of %d rows are left out: %s%s',
            *(rows, ', '.join(outside[:5]), ', ...' if len(outside) > 5 else ''),
        )


def begins_with_bos(settings: Mapping[str, Any]) -> bool:
    """Texts begin with bos."""
    default = (
        settings.get('tokenizer.ggml.model') == 'llama'
        or settings.get('tokenizer.ggml.pre') in words.WHOLE_WORDS
    )
    return bool(settings.get('tokenizer.ggml.add_bos_token', default))


def _pair(merge: str) -> list[str]:
    pair = merge.split(' ')
    if len(pair) != 2:
        raise UserError(f'merge {merge!r} is not of two tokens')
    return pair


def _sentencepiece(
    tokens: list[str], scores: list[float], kinds: list[int], *, space: bool
) -> SentencePiece:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = BYTE in kinds
    proto.normalizer_spec.add_dummy_prefix = space
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    return SentencePiece(proto.SerializeToString(deterministic=True))
