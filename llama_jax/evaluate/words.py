"""Infilling of text of any language: a word, or some characters, that stand elsewhere as well."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from llama_jax.objectives.asked import Middle
from llama_jax.text.tokenizer import Tokenizer

_UNSPACED = (
    *('CJK', 'IDEOGRAPHIC', 'HIRAGANA', 'KATAKANA', 'KATAKANA-HIRAGANA', 'BOPOMOFO', 'YI'),
    *('THAI', 'LAO', 'KHMER', 'MYANMAR', 'TIBETAN', 'JAVANESE'),
)
"""Scripts, by the names of their characters, that put no space between words."""
_LEAST = 3
"""Characters of a word in a script with spaces."""


def infills(
    pieces: Iterable[np.ndarray], tokenizer: Tokenizer, *, n: int, longest: int, seed: int
) -> list[Middle]:
    """Up to `n` of the pieces, each without one span of 1 to `longest` tokens of its middle half.

    The span is a whole word of three letters or more that the piece holds another time; in a script
    without spaces between words, as Chinese, Japanese or Thai, a run of letters that the piece
    holds another time: of two or more where there is one, else a single one.
    """
    rng = np.random.default_rng(seed)
    found: list[Middle] = []
    for tokens in pieces:
        if len(found) == n:
            break
        spans = list(_spans(tokens, tokenizer, longest))
        longer = [span for span in spans if span[2] > 1] or spans
        if longer:
            start, end, _ = longer[rng.integers(len(longer))]
            found.append(Middle(tokens[:start], tokens[start:end], tokens[end:]))
    return found


def candidates(text: str) -> Counter[str]:
    """How often each span that `infills` could take out stands in a text: words, and of scripts
    without spaces every two letters in a row."""
    found: Counter[str] = Counter()
    for word in _words(text):
        if _unspaced(word[0]):
            found.update(a + b for a, b in itertools.pairwise(word))
        elif len(word) >= _LEAST:
            found[word] += 1
    return found


def pieces_of(text: str) -> Iterator[str]:
    """Words of scripts that put spaces between them, and single characters of those that do not."""
    for word in _words(text):
        if _unspaced(word[0]):
            yield from word
        else:
            yield word


def _spans(
    tokens: np.ndarray, tokenizer: Tokenizer, longest: int
) -> Iterator[tuple[int, int, int]]:
    """(start, end, characters) of the spans to choose from."""
    whole = tokenizer.decode(tokens)
    words = Counter(word for word in _words(whole) if not _unspaced(word[0]))
    texts = [tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    quarter = len(tokens) // 4
    for start in range(quarter, len(tokens) - quarter):
        for end in range(start + 1, min(start + longest, len(tokens) - quarter) + 1):
            text = tokenizer.decode(tokens[start:end])
            word = text.removeprefix(' ')
            if list(_words(word)) != [word]:  # a mark, several words, a part of a character
                continue
            after = texts[end][:1]
            if _unspaced(word[0]):
                apart = not _is_mark(word[0]) and not _is_mark(after)
                if text == word and apart and whole.count(word) > 1:
                    yield start, end, len(word)
            elif (
                len(word) >= _LEAST
                and words[word] > 1
                and (text != word or not _joined(texts[start - 1][-1:]))
                and not _joined(after)
            ):
                yield start, end, len(word)


def _words(text: str) -> Iterator[str]:
    """Runs of letters, marks and digits, of scripts with spaces and of those without apart."""
    for kind, run in itertools.groupby(text, _kind):
        if kind:
            yield ''.join(run)


def _joined(character: str) -> bool:
    """Whether a word of a script with spaces goes on with it."""
    return bool(character) and _kind(character) == 'spaced'


def _is_mark(character: str) -> bool:
    """Whether it belongs to the letter in front of it, as a vowel sign does."""
    return bool(character) and unicodedata.category(character).startswith('M')


def _unspaced(character: str) -> bool:
    return _kind(character) == 'unspaced'


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """'spaced' or 'unspaced' for a character of a word, '' for any other."""
    if character != '_' and unicodedata.category(character)[0] not in 'LMN':
        return ''
    script = unicodedata.name(character, '').split(' ')[0]
    return 'unspaced' if script in _UNSPACED else 'spaced'
