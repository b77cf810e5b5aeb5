"""What the parts of a tokenizer.json do to text. Its shape is that which `tokenizers` writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from llama_jax.text.tokenizer import SPACE_IN_BYTES
from llama_jax.text.words import PATTERNS

Content = dict[str, Any]

_REVERSIBLE_WORDS = ('ByteLevel', 'Metaspace', 'Split', 'Digits', 'Punctuation', 'UnicodeScripts')
_PER_CHARACTER = ('NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'Prepend')
"""Normalizers for which a space that stands between two words parts a text."""


def steps(content: Content, part: str) -> Iterator[Content]:
    """The normalizers, pre_tokenizers or decoders of a file, those of sequences one by one."""
    waiting = [content.get(part)]
    while waiting:
        step = waiting.pop(0)
        if step and step['type'] == 'Sequence':
            inner = next(value for key, value in step.items() if key != 'type')
            waiting = [*inner, *waiting]
        elif step:
            yield step


def is_byte_level(content: Content) -> bool:
    """Tokens spell bytes as characters."""
    parts = ('normalizer', 'pre_tokenizer', 'decoder')
    return any(step['type'] == 'ByteLevel' for part in parts for step in steps(content, part))


def falls_back_to_bytes(content: Content) -> bool:
    """Every character that the vocabulary lacks is spelled by tokens such as <0xE2>."""
    model = content['model']
    if not model.get('byte_fallback'):
        return False
    return _spellings(content) >= {f'<0x{byte:02X}>' for byte in range(256)}


def _spellings(content: Content) -> set[str]:
    """Of every token of the vocabulary."""
    vocab = content['model']['vocab']
    return set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}


def losses(content: Content) -> tuple[str, ...]:
    """What happens to text that decoding does not undo, in words."""
    found = [*_of_normalizers(content), *_of_words(content)]
    model = content['model']
    if model.get('end_of_word_suffix') or model.get('continuing_subword_prefix'):
        found.append('spaces between words are not kept')
    if not is_byte_level(content) and not falls_back_to_bytes(content):
        found.append('characters that it lacks become one unknown token, or nothing')
    for token in content['added_tokens']:
        if not token['special'] and (token['lstrip'] or token['rstrip']):
            found.append(f'spaces around {token["content"]} are left out')
    return tuple(dict.fromkeys(found))


def _of_normalizers(content: Content) -> Iterator[str]:
    for step in steps(content, 'normalizer'):
        kind = step['type']
        if kind == 'Replace' and _is_mark(step):
            yield from _of_mark(content, step['content'])
        elif kind not in ('Prepend', 'ByteLevel'):
            yield f'characters are changed ({kind})'


def _of_words(content: Content) -> Iterator[str]:
    if drops_spaces(content):
        yield 'white space is left out'
    for step in steps(content, 'pre_tokenizer'):
        kind = step['type']
        if kind == 'Metaspace':
            yield from _of_mark(content, step['replacement'])
        if step.get('add_prefix_space') or step.get('prepend_scheme', 'never') != 'never':
            yield 'a space at the beginning of a text is lost'


def _of_mark(content: Content, mark: str) -> Iterator[str]:
    """What becomes of the character that stands for a space."""
    if not falls_back_to_bytes(content):
        yield f'U+{ord(mark):04X} becomes a space'
    elif mark not in _spellings(content):
        yield SPACE_IN_BYTES


def drops_spaces(content: Content) -> bool:
    """White space between words is in no token."""
    return any(
        step['type'] not in _REVERSIBLE_WORDS or step.get('behavior') == 'Removed'
        for step in steps(content, 'pre_tokenizer')
    )


def _is_mark(step: Content) -> bool:
    """A `Replace` of spaces by one character that stands for them."""
    return step['pattern'] == {'String': ' '} and len(step['content']) == 1


def without_prefix(content: Content) -> Content:
    """The same file, but nothing is put before a text."""
    content = copy.deepcopy({key: content[key] for key in ('normalizer', 'pre_tokenizer')})
    normalizer = content['normalizer']
    if normalizer and normalizer['type'] == 'Prepend':
        content['normalizer'] = None
    elif normalizer and normalizer['type'] == 'Sequence':
        inner = [step for step in normalizer['normalizers'] if step['type'] != 'Prepend']
        content['normalizer'] = {'type': 'Sequence', 'normalizers': inner}
    for step in steps(content, 'pre_tokenizer'):
        if step.get('add_prefix_space'):
            step['add_prefix_space'] = False
        if 'prepend_scheme' in step:
            step['prepend_scheme'] = 'never'
    return content


def cut_before_spaces(content: Content) -> bool:
    """A space between two words parts a text: either side has the ids that it has in the whole."""
    for step in steps(content, 'normalizer'):
        if step['type'] not in _PER_CHARACTER and not (
            step['type'] == 'Replace' and _is_mark(step)
        ):
            return False
    for token in content['added_tokens']:
        if not token['special'] and (
            ' ' in token['content'] or token['lstrip'] or token['rstrip'] or token['single_word']
        ):
            return False
    splits = False
    for step in steps(content, 'pre_tokenizer'):
        kind = step['type']
        if kind == 'Split':
            splits = step['pattern'].get('Regex') in PATTERNS and step['behavior'] == 'Isolated'
            if not splits:
                return False
        elif kind == 'ByteLevel':
            splits |= step['use_regex']
        elif kind == 'Metaspace':
            splits |= step['split']
        elif kind not in ('Digits', 'Punctuation'):
            return False
    return splits
