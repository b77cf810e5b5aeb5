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
"""Control tokens before the prefix, the suffix and the middle, and those that end a middle besides
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
    known = {name: token for name, token in vocabulary.control.items() if token < ids}
    names, ends = marks
    if not all(name in known for name in names):
        return None
    prefix, suffix, middle = (known[name] for name in names)
    return Infill(prefix, suffix, middle, tuple(known[name] for name in ends if name in known))
