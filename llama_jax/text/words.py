"""How byte-level vocabularies split text into words, by the names that GGUF files give."""

from __future__ import annotations

from typing import Any

from llama_jax.errors import UserError


def _alphabet() -> dict[str, int]:
    """Character -> byte. Bytes that print stand for themselves, the rest follow from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _alphabet()
"""Files of byte-level vocabularies spell each byte as one printable character (as GPT-2 did)."""

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r'\s*[\r\n]+|\s+(?!\S)|\s+'
_LATER = r'[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|' + _SPACES
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'


def _by_case(ending: str, digits: str) -> str:
    """Words that begin anew where a capital follows a small letter."""
    words = (
        rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}'
        rf'|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}'
    )
    return rf'{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|' + _SPACES


LLAMA3 = f'{_ENGLISH}|' + _LATER % r'\p{N}{1,3}'
QWEN2 = f'{_ENGLISH}|' + _LATER % r'\p{N}'
LLAMA4 = _by_case(f'{_ENGLISH}?', r'\p{N}{1,3}')
TEKKEN = _by_case('', r'\p{N}')
_DEEPSEEK_V3 = (
    r'\p{N}{1,3}',
    '[一-龥぀-ゟ゠-ヿ]+',
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r'| ?[\p{P}\p{S}]+[\r\n]*|' + _SPACES,
)
_DEEPSEEK_CODER = (r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', '[一-龥ࠀ-一가-퟿]+', r'\p{N}')

_GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
_SPELL = _GPT2 | {'use_regex': False}


def by_pattern(*patterns: str) -> dict[str, Any]:
    """A pre-tokenizer as tokenizer.json holds it: what matches is a word, in one pattern after the
    other."""
    splits = [
        {'type': 'Split', 'pattern': {'Regex': p}, 'behavior': 'Isolated', 'invert': False}
        for p in patterns
    ]
    return {'type': 'Sequence', 'pretokenizers': [*splits, _SPELL]}


_DIGITS = {
    'type': 'Sequence',
    'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _GPT2],
}
_SPLITTERS: dict[tuple[str, ...], dict[str, Any]] = {
    ('gpt-2', 'mpt', 'olmo', 'jais', 'trillion', 'granite-docling', 'phi-2'): _GPT2,
    ('smollm', 'starcoder', 'refact', 'command-r', 'codeshell', 'exaone', 'minerva-7b'): _DIGITS,
    ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'falcon-h1', 'pixtral', 'midm-2.0', 'lfm2'): (
        by_pattern(LLAMA3)
    ),
    ('smaug-bpe', 'dbrx', 'chatglm-bpe', 'glm4'): by_pattern(LLAMA3),
    ('qwen2', 'stablelm2', 'deepseek-r1-qwen', 'megrez', 'hunyuan'): by_pattern(QWEN2),
    ('llama4', 'gpt-4o'): by_pattern(LLAMA4),
    ('tekken',): by_pattern(TEKKEN),
    ('deepseek-v3',): by_pattern(*_DEEPSEEK_V3),
    ('deepseek-coder',): by_pattern(*_DEEPSEEK_CODER),
}
_BY_NAME = {name: splitter for names, splitter in _SPLITTERS.items() for name in names}
WHOLE_WORDS = (
    'llama-bpe',
    'llama3',
    'llama-v3',
    'falcon3',
    'falcon-h1',
    'pixtral',
    'midm-2.0',
    'lfm2',
    'tekken',
    'llama4',
    'gpt-4o',
)
"""Where a word that is a token is that token, whatever the merges say."""
PATTERNS = frozenset({LLAMA3, QWEN2, LLAMA4, TEKKEN, *_DEEPSEEK_V3, *_DEEPSEEK_CODER})
"""Of which every word begins at a space that stands between two words, if not before."""


def name_of(pre_tokenizer: Any, *, whole_words: bool) -> str | None:
    """What a GGUF file calls this part of a tokenizer.json; None where it has no name. See
    WHOLE_WORDS."""
    own = _effective(pre_tokenizer)
    for name, known in _BY_NAME.items():
        if _effective(known) == own and (name in WHOLE_WORDS) == whole_words:
            return name
    return None


def _effective(part: Any) -> Any:
    """The settings of a pre-tokenizer that change ids."""
    if isinstance(part, list):
        return [_effective(x) for x in part]
    if not isinstance(part, dict):
        return part
    parts = part.get('pretokenizers', [])
    if len(parts) == 1:
        return _effective(parts[0])
    return {name: _effective(x) for name, x in part.items() if name != 'trim_offsets'}


def splitter(name: str) -> dict[str, Any]:
    """The pre-tokenizer, as tokenizer.json holds it, of a name in a GGUF file."""
    if name not in _BY_NAME:
        raise UserError(
            f'text is split by {name!r} in this vocabulary, which is not supported: '
            f'{", ".join(_BY_NAME)}'
        )
    return _BY_NAME[name]
