"""Tokenizers of the library `tokenizers`: every tokenizer.json, and what is made into one.

The library's own object reads text, so the ids are its own; but no control token comes out of it,
whatever the text spells. Needs the extra `weights`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax import installed
from llama_jax.errors import UserError
from llama_jax.text import json_rules
from llama_jax.text.json_rules import Content
from llama_jax.text.long_text import words_in_parts
from llama_jax.text.special import NOTHING, Added, Special
from llama_jax.text.tokenizer import (
    SPACE,
    Tokenizer,
    other_name,
    too_large,
)
from llama_jax.text.words import BYTES

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Theirs

_BYTE = re.compile('<0x([0-9A-F]{2})>')
_BESIDE = 'a'
"""A token is decoded beside this one, for the first of a text may lose a space, or the last."""


class JsonTokenizer(Tokenizer):
    """A tokenizer.json; ids are those of the library."""

    FILE = 'tokenizer.json'

    def __init__(self, content: bytes, special: Special = NOTHING) -> None:
        """`content` is the file; bos, eos, pad and the ends are not in it.

        Raises UserError for a file that the library cannot read.
        """
        theirs, settings = _read(content, special)
        vocabulary, added = theirs.get_vocab(), theirs.get_added_tokens_decoder()
        byte = json_rules.falls_back_to_bytes(settings)
        closed = {
            token.content: i
            for i, token in added.items()
            if token.special and not (byte and _BYTE.fullmatch(token.content))
        }
        unknown = _unknown(settings['model'], vocabulary)
        pieces = _pieces(theirs, settings, vocabulary, added)
        for i in (*closed.values(), *unknown):
            pieces[i] = b''
        super().__init__(
            content,
            special,
            names=closed,
            pieces=pieces,
            facts=repr((special.bos_id, special.eos_id, special.pad_id)),
        )
        self.losses = json_rules.losses(settings)
        self._theirs = self._continuation = theirs
        without = json_rules.without_prefix(settings)
        if any(settings[part] != without[part] for part in without):
            self._continuation = _object({**settings, **without})
        self.takes_space = {
            i: (token.lstrip, token.rstrip)
            for i, token in added.items()
            if token.special and (token.lstrip or token.rstrip)
        }
        self._cut = json_rules.cut_before_spaces(settings)
        self._closed = np.zeros(len(pieces), bool)
        self._closed[[i for i in closed.values() if i not in unknown]] = True
        if settings['model']['type'] == 'Unigram':  # which finds every piece in text
            self._closed[
                [i for name, i in vocabulary.items() if byte and _BYTE.fullmatch(name)]
            ] = True
        bytes_ = [vocabulary.get(f'<0x{byte:02X}>', -1) for byte in SPACE.encode()]
        self._space_ids = np.array(bytes_, np.int32) if byte else None
        # The library leaves these out without a word.
        self._unspelt = frozenset(
            byte
            for char, byte in BYTES.items()
            if char not in vocabulary and not unknown and json_rules.is_byte_level(settings)
        )
        first = theirs.encode(_BESIDE, add_special_tokens=False).ids
        words = theirs.decoder is None and json_rules.drops_spaces(settings)
        self.dummy_prefix = words or b''.join(pieces[i] for i in first).startswith(b' ')
        spaced = self.dummy_prefix and self._space_follows(closed)
        self.special = dataclasses.replace(special, spaced=spaced)

    def _space_follows(self, closed: Mapping[str, int]) -> bool:
        """The library puts a space before what follows a control token in a text."""
        name = next(iter(closed), None)
        if name is None:
            return True
        theirs = self._theirs
        theirs.encode_special_tokens = False
        try:
            ids = theirs.encode(name + _BESIDE, add_special_tokens=False).ids
        finally:
            theirs.encode_special_tokens = True
        return bool(ids[1:] == theirs.encode(_BESIDE, add_special_tokens=False).ids)

    def _encode(self, text: str, *, continues: bool) -> Iterator[np.ndarray]:
        """Raises UserError for a character whose bytes the vocabulary lacks (control characters
        that its training text did not hold)."""
        if self._unspelt and not self._unspelt.isdisjoint(text.encode()):
            i, char = next(
                (i, char)
                for i, char in enumerate(text)
                if not self._unspelt.isdisjoint(char.encode())
            )
            raise UserError(
                f'this vocabulary has no token for the character U+{ord(char):04X} at {i}: '
                'leave it out'
            )
        theirs = self._continuation if continues else self._theirs
        for part in words_in_parts(text) if self._cut else [text]:
            yield self._ids(part, theirs)
            theirs = self._continuation

    def _ids(self, text: str, theirs: Theirs) -> np.ndarray:
        # Batches alone are encoded without Python's lock: other threads go on meanwhile.
        (fast,) = theirs.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(fast.ids, np.int32)
        closed_n = self._closed[ids]
        if not closed_n.any():
            return ids
        (found,) = theirs.encode_batch([text], add_special_tokens=False)  # with offsets
        # A vocabulary may hold a control token as a word as well: text that spells it is cut. A
        # byte may stand for a character, and is closed to text that spells its name.
        where = [int(i) for i in np.flatnonzero(closed_n)]
        cuts = [
            start + 1
            for i in where
            for start, end in [found.offsets[i]]
            if end > start + 1 and _is_spelled(found.tokens[i], text[start:end])
        ]
        if not cuts:
            if all(_BYTE.fullmatch(found.tokens[i]) for i in where):
                return ids
            raise UserError(f'the text holds {found.tokens[where[0]]!r}, a control token')
        ends = [*cuts, len(text)]
        parts = [text[i:j] for i, j in zip([0, *cuts], ends, strict=True)]
        first = self._ids(parts[0], theirs)
        return np.concatenate([first, *(self._ids(part, self._continuation) for part in parts[1:])])

    @property
    def base_size(self) -> int:
        return int(self._theirs.get_vocab_size(with_added_tokens=False))

    def token_id(self, name: str) -> int | None:
        i: int | None = self._theirs.token_to_id(name)
        return i

    def around(self) -> tuple[tuple[int, ...], str]:
        """Ids that the file puts before a text; and what it puts behind one, in words."""
        plain, whole = (
            self._theirs.encode(_BESIDE, add_special_tokens=marks) for marks in (False, True)
        )
        n = len(plain.ids)
        starts = [i for i in range(len(whole.ids) - n + 1) if whole.ids[i : i + n] == plain.ids]
        if not starts:
            raise UserError(f'{self.FILE} changes a text that it puts tokens around')
        start = starts[0]
        return tuple(whole.ids[:start]), ' '.join(whole.tokens[start + n :])

    def within(self, rows: int) -> tuple[JsonTokenizer, list[str]]:
        """Without tokens that were added behind the `rows` of an embedding, and the names of these.
        Raises UserError where others are there."""
        vocabulary = self._theirs.get_vocab(with_added_tokens=False)
        size = 1 + max(vocabulary.values(), default=-1)
        if size > rows:
            raise too_large(size, rows)
        settings = json.loads(self._content)
        outside = [token for token in settings['added_tokens'] if token['id'] >= rows]
        if not outside:
            return self, []
        settings['added_tokens'] = [t for t in settings['added_tokens'] if t['id'] < rows]
        return JsonTokenizer(_bytes(settings), self.special), [t['content'] for t in outside]

    def with_tokens(self, added: Sequence[Added], special: Special) -> JsonTokenizer:
        """With tokens that other files add, and these special tokens. Raises UserError where they
        contradict the file."""
        settings = json.loads(self._content)
        size, changed = self._theirs.get_vocab_size(), False
        entries = {token['content']: token for token in settings['added_tokens']}
        tokens = sorted(added, key=lambda token: token.id)
        for token in tokens:
            known = self._theirs.token_to_id(token.content)
            entry = entries.get(token.content)
            if known is None and token.id >= self.vocab_size:
                changed = True
                _fill(settings, range(max(size, self.vocab_size), token.id))
                size = token.id + 1
                settings['added_tokens'].append(_entry(token))
            elif known != token.id:
                raise UserError(
                    f'the added token {token.content!r} has the id {token.id}, which is not its id '
                    f'in {self.FILE}'
                )
            elif entry is None:
                changed = True
                settings['added_tokens'].append(_entry(token))
            elif token.special and not entry['special']:
                changed, entry['special'] = True, True
        if not changed and self.special == dataclasses.replace(special, spaced=self.special.spaced):
            return self  # a large one takes seconds to make
        made = JsonTokenizer(_bytes(settings) if changed else self._content, special)
        made._check_ids(tokens)
        return made

    def _extend(self, missing: Sequence[str], rows: int) -> JsonTokenizer:
        settings = json.loads(self._content)
        known = self._theirs.get_vocab()
        base = settings['model']['vocab']
        if isinstance(base, dict):  # a gap would be filled with what is added
            gaps = set(range(max(base.values(), default=-1))) - {*base.values(), *known.values()}
            base |= {f'<row_{i}>': i for i in gaps}
        first = max(rows, self.vocab_size)
        _fill(settings, range(1 + max(known.values(), default=-1), first))
        names = [name if name not in known else other_name(name) for name in missing]
        tokens = [Added(name, first + i) for i, name in enumerate(names)]
        settings['added_tokens'] += map(_entry, tokens)
        new = dict(zip(missing, (token.id for token in tokens), strict=True))
        old = self.special
        special = Special(
            bos_id=new.get('<s>', self._id('<s>', old.bos_id)),
            eos_id=new.get('</s>', self._id('</s>', old.eos_id)),
            pad_id=new.get('<pad>', self._id('<pad>', old.padding)),
            end_ids=old.end_ids,
            spaced=old.spaced,
        )
        made = JsonTokenizer(_bytes(settings), special)
        made._check_ids(tokens)
        return made

    def _id(self, name: str, own: int | None) -> int | None:
        return self.control.get(name, self.control.get(other_name(name))) if own is None else own

    def _check_ids(self, tokens: Sequence[Added]) -> None:
        for token in tokens:
            if self._theirs.token_to_id(token.content) != token.id:
                raise UserError(
                    f'the library gives the added token {token.content!r} another id than '
                    f'{token.id}: correct the ids of added tokens in {self.FILE}'
                )

    def settings(self) -> dict[str, dict[str, Any]]:
        special = self.special
        names = {'bos': special.bos_id, 'eos': special.eos_id, 'pad': special.pad_id}
        tokens = {f'{name}_token': self.names[i] for name, i in names.items() if i is not None}
        ids = {f'{name}_token_id': i for name, i in names.items() if i is not None}
        return {
            'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast', **tokens},
            'generation_config.json': ids | {'eos_token_id': list(self.end_ids)},
        }


def _read(content: bytes, special: Special) -> tuple[Theirs, Content]:
    """The library's object, and the file as the library writes it. Every token of `special` is a
    control token of both."""
    try:
        settings = json.loads(content)
        dropout = settings['model'].get('dropout')
        settings['model']['dropout'] = None  # which draws other ids every time
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'not a tokenizer.json ({error}): copy it again') from None
    theirs = _object(settings if dropout else content)
    added = {i: token.special for i, token in theirs.get_added_tokens_decoder().items()}
    # An end that is a word, such as a line's end, stays one.
    ends = {i for i in special.ends[1:] if i not in added}
    lacking = {i for i in special.ids - ends if not added.get(i)}
    if lacking:
        named = {theirs.id_to_token(i): i for i in lacking}
        entries = {token['content']: token for token in settings.get('added_tokens') or ()}
        for name, i in named.items():
            entries.setdefault(name, _entry(Added(str(name), i)))['special'] = True
        settings['added_tokens'] = list(entries.values())
        theirs = _object(settings)
    return theirs, {**settings, **_steps(theirs)}


def _steps(theirs: Theirs) -> Content:
    """The parts of a file that are not its vocabulary, in the shape that the library writes now."""
    parts = ('normalizer', 'pre_tokenizer', 'decoder')
    found = {part: getattr(theirs, part) for part in parts}
    settings: Content = {
        part: None if step is None else json.loads(step.__getstate__())
        for part, step in found.items()
    }
    flags = ('content', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    settings['added_tokens'] = [
        {'id': i} | {flag: getattr(token, flag) for flag in flags}
        for i, token in sorted(theirs.get_added_tokens_decoder().items())
    ]
    return settings


def _object(settings: Content | bytes) -> Theirs:
    try:
        from tokenizers import Tokenizer as Library
    except ModuleNotFoundError:
        raise UserError(
            f'this tokenizer takes the package tokenizers: {installed.extra("weights")}'
        ) from None
    try:
        content = settings if isinstance(settings, bytes) else _bytes(settings)
        theirs = Library.from_buffer(content)
    except Exception as error:  # tokenizers raises no class of its own
        raise UserError(f'not a tokenizer.json that can be read: {error}') from None
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = True  # what spells one in text is text
    return theirs


def _unknown(model: Content, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The id for what the vocabulary lacks, if any."""
    i = (
        model['unk_id']
        if model.get('unk_id') is not None
        else vocabulary.get(model.get('unk_token') or '')
    )
    return () if i is None else (i,)


def _pieces(
    theirs: Theirs,
    settings: Content,
    vocabulary: Mapping[str, int],
    added: Mapping[int, AddedToken],
) -> list[bytes]:
    """The UTF-8 of every id, b'' where no token has it."""
    pieces = [b''] * (1 + max(vocabulary.values(), default=-1))
    byte_level = json_rules.is_byte_level(settings)
    decoders = {step['type'] for step in json_rules.steps(settings, 'decoder')}
    text_of = functools.partial(_text_of_token, theirs, settings)
    for token, i in vocabulary.items():
        if 'ByteFallback' in decoders and (byte := _BYTE.fullmatch(token)):
            pieces[i] = bytes([int(byte[1], 16)])
        elif i in added:
            pieces[i] = added[i].content.encode()
        elif byte_level and BYTES.keys() >= set(token):
            pieces[i] = bytes(map(BYTES.__getitem__, token))
        else:
            pieces[i] = (token.replace(SPACE, ' ') if byte_level else text_of(token)).encode()
    return pieces


def _text_of_token(theirs: Theirs, settings: Content, token: str) -> str:
    """What a token is in the middle of a text."""
    if theirs.decoder is None:  # the library puts a space between any two
        return f' {token}' if json_rules.drops_spaces(settings) else token.replace(SPACE, ' ')
    if any(step['type'] == 'BPEDecoder' for step in json_rules.steps(settings, 'decoder')):
        return str(theirs.decoder.decode([token, _BESIDE])).removesuffix(_BESIDE)
    text = str(theirs.decoder.decode([_BESIDE, token]))
    known = text.startswith(_BESIDE)
    return text.removeprefix(_BESIDE) if known else token.replace(SPACE, ' ')


def _entry(token: Added) -> Content:
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': token.id, 'content': token.content, **flags, 'special': token.special}


def _fill(settings: Content, ids: range) -> None:
    """Names ids that have no token, so that others come behind them."""
    settings['added_tokens'] += [_entry(Added(f'<row_{i}>', i)) for i in ids]


def _is_spelled(name: str, text: str) -> bool:
    """Whether `text` is the name of its token. Characters that the vocabulary lacks have the tokens
    of their bytes, each of which has all of them as its text."""
    if not _BYTE.fullmatch(name):
        return True
    return unicodedata.normalize('NFKC', text).casefold() == name.casefold()


def _bytes(settings: Content) -> bytes:
    return json.dumps(settings, ensure_ascii=False).encode()
