"""What every tokenizer has: text to token ids and back, special tokens, control tokens.

Two kinds read and write text: `sentencepiece_model` (LLaMA 1 and 2, Mistral, those trained here)
and `tokenizer_json` (Llama 3 and 4, and whatever the library `tokenizers` reads).
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import numpy as np

from llama_jax.errors import UserError
from llama_jax.text.special import Special
from llama_jax.text.vocabulary import TooLongError, refuse_surrogates

SENTINELS = 128
MARKS = (
    *('<pad>', '<mask>', '<prefix>', '<suffix>', '<middle>', '<eom>'),  # <eom>: end of middle
    *('[R]', '[S]', '[X]', '<sep>', '<cls>'),
)
# Sentinel 0 has the highest id and the others count down from it (the convention of T5).
CONTROL_NAMES = ('<s>', '</s>', *MARKS, *(f'<sentinel_{i}>' for i in reversed(range(SENTINELS))))

SPACE = '\u2581'
"""SentencePiece, and files made from it, spell a space with this character."""
SPACE_IN_BYTES = f'spaces become U+{ord(SPACE):04X}, for the vocabulary has no piece for them'
"""One of the `losses` of a tokenizer."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer: a file, a recipe that is trained on the corpus and cached by content, or
    bytes."""

    path: str | None = None
    """A SentencePiece .model, a tokenizer.json, the tokenizer.model of Llama 3 or 4, a .gguf file,
    or the directory of a model; None trains one on a sample of the training split."""
    vocab: int = 4096
    """Ids of a trained vocabulary, control tokens included; a text of few words gives fewer."""
    kind: Literal['bpe', 'unigram', 'bytes'] = 'bpe'
    """Algorithm of a trained vocabulary. Unigram takes about ten times as long to train. Bytes need
    no training: one id for each, the space and the control tokens."""
    sample_bytes: int = 8_000_000
    """UTF-8 bytes of training text that a trained vocabulary is learnt from."""


class Tokenizer(abc.ABC):
    """Text to token ids and back; `text.vocabulary.Vocabulary`, and what training needs besides.

    A file gives a tokenizer with the ids of its makers. `extended` gives one for training, with the
    control tokens of every objective behind them.

    Attributes:
        vocab_size: number of ids, those without a token included.
        special: bos, eos, pad and the ends.
        control: name to id of the tokens that no text can spell. Of an extended tokenizer also
            every name of CONTROL_NAMES; `<s>`, `</s>` and `<pad>` are the model's own there.
        names: id to name of these tokens, as the file has it.
        byte_lengths: int32 [V], the UTF-8 bytes that each token stands for, 0 for control tokens.
            `byte_lengths[encode(x)].sum() == len(x.encode())` where it is lossless, and one more
            when `dummy_prefix`.
        dummy_prefix: a space is put before every text (LLaMA 1 and 2 do, trained ones do not);
            `decode` takes it away again.
        takes_space: control tokens that take white space from the text on their left, or right.
        losses: what is done to text that `decode` cannot undo, in words.
        digest: SHA-256 of the vocabulary and its special tokens, hexadecimal.
    """

    FILE: ClassVar[str]
    """Its name in the directory of a model or a run."""

    dummy_prefix: bool
    takes_space: Mapping[int, tuple[bool, bool]] = MappingProxyType({})
    losses: tuple[str, ...]
    _whole: Tokenizer | None = None
    _space_ids: np.ndarray | None
    """U+2581 in bytes; None where it cannot be told from a space."""

    def __init__(
        self,
        content: bytes,
        special: Special,
        *,
        names: Mapping[str, int],
        pieces: Sequence[bytes],
        facts: str = '',
    ) -> None:
        """
        Args:
          content: the file.
          names: id of each token that no text spells.
          pieces: the UTF-8 of every id.
          facts: what the digest tells besides the content.
        """
        inside([*names.values(), *special.ids], len(pieces))
        self._content, self.special = content, special
        self.vocab_size = len(pieces)
        self.digest = hashlib.sha256(content + facts.encode()).hexdigest()
        self.byte_lengths = np.array([len(b) for b in pieces], np.int32)
        self._bytes = list(pieces)
        self.names = {i: name for name, i in names.items()}
        self.control = dict(names)
        ours = _ours(special, names)
        self._missing = tuple(name for name in CONTROL_NAMES if name not in ours)
        if not self._missing:  # the model's own names last: they are those that are shown
            self.control = ours | {name: i for name, i in names.items() if name not in ours}

    @property
    def content(self) -> bytes:
        """The file."""
        return self._content

    @property
    def bos_id(self) -> int | None:
        return self.special.bos_id

    @property
    def eos_id(self) -> int:
        if self.special.eos_id is None:
            raise UserError('the tokenizer has no token that ends a text')
        return self.special.eos_id

    @property
    def pad_id(self) -> int:
        """That of eos where there is none."""
        return self.eos_id if self.special.pad_id is None else self.special.pad_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text, eos first."""
        return self.special.ends

    @property
    def mask_id(self) -> int:
        return self.control['<mask>']

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """128 ids, counting down from the first."""
        return tuple(self.control[f'<sentinel_{i}>'] for i in range(SENTINELS))

    @property
    def lossless(self) -> bool:
        """`decode(encode(x)) == x` for all text."""
        return not self.losses

    def extended(self, rows: int = 0) -> Tokenizer:
        """With every token of CONTROL_NAMES, for training: those that it lacks come behind all of
        its ids, and behind the `rows` of its model's embedding."""
        return self._extend(self._missing, rows) if self._missing else self

    def padded(self, rows: int) -> Self:
        """With as many ids as an embedding has `rows`: those behind the tokens have no text."""
        if rows <= self.vocab_size:
            return self
        padded = copy.copy(self)
        padded._bytes = self._bytes + [b''] * (rows - self.vocab_size)
        padded.byte_lengths = np.array([len(b) for b in padded._bytes], np.int32)
        padded.vocab_size = rows
        return padded

    def narrowed(self, ids: int) -> Tokenizer | None:
        """With the first `ids` alone, for a model that has no rows for control tokens of ours: a
        begin or padding token among these is eos then. None where other tokens stand behind."""
        whole, special = self.whole, self.special
        ours = {*CONTROL_NAMES, *map(other_name, CONTROL_NAMES)}
        behind = {i for i in range(ids, self.vocab_size) if self.names.get(i) not in ours}
        if any(self._bytes[i] or i in self.names for i in behind):
            return None
        if special.eos_id is None or max(special.ends) >= ids:
            return None
        made = copy.copy(self)
        made._whole, made.vocab_size = whole, ids
        made.special = dataclasses.replace(
            special,
            bos_id=special.eos_id if (special.bos_id or 0) >= ids else special.bos_id,
            pad_id=None if (special.pad_id or 0) >= ids else special.pad_id,
            takes=tuple(one for one in special.takes if one[0] < ids),
        )
        made._bytes, made.byte_lengths = self._bytes[:ids], self.byte_lengths[:ids]
        made.names = {i: name for i, name in self.names.items() if i < ids}
        made.control = {name: i for name, i in self.control.items() if i < ids}
        made.digest = hashlib.sha256(f'{whole.digest} {ids}'.encode()).hexdigest()
        return made

    @property
    def whole(self) -> Tokenizer:
        """The one that this one is `narrowed` from."""
        return self._whole or self

    @property
    @abc.abstractmethod
    def base_size(self) -> int:
        """Number of ids without tokens that were added to those that were learnt."""

    @abc.abstractmethod
    def token_id(self, name: str) -> int | None:
        """The id of a token by its name in the file."""

    @abc.abstractmethod
    def _extend(self, missing: Sequence[str], rows: int) -> Tokenizer: ...

    @abc.abstractmethod
    def _encode(self, text: str, *, continues: bool) -> Iterator[np.ndarray]:
        """Ids of a text without lone surrogates, and without U+2581 where it has bytes for it;
        perhaps in several arrays."""

    def encode(self, text: str, *, continues: bool = False, most: int | None = None) -> np.ndarray:
        """Token ids of `text`, int32 [n]; no bos or eos, and never a control token.

        `continues`: the text goes on from another, so no space is put before it. Raises UserError
        for a lone surrogate, which no UTF-8 text can hold, and TooLongError for more than `most`
        ids: without a look at a text that has more bytes than so many of the longest token, and
        else as soon as there are more. Time is linear in the length.
        """
        if most is not None and self.lossless and len(text) > most * int(self.byte_lengths.max()):
            raise TooLongError.of(most)
        refuse_surrogates(text)
        parts, n = [], 0
        for part in self._parts(text, continues):
            parts.append(part)
            n += len(part)
            if most is not None and n > most:
                raise TooLongError.of(most)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _parts(self, text: str, continues: bool) -> Iterator[np.ndarray]:
        if self._space_ids is None or SPACE not in text:
            yield from self._encode(text, continues=continues)
            return
        # In text it would come back as a space, so it is spelled in bytes between the parts.
        first, *rest = text.split(SPACE)
        yield from self._encode(first, continues=continues)
        for part in rest:
            yield self._space_ids
            yield from self._encode(part, continues=True)

    def decode(self, ids: Iterable[int] | np.ndarray, *, show_control: bool = False) -> str:
        """Text of `ids`. Control tokens are dropped, or spelled by name when `show_control`.

        Bytes that are no UTF-8 (a model may write any) become U+FFFD. Raises UserError for an id
        outside the vocabulary.
        """
        ids = inside(ids, self.vocab_size)
        pieces = self._bytes
        if show_control:
            data = b''.join(pieces[i] or self.names.get(i, '').encode() for i in ids)
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

    @property
    def space_after_control(self) -> bool:
        """Text that follows a control token has a space before it, like that at the beginning."""
        return self.dummy_prefix and self.special.spaced

    def settings(self) -> dict[str, dict[str, Any]]:
        """What its file does not hold, as files of Hugging Face beside it do: by their names."""
        found: dict[str, dict[str, Any]] = {}
        if len(self.end_ids) > 1:
            found['generation_config.json'] = {'eos_token_id': list(self.end_ids)}
        beside: dict[str, Any] = {} if self.special.spaced else {'legacy': False}
        if self.special.takes:
            beside['added_tokens_decoder'] = {
                str(i): {'content': self.names[i], 'lstrip': left, 'rstrip': right, 'special': True}
                for i, left, right in self.special.takes
            }
        if beside:
            found['tokenizer_config.json'] = beside
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the vocabulary as one file, whole or not at all."""
        write(Path(path), self._content)

    def save_to(self, directory: Path) -> None:
        """Writes its file and `settings` to a directory, which `text.files.tokenizer_of` reads; of
        the whole of a narrower one."""
        for name, settings in self.whole.settings().items():
            write(directory / name, json.dumps(settings, indent=1).encode())
        self.save(directory / self.FILE)

    def __copy__(self) -> Self:  # not by `__reduce__`, which gives one object to all
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Travels to worker processes as its file, which each of them reads once."""
        if self._whole is not None:
            return _narrowed, (self._whole, self.vocab_size)
        return _known, (type(self), self._content, self.special, self.vocab_size)


@functools.lru_cache(maxsize=2)
def _known(kind: type[Tokenizer], content: bytes, special: Special, rows: int) -> Tokenizer:
    made = kind(content, special)  # type: ignore[call-arg]  # of the kinds, which take these
    return made.padded(rows)


def _narrowed(whole: Tokenizer, ids: int) -> Tokenizer | None:
    return whole.narrowed(ids)


def _ours(special: Special, names: Mapping[str, int]) -> dict[str, int]:
    """Id of each of CONTROL_NAMES that is there."""
    own = {'<s>': special.bos_id, '</s>': special.eos_id, '<pad>': special.padding}
    found = {}
    for name in CONTROL_NAMES:
        for i in (own.get(name), names.get(name), names.get(other_name(name))):
            if i is not None:
                found[name] = i
                break
    return found


def other_name(name: str) -> str:
    """What a control token is called in a file where `name` is a word that text spells."""
    return f'<|{name}|>'


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    partial.write_bytes(content)
    os.replace(partial, path)


def inside(ids: Iterable[int] | np.ndarray, vocab_size: int) -> list[int]:
    """`ids` as a list. Raises UserError for one outside the vocabulary."""
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise UserError(
            f'token id {max(ids) if min(ids) >= 0 else min(ids)} is outside the vocabulary of '
            f'{vocab_size}: use the tokenizer that the model was trained with'
        )
    return ids


def too_large(tokens: int, rows: int) -> UserError:
    return UserError(
        f'the vocabulary has {tokens} tokens and the embedding {rows} rows: they are of different '
        'models'
    )
