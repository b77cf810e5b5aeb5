"""The texts that every arm is measured on (host): chosen by seed, the same for all."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.objectives.asked import Middle
from llama_jax.text.tokenizer import Tokenizer

Record = dict[str, str]  # text, module, package, docstring, body, as data/python_corpus.py has them

PARTS = ('train', 'validation', 'test')
_SHARES = (0.6, 0.15, 0.25)
_BLOCK = 8
"""Characters per token of a block: more than any text needs, so that a block fills a chunk."""
_NAME = re.compile(r' ?[^\W\d]\w{2,}')


class Chunk(NamedTuple):
    tokens: np.ndarray
    label: int
    module: str


class Topics(NamedTuple):
    """Classification: of which package is this piece of source code?"""

    names: tuple[str, ...]
    train: list[Chunk]
    validation: list[Chunk]
    test: list[Chunk]


class Pairs(NamedTuple):
    """Texts of which the i-th of `a` belongs to the i-th of `b`."""

    a: list[np.ndarray]
    b: list[np.ndarray]
    document: np.ndarray
    """Number of the document of each pair [n]: the other pairs of one are no wrong answers."""


def topics(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    n_topics: int,
    per_topic: int,
    length: int,
    seed: int,
) -> Topics:
    """Chunks of the packages with most modules; every module stands in one part only.

    Args:
      records: one per module.
      per_topic: most chunks of a topic over all parts: 60% to train, 15% to validation (to choose
        the layer), 25% to test.
      length: most tokens of a chunk.
    """
    modules: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        modules[record['package']].append(record)
    # A package of few modules cannot be in three parts.
    names = [name for name, n in _ranked(modules) if n >= 4][:n_topics]
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Chunk]] = {part: [] for part in PARTS}
    for label, name in enumerate(sorted(names)):
        mine = sorted(modules[name], key=lambda record: record['module'])
        mine = [mine[i] for i in rng.permutation(len(mine))]
        n_test = max(1, round(_SHARES[2] * len(mine)))
        n_validation = max(1, round(_SHARES[1] * len(mine)))
        cut = {
            'test': mine[:n_test],
            'validation': mine[n_test : n_test + n_validation],
            'train': mine[n_test + n_validation :],
        }
        for part, share in zip(PARTS, _SHARES, strict=True):
            blocks = [
                [(record['module'], block) for block in _blocks(record['text'], length * _BLOCK)]
                for record in cut[part]
            ]
            for module, block in spread(blocks, round(share * per_topic), rng):
                parts[part].append(Chunk(tokenizer.encode(block)[:length], label, module))
    return Topics(tuple(sorted(names)), **parts)


def span_pairs(documents: Sequence[np.ndarray], *, n: int, length: int, seed: int) -> Pairs:
    """Two spans that do not overlap, of each of up to `n` pieces of `documents` (token arrays).

    A piece is at most four spans long; one span comes from its first half, one from the other.
    """
    rng = np.random.default_rng(seed)
    pieces = [
        [(i, piece) for piece in _pieces(tokens, 4 * length, least=16)]
        for i, tokens in enumerate(documents)
    ]
    chosen = spread(pieces, n, rng)

    def span(half: np.ndarray) -> np.ndarray:
        start = int(rng.integers(max(len(half) - length, 0) + 1))
        return half[start : start + length]

    halves = [np.array_split(piece, 2) for _, piece in chosen]
    a, b = [span(h[0]) for h in halves], [span(h[1]) for h in halves]
    return Pairs(a, b, np.array([i for i, _ in chosen], np.int32))


def docstring_pairs(
    records: Iterable[Record], tokenizer: Tokenizer, *, n: int, length: int, seed: int
) -> Pairs:
    """Docstrings of up to `n` functions and the bodies, the first `length` tokens of each.

    Of functions with equal docstrings or equal bodies the first is taken: no other can be told.
    """
    seen: set[str] = set()
    functions = []
    for record in records:
        docstring, body = record['docstring'], record['body']
        if len(docstring) < 20 or not body.strip() or docstring in seen or body in seen:
            continue
        seen |= {docstring, body}
        functions.append(record)
    order = np.random.default_rng(seed).permutation(len(functions))[:n]

    def tokens(name: str) -> list[np.ndarray]:
        texts = [functions[i][name][: length * _BLOCK] for i in order]
        return [tokenizer.encode(text)[:length] for text in texts]

    return Pairs(tokens('docstring'), tokens('body'), np.arange(len(order), dtype=np.int32))


def windows(documents: Sequence[np.ndarray], *, n: int, length: int, seed: int) -> list[np.ndarray]:
    """Up to `n` pieces of exactly `length` tokens, spread over the documents."""
    pieces = [
        [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        for tokens in documents
    ]
    return spread(pieces, n, np.random.default_rng(seed))


def thirds(pieces: Iterable[np.ndarray], *, middle: int) -> list[Middle]:
    """Each piece with its middle of `middle` tokens apart."""
    cut = []
    for tokens in pieces:
        start = (len(tokens) - middle) // 2
        cut.append(Middle(tokens[:start], tokens[start : start + middle], tokens[start + middle :]))
    return cut


def infills(
    pieces: Iterable[np.ndarray], tokenizer: Tokenizer, *, n: int, longest: int, seed: int
) -> list[Middle]:
    """Up to `n` of the pieces, each without one name in its middle half: one that stands elsewhere
    in the piece too, of 1 to `longest` tokens, no keyword of Python."""
    rng = np.random.default_rng(seed)
    found: list[Middle] = []
    for tokens in pieces:
        if len(found) == n:
            break
        spans = list(_names(tokens, tokenizer, longest))
        if spans:
            start, end = spans[rng.integers(len(spans))]
            found.append(Middle(tokens[:start], tokens[start:end], tokens[end:]))
    return found


def digest(examples: Any) -> str:
    """Hash of nested lists and tuples of arrays, numbers and text: 16 hexadecimal digits."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            hashed.update(f'[{len(value)}'.encode())
            for item in value:
                add(item)
        elif isinstance(value, np.ndarray):
            hashed.update(f'{value.shape}'.encode() + value.astype('<i8').tobytes())
        else:
            hashed.update(repr(value).encode())

    add(examples)
    return hashed.hexdigest()[:16]


def spread(groups: Sequence[Sequence[Any]], n: int, rng: np.random.Generator) -> list[Any]:
    """Up to `n` items, in turn one of each group, so that no large group outweighs the others."""
    queues = [[group[i] for i in rng.permutation(len(group))] for group in groups]
    taken: list[Any] = []
    while len(taken) < n and any(queues):
        for i in rng.permutation(len(queues)):
            if queues[i] and len(taken) < n:
                taken.append(queues[i].pop())
    return taken


def _ranked(modules: dict[str, list[Record]]) -> list[tuple[str, int]]:
    """(package, modules), most first, ties by name."""
    counts = Counter({name: len(found) for name, found in modules.items()})
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _blocks(text: str, size: int) -> Iterator[str]:
    """Pieces of whole lines, each of `size` characters or a little more."""
    block = ''
    for line in text.splitlines(keepends=True):
        block += line
        if len(block) >= size:
            yield block
            block = ''
    if len(block) >= size // 2:
        yield block


def _pieces(tokens: np.ndarray, size: int, *, least: int) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), size):
        piece = tokens[start : start + size]
        if len(piece) >= least:
            yield piece


def _names(tokens: np.ndarray, tokenizer: Tokenizer, longest: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the tokens in the middle half that spell a whole name, and nothing else."""
    words = Counter(re.findall(r'\w+', tokenizer.decode(tokens)))
    texts = [tokenizer.decode(tokens[i : i + 1]) for i in range(len(tokens))]
    quarter = len(tokens) // 4
    for start in range(quarter, len(tokens) - quarter):
        for end in range(start + 1, min(start + longest, len(tokens) - quarter) + 1):
            text = tokenizer.decode(tokens[start:end])
            name = text.strip()
            if (
                _NAME.fullmatch(text)
                and (text.startswith(' ') or not _in_word(texts[start - 1][-1:]))
                and not _in_word(texts[end][:1])
                and words[name] > 1
                and name != 'self'
                and not keyword.iskeyword(name)
            ):
                yield start, end


def _in_word(character: str) -> bool:
    return character.isalnum() or character == '_'
