"""SentencePiece tokenizer with one block of control tokens for every objective.

A `Tokenizer` is a SentencePiece model and nothing else: the control tokens which the model lacks
are appended to its protobuf as pieces of type CONTROL (which text can never spell), so that the
single file written by `save` is a valid `.model` for every other SentencePiece program as well.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llama_jax.errors import UserError
from llama_jax.paths import local
from llama_jax.text import long_text

SENTINELS = 128
MARKS = (
    *('<pad>', '<mask>', '<prefix>', '<suffix>', '<middle>', '<eom>'),  # <eom>: end of middle
    *('[R]', '[S]', '[X]', '<sep>', '<cls>'),
)
# Sentinel 0 has the highest id and the others count down from it (the convention of T5).
CONTROL_NAMES = ('<s>', '</s>', *MARKS, *(f'<sentinel_{i}>' for i in reversed(range(SENTINELS))))

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SPACE = '\u2581'  # SentencePiece spells a space with this character
_SURROGATE = re.compile('[\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: a file, a recipe that is trained on the corpus and cached by content, or
    bytes."""

    path: str | None = None
    """Any SentencePiece .model; None trains one on a sample of the training split."""
    vocab: int = 4096
    """Ids of a trained vocabulary, control tokens included; a text of few words gives fewer."""
    kind: Literal['bpe', 'unigram', 'bytes'] = 'bpe'
    """Algorithm of a trained vocabulary. Unigram takes about ten times as long to train. Bytes need
    no training: one id for each, the space and the control tokens."""
    sample_bytes: int = 8_000_000
    """UTF-8 bytes of training text that a trained vocabulary is learnt from."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, the control tokens included.
        pad_id, bos_id, eos_id, mask_id: the ids of `<pad>`, `<s>`, `</s>` and `<mask>`. The names
            of bos and eos are the model's own where it has them (LLaMA's 1 and 2).
        end_ids: the ids that end a text: eos.
        sentinel_ids: 128 ids, counting down from the first.
        control: name to id for `<s> </s> <pad> <mask> <prefix> <suffix> <middle> <eom> [R] [S] [X]
            <sep> <cls> <sentinel_0> ... <sentinel_127>`.
        byte_lengths: int32 [V], the UTF-8 bytes that each token stands for, 0 for control tokens.
            `byte_lengths[encode(x)].sum() == len(x.encode())`, and one more when `dummy_prefix`.
        dummy_prefix: the model puts a space before every text (LLaMA 1 and 2 do, trained ones do
            not); `decode` takes it away again.
        lossless: `decode(encode(x)) == x` for all text. False only for files that normalise text,
            or put a space behind it.
        digest: SHA-256 of the model, hexadecimal.
    """

    def __init__(self, model: bytes) -> None:
        """`model` is a serialised SentencePiece ModelProto. Raises UserError when it is not one."""
        proto = _parse(model)
        _add_byte_pieces(proto)
        self.control = _add_control_pieces(proto)
        self._model = proto.SerializeToString(deterministic=True)
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self.digest = hashlib.sha256(self._model).hexdigest()
        self.vocab_size = len(proto.pieces)
        self.pad_id, self.mask_id = self.control['<pad>'], self.control['<mask>']
        self.bos_id, self.eos_id = self.control['<s>'], self.control['</s>']
        self.end_ids = (self.eos_id,)
        self.sentinel_ids = tuple(self.control[f'<sentinel_{i}>'] for i in range(SENTINELS))
        self._names = {i: name for name, i in self.control.items()}
        self._bytes = [_piece_bytes(piece) for piece in proto.pieces]
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int32)
        normalizer = proto.normalizer_spec
        self.dummy_prefix = normalizer.add_dummy_prefix
        self.lossless = not (
            normalizer.precompiled_charsmap
            or normalizer.remove_extra_whitespaces
            or (normalizer.add_dummy_prefix and proto.trainer_spec.treat_whitespace_as_suffix)
        )
        # U+2581 in text would come back as a space, so it is spelled in bytes between the parts.
        byte_id = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _Piece.BYTE}
        self._space_ids = [byte_id[f'<0x{b:02X}>'] for b in _SPACE.encode()]
        normalizer.add_dummy_prefix = False
        self._continuation = (
            sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            if self.dummy_prefix
            else self._processor
        )

    def encode(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Token ids of `text`, int32 [n]; no bos or eos, and never a control token.

        `continues`: the text goes on from another, so no space is put before it. Raises UserError
        for a lone surrogate, which no UTF-8 text can hold.

        Time is linear in the length and memory flat: long texts are encoded in parts. The ids are
        those of the whole, but for a unigram model's ties between equally likely pieces, which the
        library itself breaks by the rounding of a sum over all that stands before.
        """
        refuse_surrogates(text)
        first, *rest = text.split(_SPACE) if _SPACE in text else (text,)
        ids = [*self._encode(first, self._continuation if continues else self._processor)]
        for part in rest:
            ids += [np.array(self._space_ids, np.int32), *self._encode(part, self._continuation)]
        return np.concatenate(ids) if len(ids) > 1 else ids[0]

    def _encode(
        self, text: str, processor: sentencepiece.SentencePieceProcessor
    ) -> Iterator[np.ndarray]:
        """Ids of a text without U+2581, perhaps in several arrays; see text/long_text.py."""
        if len(text) <= long_text.PART:
            yield np.array(processor.encode(text), np.int32)
            return
        if not self.lossless:
            text = processor.normalize(text).replace(_SPACE, ' ')
        elif processor is not self._continuation:
            text = f' {text}'
        yield from long_text.encode_in_parts(
            text, self._plain.encode, pairs=self._pairs, byte_lengths=self.byte_lengths
        )

    @functools.cached_property
    def _plain(self) -> sentencepiece.SentencePieceProcessor:
        """Encodes text that is normalised already."""
        proto = _parse(self._model)
        proto.normalizer_spec.Clear()
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @functools.cached_property
    def _pairs(self) -> frozenset[str]:
        kinds = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE)
        pieces = (p.piece for p in _parse(self._model).pieces if p.type not in kinds)
        return long_text.pairs_within(piece.replace(_SPACE, ' ') for piece in pieces)

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`. Control tokens are dropped, or spelled by name when `show_control`.

        Bytes that are no UTF-8 (a model may write any) become U+FFFD. Raises UserError for an id
        outside the vocabulary.
        """
        ids = inside(ids, self.vocab_size)
        pieces = self._bytes
        if show_control:
            data = b''.join(pieces[i] or self._names.get(i, '').encode() for i in ids)
        else:
            data = b''.join([pieces[i] for i in ids])
        if self.dummy_prefix and data.startswith(b' '):
            data = data[1:]
        return data.decode('utf-8', errors='replace')

    def to_bytes(self, ids: np.ndarray) -> bytes:
        """What `ids` stand for, in UTF-8: `byte_lengths[ids]` bytes each. A character may begin
        or end outside of them."""
        return b''.join([self._bytes[i] for i in ids])

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 that `token` stands for, perhaps a part of a character; b'' if none."""
        return self._bytes[inside([token], self.vocab_size)[0]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as one file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
        partial.write_bytes(self._model)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """The tokenizer of a SentencePiece .model file. Raises UserError when it is none."""
        path = local(path, 'the tokenizer')
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(
                f'cannot read the tokenizer {str(path)!r} ({error.strerror}): give the path of a '
                'SentencePiece .model file'
            ) from error
        try:
            return cls(model)
        except UserError as error:
            raise UserError(f'{str(path)!r}: {error}') from None

    def __reduce__(self) -> tuple[type['Tokenizer'], tuple[bytes]]:
        """Travels to worker processes as the bytes of its model."""
        return Tokenizer, (self._model,)


def bytes_tokenizer() -> Tokenizer:
    """Bytes, the space and control tokens only, for where no corpus is at hand."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece='<unk>', type=_Piece.UNKNOWN)
    proto.pieces.add(piece=_SPACE, type=_Piece.NORMAL)
    return Tokenizer(proto.SerializeToString())


def _parse(model: bytes) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:
        # The protobuf runtime and SentencePiece each raise classes of their own for bad bytes.
        raise UserError(
            'not a SentencePiece model: give a .model file that SentencePiece wrote'
        ) from error
    if not proto.pieces:
        raise UserError('a SentencePiece model without pieces: give a trained .model file')
    return proto


def _add_byte_pieces(proto: sentencepiece_model_pb2.ModelProto) -> None:
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


def _add_control_pieces(proto: sentencepiece_model_pb2.ModelProto) -> dict[str, int]:
    """Name to id of every control token; appends those which the model lacks.

    A piece of the same name that text could spell becomes a CONTROL piece, so text cannot.
    """
    index = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    spec = proto.trainer_spec
    for name, own in (('<s>', spec.bos_piece), ('</s>', spec.eos_piece), ('<pad>', spec.pad_piece)):
        if own in index:
            index[name] = index[own]
    control = {}
    for name in CONTROL_NAMES:
        if name not in index:
            index[name] = len(proto.pieces)
            proto.pieces.add(piece=name, score=0.0)
        control[name] = index[name]
        proto.pieces[control[name]].type = _Piece.CONTROL
    return control


def _piece_bytes(piece: sentencepiece_model_pb2.ModelProto.SentencePiece) -> bytes:
    if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN):
        return b''
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[1:-1], 16)])
    return piece.piece.replace(_SPACE, ' ').encode()


def inside(ids: Iterable[int] | np.ndarray, vocab_size: int) -> list[int]:
    """`ids` as a list. Raises UserError for one outside the vocabulary."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f'token id {max(ids) if min(ids) >= 0 else min(ids)} is outside the vocabulary of '
            f'{vocab_size}: use the tokenizer that the model was trained with'
        )
    return ids


def refuse_surrogates(text: str) -> None:
    """Raise UserError for text that holds half a character, which no UTF-8 can."""
    found = _SURROGATE.search(text)
    if found:
        raise UserError(
            f'the text holds the lone surrogate U+{ord(found[0]):04X} at character '
            f"{found.start()}: drop it with text.encode('utf-8', 'ignore').decode()"
        )
