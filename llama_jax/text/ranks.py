"""Vocabularies of ranks (tiktoken's): Llama 3 and 4 as Meta gives them, and Mistral's tekken.

Bytes are merged in the order of the ids of what comes of it. Each is made into a tokenizer.json.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.special import Special
from llama_jax.text.tokenizer_json import JsonTokenizer
from llama_jax.text.words import BYTES, LLAMA3, LLAMA4, by_pattern

_LINE = re.compile(rb'[A-Za-z0-9+/]+=* \d+\s*')
_SPELL = {byte: char for char, byte in BYTES.items()}
"""As str.translate takes it, of bytes that were read as Latin-1."""


def is_ranks(content: bytes) -> bool:
    """A file of lines such as `IQ== 0`."""
    return _LINE.fullmatch(content[:200].partition(b'\n')[0]) is not None


def from_ranks(content: bytes) -> JsonTokenizer:
    """Meta's `tokenizer.model` of Llama 3 or 4, which are told by their number of ranks: neither
    the words nor the special tokens are in the file. Raises UserError for any other."""
    ranks = _ranks(content)
    family = _FAMILIES.get(len(ranks))
    if family is None:
        known = ' and '.join(f'{n:,} ({name})' for n, (name, *_) in _FAMILIES.items())
        raise UserError(
            f'a vocabulary of {len(ranks):,} tiktoken ranks, of which nothing says how text is '
            f'split: known are those of {known}; give the tokenizer.json of the model'
        )
    _, pattern, names, bos, eos, pad, *ends = family
    tokens = {name: len(ranks) + i for i, name in enumerate(names)}
    special = Special(tokens[bos], tokens[eos], tokens[pad], tuple(tokens[end] for end in ends))
    return byte_level(
        dict(zip(map(_spelled, ranks), range(len(ranks)), strict=True)),
        _merges(ranks),
        splitter=by_pattern(pattern),
        control=tokens,
        special=special,
        ignore_merges=True,
        begins=True,
    )


def from_tekken(content: Mapping[str, Any]) -> JsonTokenizer:
    """Mistral's tekken.json: its special tokens come first."""
    config = content['config']
    n = config['default_num_special_tokens']
    named = {token['rank']: token['token_str'] for token in content.get('special_tokens') or ()}
    if not named:
        named = dict(enumerate(_TEKKEN))
    control = {named.get(i, f'<SPECIAL_{i}>'): i for i in range(n)}
    size = config['default_vocab_size'] - n
    ranks = [base64.b64decode(token['token_bytes']) for token in content['vocab'][:size]]
    special = Special(control.get('<s>'), control.get('</s>'), control.get('<pad>'))
    return byte_level(
        {_spelled(rank): n + i for i, rank in enumerate(ranks)},
        _merges(ranks),
        splitter=by_pattern(config['pattern']),
        control=control,
        special=special,
        ignore_merges=True,
        begins=True,
    )


def byte_level(
    tokens: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    splitter: Mapping[str, Any],
    control: Mapping[str, int],
    special: Special,
    whole: Mapping[str, int] | None = None,
    ignore_merges: bool = False,
    begins: bool = False,
) -> JsonTokenizer:
    """A byte-level BPE (Sennrich et al. 2016, on bytes as in Radford et al. 2019).

    Args:
      tokens: id of each token that bytes are merged to, one character of BYTES per byte.
      merges: pairs of tokens, the first is merged first.
      splitter: the pre-tokenizer, as tokenizer.json holds it.
      control: id of each control token by name.
      whole: id of each token that text may spell and that is found before all others.
      begins: bos stands before a text.
      ignore_merges: a word that is a token is that token, whatever the merges say.

    Raises UserError where they do not fit each other.
    """
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    added = [
        {'id': i, 'content': name, **flags, 'special': closed}
        for kind, closed in ((control, True), (whole or {}, False))
        for name, i in kind.items()
    ]
    vocab = {**tokens, **control, **(whole or {})}
    # The library counts added ids from the number of tokens, so none may be missing.
    missing = set(range(max(vocab.values(), default=-1))) - set(vocab.values())
    byte_level_ = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    content = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': sorted(added, key=lambda token: int(str(token['id']))),
        'normalizer': None,
        'pre_tokenizer': splitter,
        'post_processor': _begins_with(special.bos_id, control) if begins else None,
        'decoder': byte_level_ | {'use_regex': False},
        'model': {
            'type': 'BPE',
            'dropout': None,
            'unk_token': None,
            'continuing_subword_prefix': None,
            'end_of_word_suffix': None,
            'fuse_unk': False,
            'byte_fallback': False,
            'ignore_merges': ignore_merges,
            'vocab': vocab | {f'<row_{i}>': i for i in missing},
            'merges': [list(merge) for merge in merges],
        },
    }
    return JsonTokenizer(json.dumps(content, ensure_ascii=False).encode(), special)


def _begins_with(bos_id: int | None, control: Mapping[str, int]) -> dict[str, Any] | None:
    name = next((name for name, i in control.items() if i == bos_id), None)
    if name is None:
        return None
    token = {'SpecialToken': {'id': name, 'type_id': 0}}
    one, other = ({'Sequence': {'id': which, 'type_id': 0}} for which in 'AB')
    return {
        'type': 'TemplateProcessing',
        'single': [token, one],
        'pair': [token, one, token, other],
        'special_tokens': {name: {'id': name, 'ids': [bos_id], 'tokens': [name]}},
    }


def _spelled(token: bytes) -> str:
    return token.decode('latin-1').translate(_SPELL)


def _ranks(content: bytes) -> list[bytes]:
    """The tokens in their order."""
    ranks = []
    for number, line in enumerate(content.splitlines()):
        try:
            token, rank = line.split()
            ranks.append(base64.b64decode(token, validate=True))
            if int(rank) != number:
                raise ValueError(f'rank {int(rank)}')
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f'line {number + 1} of these tiktoken ranks is damaged ({error}): fetch the file '
                'whole'
            ) from None
    return ranks


def _merges(ranks: Sequence[bytes]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of what they make: the lowest rank is
    merged first, however it comes about."""
    order = {token: i for i, token in enumerate(ranks)}
    spelled = {token: _spelled(token) for token in ranks}
    merges = []
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        found = [pair for pair in pairs if pair[0] in order and pair[1] in order]
        found.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in found]
    return merges


def _reserved(prefix: str, ids: range) -> list[str]:
    return [f'<|{prefix}reserved_special_token_{i}|>' for i in ids]


_LLAMA3 = [
    *(
        '<|begin_of_text|>',
        '<|end_of_text|>',
        *_reserved('', range(2)),
        '<|finetune_right_pad_id|>',
    ),
    *('<|step_id|>', '<|start_header_id|>', '<|end_header_id|>', '<|eom_id|>', '<|eot_id|>'),
    *('<|python_tag|>', '<|image|>', *_reserved('', range(2, 246))),
]
_LLAMA4 = [
    *('<|begin_of_text|>', '<|end_of_text|>', '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>'),
    *('<|header_start|>', '<|header_end|>', '<|eom|>', '<|eot|>', '<|step|>'),
    *_reserved('text_post_train_', range(6)),
    *('<|python_start|>', '<|python_end|>', '<|finetune_right_pad|>'),
    *_reserved('text_post_train_', range(8, 69)),
    *('<|image_start|>', '<|image_end|>', *_reserved('vision_', range(2))),
    *('<|tile_x_separator|>', '<|tile_y_separator|>', *_reserved('vision_', range(2, 6))),
    *('<|image|>', *_reserved('vision_', range(6, 7)), '<|patch|>'),
    *_reserved('vision_', range(7, 1048)),
    *_reserved('reasoning_', range(8)),
    *('<|reasoning_thinking_start|>', '<|reasoning_thinking_end|>'),
]
_LLAMA4 += _reserved('', range(2048 - len(_LLAMA4)))
_TEKKEN = ('<unk>', '<s>', '</s>', '[INST]', '[/INST]', '[AVAILABLE_TOOLS]', '[/AVAILABLE_TOOLS]',
           '[TOOL_RESULTS]', '[/TOOL_RESULTS]', '[TOOL_CALLS]', '<pad>')  # fmt: skip
_FAMILIES: dict[int, tuple[Any, ...]] = {
    128_000: (
        *('Llama 3', LLAMA3, _LLAMA3, '<|begin_of_text|>', '<|end_of_text|>'),
        *('<|finetune_right_pad_id|>', '<|eom_id|>', '<|eot_id|>'),
    ),
    200_000: (
        *('Llama 4', LLAMA4, _LLAMA4, '<|begin_of_text|>', '<|end_of_text|>'),
        *('<|finetune_right_pad|>', '<|eom|>', '<|eot|>'),
    ),
}
"""By their number of ranks: name, pattern, special tokens; bos, eos, pad and the other ends."""
