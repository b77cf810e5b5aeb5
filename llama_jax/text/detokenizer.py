"""The text of a stream of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_BROKEN = '\N{REPLACEMENT CHARACTER}'


class Detokenizer:
    """Turns tokens into text as they arrive, and never breaks a character.

    A character's UTF-8 bytes may lie in several tokens: what ends in the midst of one is held back
    until the rest is there (or `finish` says that there is none). All pieces joined are the text of
    all tokens. Only a few tokens are decoded at a time, so long streams stay fast.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, prompt: Sequence[int] = ()):
        """`decode` gives the text of token ids, with U+FFFD for bytes that are no character. Text
        continues that of `prompt`: tokenizers which drop the space before the first word keep it.
        """
        self._decode = decode
        self._ids = list(prompt)
        self._start = 0  # the window that is decoded: text before it is out, and is not looked at
        self._shown = len(self._ids)  # tokens whose text is out

    def __call__(self, tokens: Iterable[int]) -> str:
        """The text that `tokens` complete; may be empty."""
        self._ids.extend(tokens)
        text = self._text()
        return '' if text.endswith(_BROKEN) else self._show(text)

    def finish(self) -> str:
        """What was held back."""
        return self._show(self._text())

    def _text(self) -> str:
        known = self._decode(self._ids[self._start : self._shown]).rstrip(_BROKEN)
        return self._decode(self._ids[self._start :])[len(known) :]

    def _show(self, text: str) -> str:
        # The window keeps the tokens of the last text, without which a tokenizer might take the
        # next word for the first one.
        if text:
            self._start = self._shown
        self._shown = len(self._ids)
        return text
