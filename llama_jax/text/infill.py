"""Prompts for the text between a prefix and a suffix, in the form that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.text.vocabulary import Vocabulary

_MARKS = (
    # Qwen's coders, CodeGemma and others.
    (
        ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>'),
        ('<|fim_pad|>', '<|endoftext|>', '<|file_sep|>', '<|repo_name|>', '<|file_separator|>'),
    ),
    # StarCoder, StarCoder 2, Granite, Stable Code.
    (
        ('<fim_prefix>', '<fim_suffix>', '<fim_middle>'),
        ('<fim_pad>', '<|endoftext|>', '<file_sep>', '<repo_name>'),
    ),
    # Code Llama.
    (('▁<PRE>', '▁<SUF>', '▁<MID>'), ('▁<EOT>',)),
    # DeepSeek Coder: its hole stands where the suffix begins.
    (('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>'), ('<|EOT|>',)),
)
"""Tokens before the prefix, the suffix and the middle, and those that end a middle besides
the end of a text."""
_OWN = (('<prefix>', '<suffix>', '<middle>'), ('<eom>',))


@dataclass(frozen=True)
class Infill:
    """The marks of one model, as token ids."""

    prefix: int
    suffix: int
    middle: int
    ends: tuple[int, ...]
    """Any of them ends a middle."""
    suffix_first: bool = False
    """<prefix> <suffix> S <middle> P, for a model that has seen no other order (SPM), instead of
    <prefix> P <suffix> S <middle> (PSM)."""
    spaced: bool = True
    """The prefix is encoded as a text of its own, with the space that the vocabulary puts before
    every text (Code Llama)."""

    def prompt(
        self, prefix: str | Sequence[int], suffix: str, vocabulary: Vocabulary
    ) -> tuple[int, ...]:
        """What asks for the text between, without a begin token."""
        if isinstance(prefix, str):
            prefix = vocabulary.encode(prefix, continues=not self.spaced).tolist()
        after = vocabulary.encode(suffix, continues=True).tolist()
        if self.suffix_first:
            return (self.prefix, self.suffix, *after, self.middle, *prefix)
        return (self.prefix, *prefix, self.suffix, *after, self.middle)


def by_vocabulary(vocabulary: Vocabulary, *, ids: int) -> Infill | None:
    """That of weights of others, whose vocabulary names the marks; None where it has none, or the
    model no embedding of them. `ids`: how many the model knows."""
    return next(filter(None, (_found(marks, vocabulary, ids) for marks in _MARKS)), None)


def own(vocabulary: Vocabulary, *, suffix_first: bool) -> Infill:
    """That of a model which the objective FillInMiddle has trained."""
    (prefix, suffix, middle), (end,) = (
        [vocabulary.control[name] for name in names] for names in _OWN
    )
    return Infill(prefix, suffix, middle, (end,), suffix_first, spaced=False)


def _found(
    marks: tuple[tuple[str, ...], tuple[str, ...]], vocabulary: Vocabulary, ids: int
) -> Infill | None:
    names, ends = (
        [token for name in part if (token := _token(name, vocabulary, ids)) is not None]
        for part in marks
    )
    if len(names) < len(marks[0]):
        return None
    prefix, suffix, middle = names
    return Infill(prefix, suffix, middle, tuple(ends))


def _token(name: str, vocabulary: Vocabulary, ids: int) -> int | None:
    """The token of a name: of control, or one that is found in text (Qwen's marks, and those of
    Meta's files of Code Llama, where U+2581 stands for a space)."""
    token = vocabulary.control.get(name)
    for text in (name, name.replace('\u2581', ' ')):
        found = vocabulary.encode(text, continues=True).tolist() if token is None else []
        if len(found) == 1 and vocabulary.token_bytes(found[0]) == text.encode():
            (token,) = found
    return token if token is not None and token < ids else None
