"""Packing examples into rows of fixed length, with segments and positions."""

from collections.abc import Callable, Mapping

import numpy as np

from llama_jax.errors import UserError

Example = dict[str, np.ndarray]
"""Arrays such as inputs, targets, weights. Those of a second stream are named 'STREAM/inputs'; the
arrays of one stream have one length."""
Layout = dict[str, tuple[np.dtype, int]]  # key to (dtype, padding)
Lengths = Mapping[str, int]  # stream to the length of a row; '' is the stream without a name


def layout_of(example: Example, *, pad_id: int) -> Layout:
    """Integers become int32 and the rest float32; inputs and targets are padded with `pad_id`."""
    layout = {}
    for key, values in example.items():
        dtype = np.dtype(np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32)
        layout[key] = dtype, pad_id if key.endswith(('inputs', 'targets')) else 0
    return layout


def empty_rows(layout: Layout, *, rows: int, lengths: Lengths) -> dict[str, np.ndarray]:
    """Rows [rows, T] of nothing but padding: weight 0, segment 0."""
    arrays = {
        key: np.full((rows, lengths[_stream(key)]), pad, dtype)
        for key, (dtype, pad) in layout.items()
    }
    for stream, length in lengths.items():
        for name in ('segments', 'positions'):
            arrays[_key(stream, name)] = np.zeros((rows, length), np.int32)
    return arrays


class Packer:
    """Packs the examples of document 0, 1, 2, ... one after another.

    Its whole state is `cursor`: (documents consumed, tokens already taken of the next one).

    Args:
        examples: the examples of the k-th document, or None after the last one.
        layout: key to (dtype, padding).
        lengths: length T of a row of each stream.
        splittable: True fills each row to the brim, the rest of an example opening the next row as
            a segment of its own. False keeps examples whole: one that does not fit in every stream
            begins the next row, and one longer than T raises UserError.
        segments: most examples in a row; 0: as many as fit.
        patience: documents in a row that may give no example at all before UserError.
        cursor: where to begin.
    """

    def __init__(
        self,
        examples: Callable[[int], list[Example] | None],
        *,
        layout: Layout,
        lengths: Lengths,
        splittable: bool,
        patience: int,
        segments: int = 0,
        cursor: tuple[int, int] = (0, 0),
    ) -> None:
        self._examples_of = examples
        if splittable and len(lengths) != 1:
            raise ValueError(f'examples of several streams ({[*lengths]}) cannot be split')
        self._layout = layout
        self._lengths = lengths
        self._segments = segments
        self._splittable = splittable
        self._patience = patience
        self._consumed, self._taken = cursor
        self._pending: list[Example] | None = None  # what is left of the current document

    @property
    def cursor(self) -> tuple[int, int]:
        """(documents consumed, tokens already taken of the next one)."""
        return self._consumed, self._taken

    def fill(self, rows: dict[str, np.ndarray], index: int) -> bool:
        """Writes the next row to `rows[key][index]` [T], all padding so far. False: all is read."""
        filled = dict.fromkeys(self._lengths, 0)
        segment = 0
        while not self._segments or segment < self._segments:
            room = {stream: self._lengths[stream] - filled[stream] for stream in filled}
            if not all(room.values()) or (example := self._next_example()) is None:
                break
            size = self._sizes(example)
            if self._splittable:
                size = {stream: min(size[stream], room[stream]) for stream in size}
            elif any(size[stream] > room[stream] for stream in size):
                break
            segment += 1
            for key in self._layout:
                start, n = filled[_stream(key)], size[_stream(key)]
                rows[key][index, start : start + n] = example[key][:n]
            for stream, n in size.items():
                here = slice(filled[stream], filled[stream] + n)
                rows[_key(stream, 'segments')][index, here] = segment
                rows[_key(stream, 'positions')][index, here] = np.arange(n)
                filled[stream] += n
            self._advance(max(size.values()))
        return segment > 0

    def _next_example(self) -> Example | None:
        """What is left of the example at the cursor; None after the last document."""
        if self._pending is None:
            self._pending = self._load()
        return self._pending[0] if self._pending else None

    def _load(self) -> list[Example]:
        """The rest of the first document from the cursor on that has any; [] after the last."""
        for _ in range(self._patience):
            examples = self._examples_of(self._consumed)
            if examples is None:
                return []
            rest = [example for example in examples if self._length(example)]
            skip = self._taken
            while rest and skip >= self._length(rest[0]):
                skip -= self._length(rest[0])
                rest.pop(0)
            if rest:
                return [_tail(rest[0], skip), *rest[1:]]
            self._consumed, self._taken = self._consumed + 1, 0
        raise UserError(
            f'{self._patience} documents in a row gave no example for this objective: they are too '
            'short or empty; use other data'
        )

    def _advance(self, tokens: int) -> None:
        assert self._pending
        first = self._pending[0]
        self._taken += tokens
        if tokens < self._length(first):
            self._pending[0] = _tail(first, tokens)
            return
        self._pending.pop(0)
        if not self._pending:
            self._consumed, self._taken, self._pending = self._consumed + 1, 0, None

    def _length(self, example: Example) -> int:
        """Tokens by which the cursor counts: those of the longest stream."""
        return max(self._sizes(example).values())

    def _sizes(self, example: Example) -> dict[str, int]:
        """Length of the example in each stream."""
        if example.keys() != self._layout.keys():
            raise ValueError(
                f'examples with keys {[*example]} and {[*self._layout]} in one data set'
            )
        sizes: dict[str, int] = {}
        for key, values in example.items():
            if sizes.setdefault(_stream(key), len(values)) != len(values):
                lengths = {key: len(values) for key, values in example.items()}
                raise ValueError(f'an example with arrays of different lengths: {lengths}')
        for stream, size in sizes.items():
            if size > self._lengths[stream] and not self._splittable:
                raise UserError(
                    f'an example of {size} tokens does not fit in a row of '
                    f'{self._lengths[stream]}: raise the sequence length'
                )
        return sizes


def _tail(example: Example, start: int) -> Example:
    return {key: values[start:] for key, values in example.items()} if start else example


def _stream(key: str) -> str:
    """The stream of an array: what stands before the last '/'."""
    return key.rpartition('/')[0]


def _key(stream: str, name: str) -> str:
    return f'{stream}/{name}' if stream else name
