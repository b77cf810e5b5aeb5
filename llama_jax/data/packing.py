"""Packing examples into rows of fixed length, with segments and positions."""

from collections.abc import Callable

import numpy as np

from llama_jax.errors import UserError

Example = dict[str, np.ndarray]  # arrays of one length, keys such as inputs, targets, weights
Layout = dict[str, tuple[np.dtype, int]]  # key to (dtype, padding)


def layout_of(example: Example, *, pad_id: int) -> Layout:
    """Integers become int32 and the rest float32; inputs and targets are padded with `pad_id`."""
    layout = {}
    for key, values in example.items():
        dtype = np.dtype(np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32)
        layout[key] = dtype, pad_id if key.endswith(('inputs', 'targets')) else 0
    return layout


def empty_rows(layout: Layout, *, rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """Rows [rows, T] of nothing but padding: weight 0, segment 0."""
    arrays = {key: np.full((rows, seq_len), pad, dtype) for key, (dtype, pad) in layout.items()}
    for key in ('segments', 'positions'):
        arrays[key] = np.zeros((rows, seq_len), np.int32)
    return arrays


class Packer:
    """Packs the examples of document 0, 1, 2, ... one after another.

    Its whole state is `cursor`: (documents consumed, tokens already taken of the next one).

    Args:
        examples: the examples of the k-th document, or None after the last one.
        layout: key to (dtype, padding).
        seq_len: length T of a row.
        splittable: True fills each row to the brim, the rest of an example opening the next row as
            a segment of its own. False keeps examples whole: one that does not fit begins the next
            row, and one longer than T raises UserError.
        patience: documents in a row that may give no example at all before UserError.
        cursor: where to begin.
    """

    def __init__(
        self,
        examples: Callable[[int], list[Example] | None],
        *,
        layout: Layout,
        seq_len: int,
        splittable: bool,
        patience: int,
        cursor: tuple[int, int] = (0, 0),
    ) -> None:
        self._examples_of = examples
        self._layout = layout
        self._seq_len = seq_len
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
        filled, segment = 0, 0
        while filled < self._seq_len and (example := self._next_example()) is not None:
            length = self._length(example)
            room = self._seq_len - filled
            if length > room and not self._splittable:
                break
            take = min(length, room)
            segment += 1
            here = slice(filled, filled + take)
            for key in self._layout:
                rows[key][index, here] = example[key][:take]
            rows['segments'][index, here] = segment
            rows['positions'][index, here] = np.arange(take)
            self._advance(take)
            filled += take
        return filled > 0

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
        if example.keys() != self._layout.keys():
            raise ValueError(
                f'examples with keys {[*example]} and {[*self._layout]} in one data set'
            )
        lengths = {len(values) for values in example.values()}
        if len(lengths) != 1:
            raise ValueError(f'an example with arrays of different lengths: {sorted(lengths)}')
        (length,) = lengths
        if length > self._seq_len and not self._splittable:
            raise UserError(
                f'an example of {length} tokens does not fit in a row of {self._seq_len}: raise '
                'the sequence length'
            )
        return length


def _tail(example: Example, start: int) -> Example:
    return {key: values[start:] for key, values in example.items()} if start else example
