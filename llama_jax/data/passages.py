"""Queries and passages as people's files have them.

Triplets of sentence-transformers (`anchor`, `positive`, `negative`, `negative_1`, ..., `set`),
lists of FlagEmbedding (`query`, `pos`, `neg`) and Tevatron (`query`, `positive_passages`, and
`negative_passages`), DPR (`question`, `positive_ctxs`, `hard_negative_ctxs`), and pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama_jax.data.record import BadRecordError, QueryPassages

_QUERIES = ('query', 'anchor', 'question', 'query_text')
_POSITIVES = (
    *('positive_passages', 'positive_ctxs', 'positives', 'positive', 'pos'),
    *('passage', 'document', 'answer', 'response'),
)
_NEGATIVES = ('negative_passages', 'hard_negative_ctxs', 'negatives', 'negative', 'neg')
_RANDOM = 'negative_ctxs'
"""Of DPR: passages of other queries, for a file without hard ones."""
_NUMBERED = re.compile(r'negative_(\d+)')
_BY_ID = ('positive_document_ids', 'negative_document_ids')


def query_passages(fields: Mapping[str, Any]) -> QueryPassages:
    """The record that the fields hold. A negative that is among the positives is left out. Raises
    BadRecordError, which names the field."""
    if isinstance(fields.get('set'), list | tuple):  # texts that are all alike
        texts = [_passage(one, f'set[{i}]') for i, one in enumerate(fields['set'])]
        if len(set(texts)) < 2:
            raise BadRecordError('set has less than two texts')
        return QueryPassages(texts[0], _once(texts[1:], left_out=texts[:1]))
    for name in _BY_ID:
        if fields.get(name):
            raise BadRecordError(f'{name} are of another file: give the texts of the passages')
    query = _first(fields, _QUERIES)
    positive = _first(fields, _POSITIVES)
    if query is None or positive is None:
        there = ', '.join(map(str, fields))[:200] or 'nothing'
        raise BadRecordError(
            f'no {"query" if query is None else "passage"} (there: {there}; needed: query, '
            'positive and perhaps negative; --data.sources.N.rename maps other names)'
        )
    asked = _passage(fields[query], query)
    positives = _once(_passages(fields[positive], positive))
    if not positives:
        raise BadRecordError(f'{positive} is empty')
    numbered = sorted((name for name in fields if _NUMBERED.fullmatch(name)), key=_number)
    hard = [name for name in (*_NEGATIVES, *numbered) if name in fields]
    names = hard or [name for name in (_RANDOM,) if name in fields]
    negatives = [text for name in names for text in _passages(fields[name], name)]
    return QueryPassages(asked, positives, _once(negatives, left_out=positives))


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in fields), None)


def _number(name: str) -> int:
    return int(name.removeprefix('negative_'))


def _once(texts: list[str], left_out: tuple[str, ...] | list[str] = ()) -> tuple[str, ...]:
    return tuple(text for text in dict.fromkeys(texts) if text not in left_out)


def _passages(value: Any, name: str) -> list[str]:
    """One passage, or several of them."""
    if not isinstance(value, list | tuple):
        return [_passage(value, name)]
    return [_passage(one, f'{name}[{i}]') for i, one in enumerate(value)]


def _passage(value: Any, name: str) -> str:
    """A text, or a text with its title, which stands before it."""
    if isinstance(value, Mapping):
        title, value, name = value.get('title') or '', value.get('text'), f'{name}.text'
        if not isinstance(title, str):
            raise BadRecordError(f'{name.removesuffix("text")}title is no text')
        if isinstance(value, str) and title.strip():
            value = f'{title} {value}'
    if not isinstance(value, str):
        raise BadRecordError(f'{name} is no text ({type(value).__name__})')
    if not value.strip():
        raise BadRecordError(f'{name} is empty')
    return value
