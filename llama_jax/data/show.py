"""Batches as text for people: rows, their segments, and which tokens bear loss."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from rich.text import Text

from llama_jax.data.encoded import Records
from llama_jax.data.loader import Loader
from llama_jax.data.order import Block
from llama_jax.data.packing import stream_of
from llama_jax.data.recipe import Batch
from llama_jax.text.tokenizer import Tokenizer

_VISIBLE = {'\n': '↵', '\t': '⇥', ' ': ' ', '\u200c': '\u200c', '\u200d': '\u200d'}
_ORDINARY, _LOSS, _OTHER_LOSS, _CONTROL = 'dim', 'green', 'yellow', 'bold magenta'


def batches(loader: Loader, tokenizer: Tokenizer, n: int, *, plain: bool) -> Iterator[Text]:
    """Lines that show the first `n` batches of a loader from its beginning. What bears loss is
    coloured, or where it is to be `plain`, stands in brackets, with its weight where that is not 1.
    """
    yield _legend(plain)
    origins = loader.origins()
    for number, batch in enumerate(itertools.islice(loader, n), start=1):
        rows = len(next(value for key, value in batch.items() if key != 'cursor'))
        for row in range(rows):
            yield Text(f'batch {number}, row {row + 1} of {rows}: {_filled(batch, row)}', 'bold')
            for segment, block in enumerate(next(origins), start=1):
                yield Text(f'  {segment}: {_origin(loader, block)}')
                for label, ids, weights in _readings(batch, row, segment):
                    yield Text(f'     {label} ').append(
                        marked(tokenizer, ids, weights, plain=plain)
                    )


def _legend(plain: bool) -> Text:
    if plain:
        return Text('⟦ ⟧ bears loss, ⟦0.5: ⟧ of that weight; ↵ is a line end')
    return Text.assemble(
        ('loss of weight 1', _LOSS),
        (' of another weight ', _OTHER_LOSS),
        ('none ', _ORDINARY),
        ('control token', _CONTROL),
        '; ↵ is a line end',
    )


def examples(loader: Loader, tokenizer: Tokenizer, n: int, *, plain: bool) -> Iterator[Text]:
    """Lines that show the first `n` examples of a loader from its beginning, marked as by
    `batches`: where each is from, and its tokens."""
    yield _legend(plain)
    for number, (block, batch) in enumerate(itertools.islice(loader.examples(), n), start=1):
        used = {
            stream_of(key): np.count_nonzero(value)
            for key, value in batch.items()
            if key.endswith('segments')
        }
        said = ', '.join(
            f'{count} tokens{f" of {name}" if name else ""}' for name, count in used.items()
        )
        yield Text(f'example {number}: {loader.origin(block)}, {said}', 'bold')
        for label, ids, weights in _readings(batch, 0, 1):
            yield Text(f'  {label} ').append(marked(tokenizer, ids, weights, plain=plain))
        for key, value in _beside(batch):
            yield Text(f'  {key} {value:g}')


def _beside(batch: Batch) -> Iterator[tuple[str, float]]:
    """What an example has besides tokens, and the same at each of them, such as a label."""
    for key, values in batch.items():
        if key.rpartition('/')[2] not in ('inputs', 'targets', 'weights', 'segments', 'positions'):
            there = np.unique(values[0][batch[f'{stream_of(key)}/segments'.lstrip('/')][0] > 0])
            if len(there) == 1:
                yield key, float(there[0])


def marked(
    tokenizer: Tokenizer, ids: Sequence[int], weights: Sequence[float], *, plain: bool
) -> Text:
    """The text of tokens, marked by the loss that each bears."""
    line = Text()
    shown = list(zip(spelled(tokenizer, ids), ids, weights, strict=True))
    for weight, run in itertools.groupby(shown, key=lambda token: float(token[2])):
        tokens = list(run)
        if plain:
            text = ''.join(text for text, *_ in tokens)
            opening = '⟦' if weight == 1 else f'⟦{weight:.3g}:'
            line.append(f'{opening}{text}⟧' if weight else text)
            continue
        style = {0.0: _ORDINARY, 1.0: _LOSS}.get(weight, _OTHER_LOSS)
        for text, token, _ in tokens:
            line.append(text, style if tokenizer.byte_lengths[token] else f'{style} {_CONTROL}')
    return line


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What to print for each token: its text, or its name. A character of several tokens stands at
    the last of them, and bytes that are none as \\xe4."""
    names = {number: name for name, number in tokenizer.control.items()}
    shown: list[str] = []
    pending = b''
    for token in map(int, ids):
        data = tokenizer.token_bytes(token)
        if data:
            text, pending = _decoded(pending + data)
            shown.append(text)
            continue
        if shown:
            shown[-1] += _escaped(pending)
        shown.append(names.get(token, f'<id {token}>'))
        pending = b''
    if pending:
        shown[-1] += _escaped(pending)
    return shown


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The text of the bytes, and the beginning of a character at their end."""
    text = ''
    while data:
        try:
            return text + _visible(data.decode()), b''
        except UnicodeDecodeError as error:
            text += _visible(data[: error.start].decode())
            if error.reason == 'unexpected end of data':
                return text, data[error.start :]
            text += _escaped(data[error.start : error.end])
            data = data[error.end :]
    return text, b''


def _escaped(data: bytes) -> str:
    return ''.join(f'\\x{byte:02x}' for byte in data)


def _visible(text: str) -> str:
    """The text on one line, without what moves the cursor of a terminal or turns its direction."""
    return ''.join(
        _VISIBLE.get(c) or (c if c.isprintable() or unicodedata.category(c) == 'Zs' else _code(c))
        for c in text
    )


def _code(character: str) -> str:
    return character.encode('unicode_escape').decode()


def _filled(batch: Batch, row: int) -> str:
    """How many segments a row has, and how much of each stream is padding."""
    segments = {key: value[row] for key, value in batch.items() if key.endswith('segments')}
    count = max(int(of_stream.max()) for of_stream in segments.values())
    padding = ', '.join(
        f'{f"{stream_of(key)} " if stream_of(key) else ""}{np.mean(of_stream == 0):.1%} padding'
        for key, of_stream in segments.items()
    )
    return f'{count} segment{"s" if count != 1 else ""}, {padding}'


def _origin(loader: Loader, block: Block) -> str:
    texts = loader.texts[block.source]
    length = texts.length(block.document)
    part = (
        'whole' if block.stop - block.start >= length else f'tokens {block.start} to {block.stop}'
    )
    if isinstance(texts, Records):
        return f'{loader.origin(block)}, epoch {block.epoch} ({length} tokens)'
    return (
        f'{loader.labels[block.source]}, epoch {block.epoch}, document {block.document} '
        f'({length} tokens), {part}'
    )


def _readings(
    batch: Batch, row: int, segment: int
) -> Iterator[tuple[str, Sequence[int], Sequence[float]]]:
    """What is shown of a segment: (label, ids, weights) for each stream."""
    for key in batch:
        if key.rpartition('/')[2] != 'inputs':
            continue
        stream = key.removesuffix('inputs')
        here = batch[f'{stream}segments'][row] == segment
        ids = batch[key][row][here].tolist()
        name = stream.rstrip('/')
        name = f'{name} ' if name else ''
        if f'{stream}targets' not in batch:
            yield f'{name}reads', ids, [0.0] * len(ids)
            continue
        targets = batch[f'{stream}targets'][row][here].tolist()
        if f'{stream}weights' not in batch:  # a loss that weighs by itself
            yield f'{name}reads', ids, [0.0] * len(ids)
            continue
        weights = batch[f'{stream}weights'][row][here].tolist()
        following = zip(targets, weights, ids[1:], strict=False)
        if all(target == later for target, weight, later in following if weight):
            shown = ids + (targets[-1:] if any(weights[-1:]) else [])
            yield f'{name}text', shown, [0.0, *weights][: len(shown)]
        else:
            yield f'{name}reads', ids, [0.0] * len(ids)
            chosen = [(t, w) for t, w in zip(targets, weights, strict=True) if w]
            yield f'{name}predicts', [t for t, _ in chosen], [w for _, w in chosen]
