"""Tokenizers that are SentencePiece models: LLaMA 1 and 2, Mistral, and those trained here.

One file is the whole tokenizer: control tokens which the model lacks are appended to its protobuf
as pieces of type CONTROL (which text can never spell), so that it stays a valid `.model` for every
other SentencePiece program as well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.text import long_text
from llama_jax.text.special import NOTHING, Added, Special
from llama_jax.text.tokenizer import (
    SPACE,
    SPACE_IN_BYTES,
    Tokenizer,
    other_name,
    too_large,
)

Model: TypeAlias = sentencepiece_model_pb2.ModelProto
_Piece: TypeAlias = sentencepiece_model_pb2.ModelProto.SentencePiece
_FIELDS = {'<s>': 'bos_piece', '</s>': 'eos_piece', '<pad>': 'pad_piece'}
_NO_TEXT = (_Piece.CONTROL, _Piece.UNKNOWN)


class SentencePiece(Tokenizer):
    """A SentencePiece model; ids are those of the library."""

    FILE = 'tokenizer.model'

    def __init__(self, content: bytes, special: Special | None = None) -> None:
        """`content` is a serialised ModelProto, which says what bos, eos and pad are: of `special`
        the rest is read. Raises UserError when it is no model."""
        proto = parse(content)
        index = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _Piece.CONTROL}
        spec = proto.trainer_spec
        bos, eos, pad = (index.get(n) for n in (spec.bos_piece, spec.eos_piece, spec.pad_piece))
        special = special or NOTHING
        takes = tuple(one for one in special.takes if one[0] in index.values())
        super().__init__(
            content,
            dataclasses.replace(special, bos_id=bos, eos_id=eos, pad_id=pad, takes=takes),
            names=index,
            pieces=[_piece_bytes(piece) for piece in proto.pieces],
            facts=repr(takes) if takes else '',
        )
        self.takes_space = {i: (left, right) for i, left, right in takes}
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        normalizer = proto.normalizer_spec
        self.dummy_prefix = normalizer.add_dummy_prefix
        suffix = normalizer.add_dummy_prefix and spec.treat_whitespace_as_suffix
        losses = {
            'characters are normalised': normalizer.precompiled_charsmap,
            'extra spaces are left out': normalizer.remove_extra_whitespaces,
            'a space is put behind every text': suffix,
            'characters that it lacks become <unk>': not spec.byte_fallback,
            SPACE_IN_BYTES: normalizer.escape_whitespaces
            and SPACE not in {p.piece for p in proto.pieces if p.type not in _NO_TEXT},
        }
        self.losses = tuple(words for words, found in losses.items() if found)
        self._normalises = any(list(losses.values())[:3])
        byte_id = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _Piece.BYTE}
        spelled = [byte_id.get(f'<0x{b:02X}>') for b in SPACE.encode()]
        self._space_ids = np.array(spelled, np.int32) if None not in spelled else None
        normalizer.add_dummy_prefix = False
        self._continuation = (
            sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            if self.dummy_prefix
            else self._processor
        )

    def _encode(self, text: str, *, continues: bool) -> Iterator[np.ndarray]:
        """Long texts are encoded in parts, so memory is flat; see text/long_text.py. The ids are
        those of the whole, but for a unigram model's ties between equally likely pieces, which the
        library itself breaks by the rounding of a sum over all that stands before.
        """
        processor = self._continuation if continues else self._processor
        if len(text) <= long_text.PART:
            yield np.array(processor.encode(text), np.int32)
            return
        if self._normalises:
            text = processor.normalize(text).replace(SPACE, ' ')
        elif processor is not self._continuation:
            text = f' {text}'
        yield from long_text.encode_in_parts(
            text, self._plain.encode, pairs=self._pairs, byte_lengths=self.byte_lengths
        )

    @functools.cached_property
    def _plain(self) -> sentencepiece.SentencePieceProcessor:
        """Encodes text that is normalised already."""
        proto = parse(self._content)
        proto.normalizer_spec.Clear()
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @functools.cached_property
    def _pairs(self) -> frozenset[str]:
        kinds = (*_NO_TEXT, _Piece.BYTE)
        pieces = (p.piece for p in parse(self._content).pieces if p.type not in kinds)
        return long_text.pairs_within(piece.replace(SPACE, ' ') for piece in pieces)

    @property
    def base_size(self) -> int:
        return int(self._processor.vocab_size())

    def token_id(self, name: str) -> int | None:
        i = self._processor.piece_to_id(name)
        return i if self._processor.id_to_piece(i) == name else None

    def within(self, rows: int) -> tuple[SentencePiece, list[str]]:
        """Without control tokens behind the `rows` of an embedding, and the names of these. Raises
        UserError where others are there."""
        if self.vocab_size <= rows:
            return self, []
        proto = parse(self._content)
        outside = list(proto.pieces)[rows:]
        if any(piece.type != _Piece.CONTROL for piece in outside):
            raise too_large(self.vocab_size, rows)
        names = [piece.piece for piece in outside]
        del proto.pieces[rows:]
        return SentencePiece(_bytes(proto), self.special), names

    def with_tokens(self, added: Sequence[Added], special: Special) -> SentencePiece:
        """With tokens that other files add, and the special tokens that they name. Raises UserError
        where they contradict the model."""
        proto = parse(self._content)
        index = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        for token in sorted(added, key=lambda token: token.id):
            name = token.content if token.special else token.content.replace(' ', SPACE)
            if name not in index and token.id >= len(proto.pieces):
                fill(proto, token.id)
                index[name] = token.id
                proto.pieces.add(piece=name, type=_Piece.USER_DEFINED)
            if index.get(name) != token.id:
                raise UserError(
                    f'the added token {name!r} has the id {token.id}, which is not its id in the '
                    'SentencePiece model'
                )
            piece = proto.pieces[token.id]
            if token.special and piece.type != _Piece.UNKNOWN:
                piece.type = _Piece.CONTROL
        ids = {'<s>': special.bos_id, '</s>': special.eos_id, '<pad>': special.padding}
        for name, i in ids.items():
            if i is not None and proto.pieces[i].type != _Piece.UNKNOWN:
                proto.pieces[i].type = _Piece.CONTROL
                _call(proto, name, proto.pieces[i].piece)
        return SentencePiece(_bytes(proto), special)

    def _extend(self, missing: Sequence[str], rows: int) -> SentencePiece:
        proto = parse(self._content)
        fill(proto, rows)
        _add_byte_pieces(proto)
        index = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        for name in missing:
            found = index.get(name)
            if found is not None and proto.pieces[found].type == _Piece.USER_DEFINED:
                proto.pieces[found].type = _Piece.CONTROL  # text cannot spell it any more
                continue
            spelled = name if found is None else other_name(name)
            proto.pieces.add(piece=spelled, score=0.0, type=_Piece.CONTROL)
            if name in _FIELDS:
                _call(proto, name, spelled)
        return SentencePiece(_bytes(proto), self.special)


def bytes_tokenizer() -> Tokenizer:
    """Bytes, the space and control tokens only, for where no corpus is at hand."""
    proto = Model()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece='<unk>', type=_Piece.UNKNOWN)
    proto.pieces.add(piece=SPACE, type=_Piece.NORMAL)
    return SentencePiece(_bytes(proto)).extended()


def parse(content: bytes) -> Model:
    """Raises UserError for what is no SentencePiece model."""
    proto = Model()
    try:
        proto.ParseFromString(content)
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:
        # The protobuf runtime and SentencePiece each raise classes of their own for bad bytes.
        raise UserError(
            'not a SentencePiece model: give a .model file that SentencePiece wrote'
        ) from error
    if not proto.pieces:
        raise UserError('a SentencePiece model without pieces: give a trained .model file')
    return proto


def fill(proto: Model, rows: int) -> None:
    """Names the ids up to `rows` that have no token, so that others come behind them."""
    for i in range(len(proto.pieces), rows):
        proto.pieces.add(piece=f'<row_{i}>', score=0.0, type=_Piece.CONTROL)


def _call(proto: Model, name: str, piece: str) -> None:
    """Says in the model which of its pieces is bos, eos or pad."""
    field = _FIELDS[name]
    if getattr(proto.trainer_spec, field) != piece:
        setattr(proto.trainer_spec, field, piece)


def _bytes(proto: Model) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def _add_byte_pieces(proto: Model) -> None:
    """Lets a model without byte fallback spell characters it does not know, instead of <unk>."""
    if proto.trainer_spec.byte_fallback:
        return
    known = {piece.piece for piece in proto.pieces}
    for byte in range(256):
        name = f'<0x{byte:02X}>'
        if name in known:
            raise UserError(
                f'a SentencePiece model with the piece {name} but no byte fallback: train it with '
                'byte_fallback=True'
            )
        proto.pieces.add(piece=name, score=0.0, type=_Piece.BYTE)
    proto.trainer_spec.byte_fallback = True


def _piece_bytes(piece: _Piece) -> bytes:
    if piece.type in _NO_TEXT:
        return b''
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[1:-1], 16)])
    return bytes(piece.piece.replace(SPACE, ' ').encode())
