"""The text of a stream of tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence

_BROKEN = '\N{REPLACEMENT CHARACTER}'
_MOST = 4
"""Bytes of a character."""


class Detokenizer:
    """Turns tokens into text as they arrive, and never breaks a character.

    A character's UTF-8 bytes may lie in several tokens: they are held back until the last is there.
    Bytes that make no character become U+FFFD, as everywhere; those of a character that never
    became whole, because the text ended or the prompt did, make nothing. Every token is looked at
    once.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        prompt: Sequence[int] = (),
        drop_space: bool = False,
    ):
        """`token_bytes` gives the UTF-8 of a token, b'' for control tokens. Text continues that of
        `prompt`, of which nothing is repeated. `drop_space`: a space that begins the text is the
        tokenizer's and not part of it."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._drop_space = drop_space
        end = b''
        for token in reversed(prompt):
            if len(end) >= _MOST:
                break
            end = token_bytes(token) + end
        self._decoder.decode(end[-_MOST:])
        self._begun, _ = self._decoder.getstate()
        """What the prompt has of its last character, and what came to it since."""

    def __call__(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete; may be empty."""
        data = b''.join([self._token_bytes(token) for token in tokens])
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b' ')
        text = self._decoder.decode(data)
        if self._begun:
            self._begun += data
            if not text:
                return ''
            # The prompt showed its broken end already.
            if text[0] == _BROKEN and not self._begun.startswith(_BROKEN.encode()):
                text = text[1:]
            self._begun = b''
        return text
