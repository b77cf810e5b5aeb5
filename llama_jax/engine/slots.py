"""The slots of the KV cache, and all else that the device holds of running sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.engine.prefixes import Prefixes
from llama_jax.engine.slot_programs import SlotPrograms
from llama_jax.generate.controls import Controls
from llama_jax.generate.decode import Drawn, State
from llama_jax.generate.prefill import padded
from llama_jax.generate.programs import Programs, bucket, is_cpu
from llama_jax.generate.settings import Settings, history_of, rows_of
from llama_jax.generate.speculative.draft import Heads, Lookup
from llama_jax.generate.speculative.verify import Counts
from llama_jax.model.cache import Cache, slots_needed
from llama_jax.model.config import by_length
from llama_jax.model.patterns import Dense, Window

_NO_END = np.iinfo(np.int32).max
"""Of a ring, where each token takes the place of an old one."""

log = logging.getLogger(__name__)


class Slots:
    """A batch whose rows, the slots, are filled, run and emptied one by one. Every call returns at
    once, with arrays that the device is yet to compute. Use it under the mesh of its programs.

    On a CPU each slot's keys and values are arrays of their own, and a step computes no more than
    the slots that run, up to a power of two. An accelerator reads all weights for one row as for
    many, and likes few large operations: there all slots are one array, and all are in every step.

    Attributes:
        piece: tokens of a prompt that are read at a time, at most.
        sizes: numbers of slots that steps are compiled for, the smallest first.
        prefixes: what each slot holds of which prompt.
    """

    prefixes: Prefixes
    _caches: list[Cache]
    """Parts of the cache: keys and values of so many slots each."""
    _rest: State
    """All else that steps need, of all slots."""
    _settings: Settings

    def __init__(
        self,
        programs: Programs,
        *,
        rows: int,
        length: int,
        source_length: int,
        prefill_chunk: int,
        steps: int,
        speculate: Lookup | Heads | None,
    ):
        """Sizes are those of Engine. Memory is taken at once."""
        config = programs.config
        if not isinstance(config.pattern, Dense | Window):
            log.info('pattern %s: the cache holds whole rows', config.pattern)
        self.rows, self.length, self.source_length = rows, length, source_length
        self._programs, self._speculate = programs, speculate
        self.piece = min(prefill_chunk, bucket(length))
        self._drafts = speculate.n_draft if speculate else 0
        longest = length + self._drafts  # drafts are written too
        needed = slots_needed(config, length=longest, piece=self.piece)
        self._room = -(-needed // self.piece) * self.piece
        ring = self._room < longest
        # What an encoder read is in the keys and values of a prompt too, or the length of the text.
        self.shares = not (ring or config.encoder_layers or by_length(config.rope_scaling))
        """Prompts that begin alike may share what is read of them."""
        self._holds = not ring
        self._part = 1 if is_cpu(programs.mesh) else rows
        self.sizes = sizes_up_to(rows) if self._part == 1 else (rows,)
        self._on = SlotPrograms(programs.model, steps=steps, speculate=speculate)
        log.info(
            'engine: %d rows of %d tokens, %.0f MB of keys and values beside %.0f MB of parameters',
            *(
                rows,
                length,
                programs.cache_bytes(rows=rows, slots=self._room + source_length) / 1e6,
            ),
            sum(x.nbytes for x in jax.tree.leaves(programs.params)) / 1e6,
        )
        self.reset()

    def reset(self) -> None:
        """Every slot empty."""
        programs, rows, vocab = self._programs, self.rows, self._programs.config.vocab
        self.prefixes = Prefixes(rows, self.piece)
        settings = rows_of([], lengths=[], rows=rows, end_ids=(), vocab=vocab, bias=True)
        self._allowed_BC = np.full((rows, -(-vocab // 8)), 255, np.uint8)
        zeros = np.zeros(rows, np.int32)
        nothing = history_of([], rows=rows, vocab=vocab)
        text_BS = np.zeros((rows, self.length), np.int32) if self._speculate else None
        draft_BK = None
        if isinstance(self._speculate, Heads):
            draft_BK = np.full((rows, self._speculate.n_draft), -1, np.int32)
        self._settings, zero_B, done_B, history, text_BS, draft_BK = jax.tree.map(
            programs.place, (settings, zeros, np.ones(rows, bool), nothing, text_BS, draft_BK)
        )
        with jax.set_mesh(programs.mesh):
            self._caches = [self._empty() for _ in range(rows // self._part)]
        self._rest = State(
            *(Cache([]), zero_B, jnp.copy(zero_B), done_B, history, text_BS), draft_BK=draft_BK
        )

    def _empty(self) -> Cache:
        programs, rows = self._programs, self._part
        cache = programs.empty(batch=rows, slots=self._room)
        if not self.source_length:
            return cache
        return replace(cache, cross=programs.empty_cross(batch=rows, slots=self.source_length))

    def warm(self) -> None:
        """Compile the steps of every size. All slots have to be free."""
        for size in self.sizes:
            _, drawn, _ = self._steps([], size, 1)
            jax.block_until_ready(drawn)
            batch, logits_BV = self._ahead([], size)
            jax.block_until_ready(self.choose(batch, logits_BV, []))

    def read_source(self, slot: int, source: Sequence[int]) -> None:
        """The encoder reads what the prompt of this slot goes with."""
        programs = self._programs
        length = min(bucket(len(source)), self.source_length)
        token_BS, _ = padded([source], 1, length, programs.model.pad_id)
        i, row = divmod(slot, self._part)
        self._caches[i], self._rest = self._on.read_source(
            *(programs.params, self._caches[i], self._rest, row, slot, token_BS, len(source))
        )

    def read(self, slot: int, prompt: Sequence[int], at: int, n: int, limit: int) -> jax.Array:
        """Read `n` tokens of a prompt from place `at` on; their features [1, T, D], padded. The
        text will have `limit` tokens at most."""
        programs = self._programs
        token_BT, _ = padded(
            [prompt[at : at + n]], 1, min(bucket(n), self.piece), programs.model.pad_id
        )
        i, row = divmod(slot, self._part)
        self._caches[i], self._rest, x_BTD = self._on.read(
            *(programs.params, self._caches[i], self._rest, row, slot, token_BT, at, limit),
            self._room - self._drafts if self._holds else _NO_END,
            first=at == 0,
        )
        if self._holds:
            self.prefixes.hold(slot, prompt[: at + n])
        return x_BTD

    def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        controls: Controls,
        x_BTD: jax.Array,
        last: int,
    ) -> Drawn:
        """Draw the first token after a prompt, from the features of its last piece, at `last`."""
        programs, vocab = self._programs, self._programs.config.vocab
        own = rows_of(
            [controls],
            lengths=[len(prompt)],
            rows=1,
            end_ids=programs.end_ids,
            vocab=vocab,
            bias=True,
        )
        allowed_BC = self._allowed_BC[slot : slot + 1].copy()
        history = history_of([prompt], rows=1, vocab=vocab)
        text_BS = None
        if self._speculate:
            text_BS, _ = padded([prompt], 1, self.length, programs.model.pad_id)
        self._rest, self._settings, drawn = self._on.begin(
            *(programs.params, self._rest, self._settings, slot, x_BTD, last, len(prompt)),
            *jax.tree.map(programs.place, (own, allowed_BC, history, text_BS)),
        )
        return drawn

    def allow(self, slot: int, mask_V: np.ndarray | None) -> None:
        """The only tokens that a slot may draw next, where its tokens are chosen; None: any."""
        self._allowed_BC[slot] = 255
        if mask_V is not None:
            self._allowed_BC[slot] = np.packbits(mask_V, bitorder='little')

    def size(self, n: int) -> int:
        """Rows of the smallest step that takes `n` slots."""
        return next(size for size in self.sizes if size >= n)

    def steps(
        self, slots: Sequence[int], n: int, *, may_draft: bool = True
    ) -> tuple[list[int], Drawn, Counts | None]:
        """Up to `n` decode steps of these slots. Which slot each row of what is drawn belongs to:
        there may be others among them, which nothing is drawn for."""
        return self._steps(slots, self.size(len(slots)), n, may_draft=may_draft)

    def _steps(
        self, slots: Sequence[int], size: int, n: int, *, may_draft: bool = True
    ) -> tuple[list[int], Drawn, Counts | None]:
        batch, slot_B, parts = self._batch(slots, size)
        dead_B = np.array([slot not in slots for slot in batch])
        caches, self._rest, drawn, counts = self._on.steps(
            *(self._programs.params, [self._caches[i] for i in parts], self._rest),
            *(self._settings, slot_B, dead_B, n, may_draft),
        )
        for i, cache in zip(parts, caches, strict=True):
            self._caches[i] = cache
        for x in jax.tree.leaves((drawn, counts)):
            x.copy_to_host_async()
        return batch, drawn, counts

    def ahead(self, slots: Sequence[int]) -> tuple[list[int], jax.Array]:
        """The first half of a decode step of these slots: logits [B, V] of what follows. Which slot
        each row belongs to, as in `steps`. Where no second half comes, the next step begins anew.
        """
        return self._ahead(slots, self.size(len(slots)))

    def _ahead(self, slots: Sequence[int], size: int) -> tuple[list[int], jax.Array]:
        batch, slot_B, parts = self._batch(slots, size)
        caches, logits_BV = self._on.ahead(
            self._programs.params, [self._caches[i] for i in parts], self._rest, slot_B
        )
        for i, cache in zip(parts, caches, strict=True):
            self._caches[i] = cache
        return batch, logits_BV

    def choose(self, batch: Sequence[int], logits_BV: jax.Array, slots: Sequence[int]) -> Drawn:
        """The second half: draw an allowed token for those of `batch` that are in `slots`."""
        slot_B = None if len(batch) == self.rows else np.array(batch, np.int32)
        live_B = np.array([slot in slots for slot in batch])
        self._rest, drawn = self._on.choose(
            *(self._rest, self._settings, slot_B, logits_BV, self._allowed_BC[list(batch)], live_B)
        )
        for x in jax.tree.leaves(drawn):
            x.copy_to_host_async()
        return drawn

    def _batch(
        self, slots: Sequence[int], size: int
    ) -> tuple[list[int], np.ndarray | None, list[int]]:
        """Of a step of `size` rows: these slots and others, as an array too (None: all), and the
        parts of the cache that hold them."""
        spare = [slot for slot in range(self.rows) if slot not in slots]
        batch = sorted([*slots, *spare[: size - len(slots)]])
        slot_B = None if size == self.rows else np.array(batch, np.int32)
        return batch, slot_B, [batch[i] // self._part for i in range(0, size, self._part)]

    def copy(self, source: int, slot: int) -> None:
        """Keys and values of another slot."""
        (i, row), (j, source_row) = divmod(slot, self._part), divmod(source, self._part)
        other = None if i == j else self._caches[j]
        self._caches[i] = self._on.copy(self._caches[i], row, other, source_row)

    def clear(self, slot: int) -> None:
        """Zeros, where keys and values may be no numbers, which would reach the next text there:
        what nobody sees is multiplied by 0, not left out."""
        i, row = divmod(slot, self._part)
        self._caches[i] = self._on.clear(self._caches[i], row)
        self.prefixes.hold(slot, ())

    def scores(self, x_BTD: jax.Array, following: Sequence[int]) -> Drawn:
        """Log-probabilities of the tokens that follow each of a piece."""
        token_BT = np.zeros((1, x_BTD.shape[1]), np.int32)
        token_BT[0, : len(following)] = following
        return self._on.scores(self._programs.params, x_BTD, token_BT)


def sizes_up_to(rows: int) -> tuple[int, ...]:
    """Powers of two below `rows`, and `rows`."""
    powers = (1 << i for i in range(rows.bit_length()))
    return (*(n for n in powers if n < rows), rows)
