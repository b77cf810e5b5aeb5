"""The texts that every arm is measured on (host): chosen by seed, the same for all."""

from __future__ import annotations

import hashlib
import keyword
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.evaluate.near import Near
from llama_jax.objectives.asked import Middle
from llama_jax.text.tokenizer import Tokenizer

_SHARES = (0.6, 0.15, 0.25)
"""Of the groups, and of the chunks, to fit on, to choose by, and to measure on."""
_BLOCK = 8
"""Characters per token of a block: more than any text needs, so that a block fills a chunk."""
_LEAST = 4
"""Groups of a topic that are needed for three parts."""
_RUN = 4
"""Tokens that are shuffled among themselves."""
_TRIED = 8
"""Chunks that are looked at for each that is wanted: a corpus that repeats itself has an end."""
_NAME = re.compile(r' ?[^\W\d]\w{2,}')


class Record(NamedTuple):
    """A document that was held out of training."""

    text: str
    group: str
    """What it is a part of, such as a module or a book: no group is in two parts of a probe."""
    label: str = ''
    pair: tuple[str, str] = ('', '')
    """Two texts that belong together."""
    selection: bool = False
    """Whether choices have seen it, such as that of a learning rate: no figure is taken on it."""
    grouped: bool = False
    """Whether `group` is a field of it, and not its own place."""


class Chunk(NamedTuple):
    tokens: np.ndarray
    label: int
    group: str


class Labelled(NamedTuple):
    """Classification: chunks to fit on, to choose by, and to measure on."""

    names: tuple[str, ...]
    train: list[Chunk]
    validation: list[Chunk]
    test: list[Chunk]


class Pairs(NamedTuple):
    """Texts of which the i-th of `a` belongs to the i-th of `b`."""

    a: list[np.ndarray]
    b: list[np.ndarray]
    document: np.ndarray
    """Name of the document of each pair, text [n]: the other pairs of one are no wrong answers."""
    cluster: np.ndarray
    """What each pair is of that is independent of the others, text [n]: the document, or its group.
    """


class Window(NamedTuple):
    tokens: np.ndarray
    document: str
    """Name of the document that it is of."""


def topics(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    n_topics: int,
    per_topic: int,
    length: int,
    seed: int,
) -> Labelled:
    """Chunks of the labels with most groups; every group stands in one part only, and no chunk
    nearly repeats another.

    Args:
      per_topic: most chunks of a topic over all parts: 60% to train, 15% to validation (to choose
        the layer), 25% to test.
      length: most tokens of a chunk.
    """
    of_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_label[record.label].append(record)
    groups = Counter({name: len({r.group for r in mine}) for name, mine in of_label.items()})
    ranked = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    rng = np.random.default_rng(seed)
    seen = Near()
    chosen: dict[str, list[list[Chunk]]] = {}
    for name, n in ranked:
        if n < _LEAST or not name or len(chosen) == n_topics:
            continue
        parts = [
            _chunks(part, round(share * per_topic), tokenizer, length, seen, rng)
            for part, share in zip(_parted(of_label[name], rng), _SHARES, strict=True)
        ]
        if all(parts):
            chosen[name] = parts
    names = tuple(sorted(chosen))
    found: tuple[list[Chunk], ...] = ([], [], [])
    for label, name in enumerate(names):
        for whole, part in zip(found, chosen[name], strict=True):
            whole.extend(chunk._replace(label=label) for chunk in part)
    return Labelled(names, *found)


def order(
    records: Sequence[Record], tokenizer: Tokenizer, *, n: int, length: int, seed: int
) -> Labelled:
    """Up to `n` chunks of `length` tokens, each once as it is (label 0) and once with every four
    tokens in a row shuffled (label 1): the same tokens, so that what tells them apart is their
    order. No group is in two parts, and no chunk nearly repeats another."""
    rng = np.random.default_rng(seed)
    seen = Near()
    found = []
    for part, share in zip(_parted(records, rng), _SHARES, strict=True):
        chunks = _chunks(part, round(share * n), tokenizer, length, seen, rng)
        whole = [chunk for chunk in chunks if len(chunk.tokens) == length]
        found.append(
            [each for c in whole for each in (c, Chunk(_shuffled(c.tokens, rng), 1, c.group))]
        )
    return Labelled(('as it is', 'shuffled'), *found)


def _shuffled(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each run of four tokens in another order, where they are not all the same."""
    tokens = tokens.copy()
    for start in range(0, len(tokens) - _RUN + 1, _RUN):
        run = tokens[start : start + _RUN].copy()
        while len(set(run.tolist())) > 1 and (tokens[start : start + _RUN] == run).all():
            tokens[start : start + _RUN] = rng.permutation(run)
    return tokens


def _parted(records: Sequence[Record], rng: np.random.Generator) -> list[list[Record]]:
    """The records of 60, 15 and 25% of the groups, at least one each; the last are of groups that
    no choice has seen."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    names = sorted(groups)
    names = [names[i] for i in rng.permutation(len(names))]
    fresh = [name for name in names if not any(record.selection for record in groups[name])]
    n_test = max(1, round(_SHARES[2] * len(names)))
    n_validation = max(1, round(_SHARES[1] * len(names)))
    test = fresh[:n_test]
    rest = [name for name in names if name not in set(test)]
    cut = rest[n_validation:], rest[:n_validation], test
    return [sorted(record for name in part for record in groups[name]) for part in cut]


def _chunks(
    records: Sequence[Record],
    n: int,
    tokenizer: Tokenizer,
    length: int,
    seen: Near,
    rng: np.random.Generator,
) -> list[Chunk]:
    """Up to `n` chunks with label 0, in turn one of each record."""
    blocks = [
        [(record.group, block) for block in _blocks(record.text, length * _BLOCK)]
        for record in records
    ]
    chunks: list[Chunk] = []
    for group, block in spread(blocks, _TRIED * n, rng):
        if len(chunks) == n:
            break
        # A text may be a single long line.
        tokens = tokenizer.encode(block[: length * _BLOCK])[:length]
        if not seen.repeats(tokens):
            chunks.append(Chunk(tokens, 0, group))
    return chunks


def span_pairs(
    documents: Sequence[np.ndarray],
    *,
    n: int,
    length: int,
    seed: int,
    names: Sequence[str] | None = None,
) -> Pairs:
    """Two spans that do not overlap, of each of up to `n` pieces of `documents` (token arrays),
    whose names are numbers where none are given.

    A piece is at most four spans long; one span comes from its first half, one from the other. No
    piece nearly repeats another: its span would be a right answer too.
    """
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(len(documents))] if names is None else names
    pieces = [
        [(name, piece) for piece in _pieces(tokens, 4 * length, least=16)]
        for name, tokens in zip(names, documents, strict=True)
    ]
    seen = Near()
    chosen: list[tuple[str, np.ndarray]] = []
    for name, piece in spread(pieces, _TRIED * n, rng):
        if len(chosen) == n:
            break
        if not seen.repeats(piece):
            chosen.append((name, piece))

    def span(half: np.ndarray) -> np.ndarray:
        start = int(rng.integers(max(len(half) - length, 0) + 1))
        return half[start : start + length]

    halves = [np.array_split(piece, 2) for _, piece in chosen]
    a, b = [span(h[0]) for h in halves], [span(h[1]) for h in halves]
    document = np.array([name for name, _ in chosen], str)
    return Pairs(a, b, document, document)


def text_pairs(
    records: Iterable[Record], tokenizer: Tokenizer, *, n: int, length: int, seed: int
) -> Pairs:
    """Up to `n` pairs of texts that belong together, such as docstrings of functions and bodies,
    the first `length` tokens of each.

    Of pairs with equal first or equal second texts the first is taken: no other can be told.
    """
    seen: set[str] = set()
    pairs: list[Record] = []
    for record in records:
        one, other = record.pair
        if len(one.encode()) < 20 or not other.strip() or one in seen or other in seen:
            continue
        seen |= {one, other}
        pairs.append(record)
    order = np.random.default_rng(seed).permutation(len(pairs))[:n]

    def tokens(side: int) -> list[np.ndarray]:
        texts = [pairs[i].pair[side][: length * _BLOCK] for i in order]
        return [tokenizer.encode(text)[:length] for text in texts]

    document = np.array([str(i) for i in range(len(order))], str)
    return Pairs(tokens(0), tokens(1), document, np.array([pairs[i].group for i in order], str))


def windows(
    documents: Sequence[np.ndarray],
    *,
    n: int,
    length: int,
    seed: int,
    names: Sequence[str] | None = None,
) -> list[Window]:
    """Up to `n` pieces of exactly `length` tokens, spread over the documents, whose names are
    numbers where none are given."""
    names = [str(i) for i in range(len(documents))] if names is None else names
    pieces = [
        [Window(tokens[i : i + length], name) for i in range(0, len(tokens) - length + 1, length)]
        for name, tokens in zip(names, documents, strict=True)
    ]
    return spread(pieces, n, np.random.default_rng(seed))


def thirds(pieces: Iterable[np.ndarray], *, middle: int) -> list[Middle]:
    """Each piece with its middle of `middle` tokens apart."""
    cut = []
    for tokens in pieces:
        start = (len(tokens) - middle) // 2
        cut.append(Middle(tokens[:start], tokens[start : start + middle], tokens[start + middle :]))
    return cut


def candidates(text: str) -> Counter[str]:
    """How often each name that `infills` could take out stands in a text."""
    names = (name.strip() for name in _NAME.findall(text))
    return Counter(name for name in names if _is_name(name))


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
    """Hash of nested lists, tuples and dicts of arrays, numbers and text: 16 hexadecimal digits."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            hashed.update(f'[{len(value)}'.encode())
            for item in value:
                add(item)
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, np.ndarray) and value.dtype.kind in 'iub':
            hashed.update(f'{value.shape}'.encode() + value.astype('<i8').tobytes())
        elif isinstance(value, np.ndarray):
            add(value.tolist())
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
                and _is_name(name)
            ):
                yield start, end


def _is_name(word: str) -> bool:
    return word != 'self' and not keyword.iskeyword(word)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == '_'
