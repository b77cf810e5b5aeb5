"""Log-probabilities of continuations: common beginnings are read once, all else in full batches.

The sequences of all requests form a tree. Its branches are written one after the other into one row
for each shard of the batch, and a mask by ancestry keeps them apart, so that nothing is padded but
the end of a batch, and no key is copied. A run that is too long to stand in one piece with its
branches, such as the examples in front of all questions, is read into the cache once, and the
branches behind it, piece after piece.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax import layout
from llama_jax.errors import UserError
from llama_jax.generate import decode as decode_lib
from llama_jax.generate.decode import Model
from llama_jax.generate.programs import Programs, check_prompt, power_of_two
from llama_jax.generate.tree import Asked, Node, Strip, chain, grow, packed
from llama_jax.mesh import batch_shards
from llama_jax.model.cache import Cache
from llama_jax.model.config import by_length
from llama_jax.model.layers import Params
from llama_jax.model.patterns import Dense

PIECES = (128, 192, 256, 384, 512, 768, 1024)
"""Tokens of a row that are read at once: of these the one with which least is padded."""
READ_OUT = 256
"""Places of a row whose logits are formed at once, at most."""
TOKENS = 8192
"""Tokens of a batch without shared beginnings, at most, where a row has no more."""
_IN_FLIGHT = 3
_ALWAYS = np.iinfo(np.int32).max


class Request(NamedTuple):
    """A text in two parts, as token ids; none of them is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """Of each token of a continuation."""

    log_p: np.ndarray
    """Its log-probability in nats, float32."""
    greedy: np.ndarray
    """Whether it is the likeliest."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.log_p.sum(dtype=np.float64))


class Continuations:
    """Scores continuations with the parameters of `programs`, a decoder's."""

    def __init__(self, programs: Programs):
        config = programs.config
        if config.encoder_layers:
            raise UserError(
                'an encoder-decoder has no likelihood of plain continuations: use a model without '
                'encoder'
            )
        self._programs, self._rows = programs, batch_shards(programs.mesh)
        # A window or a rotation by length needs each text in a row of its own.
        self._may_share = config.pattern == Dense() and not by_length(config.rope_scaling)
        self._read = jax.jit(functools.partial(_read, programs.model), donate_argnums=1)
        self._read_whole = jax.jit(functools.partial(_read_whole, programs.model))
        self._scores = jax.jit(functools.partial(_scores, programs.model))
        self._grown = jax.jit(_grown, static_argnums=1)

    def __call__(
        self,
        requests: Sequence[Request],
        *,
        shared: bool = True,
        tell: Callable[[int], None] = lambda n: None,
    ) -> list[Scored]:
        """Scores of each request, in their order.

        Of a text that is longer than the context the beginning is left out, as lm-eval does: its
        last token need not be read, so `context` + 1 tokens remain. Without `shared` every text is
        read by itself. `tell` is called with how many more tokens have been read. Raises UserError
        for an empty part, unknown ids, or a continuation longer than the context; NotFiniteError
        where the model computes no numbers.
        """
        longest, vocab = self._programs.config.context, self._programs.config.ids
        sequences = []
        for i, (context, continuation) in enumerate(requests):
            for what, ids in (('context', context), ('continuation', continuation)):
                check_prompt(ids, f'the {what} of request {i}', vocab=vocab)
            if len(continuation) > longest:
                raise UserError(
                    f'the continuation of request {i} has {len(continuation)} tokens, the context '
                    f'is {longest}: shorten it'
                )
            sequences.append([*context, *continuation][-(longest + 1) : -1])
        targets = [request.continuation for request in requests]
        found = [
            Scored(np.zeros(len(ids), np.float32), np.zeros(len(ids), bool)) for ids in targets
        ]
        with jax.set_mesh(self._programs.mesh):
            if shared and self._may_share:
                results = _Tree(self, found, tell).read(grow(sequences, targets))
            else:
                results = self._one_by_one(sequences, targets, tell)
            for asked, log_p_BRK, likeliest_BR in results:
                _put(found, asked, log_p_BRK, likeliest_BR)
        if not all(np.isfinite(scored.log_p).all() for scored in found):
            raise self._programs.not_finite('the model gives')
        return found

    def scores(
        self, x_BTD: jax.Array, asked: list[list[tuple[int, Asked]]]
    ) -> Iterator[tuple[list[list[Asked]], jax.Array, jax.Array]]:
        """What is asked for at places of each row, with its log-probabilities [B, R, K] and the
        likeliest tokens [B, R], on their way from the device."""
        B = len(x_BTD)
        for start in range(0, max(map(len, asked)), READ_OUT):
            part = [row[start : start + READ_OUT] for row in asked]
            R = max(16, power_of_two(max(map(len, part))))
            K = power_of_two(max(len(what) for row in part for _, what in row))
            place_BR, target_BRK = np.zeros((B, R), np.int32), np.zeros((B, R, K), np.int32)
            for b, row in enumerate(part):
                for r, (place, what) in enumerate(row):
                    place_BR[b, r] = place
                    target_BRK[b, r, : len(what)] = list(what)
            programs = self._programs
            log_p_BRK, likeliest_BR = self._scores(
                programs.params, x_BTD, programs.place(place_BR), programs.place(target_BRK)
            )
            yield [[what for _, what in row] for row in part], log_p_BRK, likeliest_BR

    def _one_by_one(
        self,
        sequences: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        tell: Callable[[int], None],
    ) -> Iterator[tuple[list[list[Asked]], jax.Array, jax.Array]]:
        """Texts of like length together, each in a row of its own."""
        programs = self._programs
        todo = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        while todo:
            length = min(_fitting(len(sequences[todo[0]])), programs.config.context)
            rows = self._rows * max(1, TOKENS // (length * self._rows))
            members, todo = todo[:rows], todo[rows:]
            rows = self._rows * power_of_two(-(-len(members) // self._rows))
            token_BT = np.full((rows, length), programs.model.pad_id, np.int32)
            length_B = np.ones(rows, np.int32)
            asked: list[list[tuple[int, Asked]]] = [[] for _ in range(rows)]
            for b, i in enumerate(members):
                n = len(sequences[i])
                token_BT[b, :n], length_B[b] = sequences[i], n
                first = n - len(targets[i])
                asked[b] = [
                    (first + j, {int(token): [(i, j)]}) for j, token in enumerate(targets[i])
                ]
            x_BTD = self._read_whole(
                programs.params, programs.place(token_BT), programs.place(length_B)
            )
            yield from self.scores(x_BTD, asked)
            tell(int(length_B[: len(members)].sum()))


class _Tree:
    """One pass over a tree, with the cache that its runs are read into."""

    def __init__(self, of: Continuations, found: list[Scored], tell: Callable[[int], None]):
        self._of, self._tell = of, tell
        self._programs, self._rows = of._programs, of._rows
        self._slots, self._cache = 0, Cache([])

    def read(
        self, roots: Sequence[Node]
    ) -> Iterator[tuple[list[list[Asked]], jax.Array, jax.Array]]:
        """Every result, a few behind the device."""
        waiting: deque[Any] = deque()
        for result in self._below(roots, 0):
            for x in result[1:]:
                x.copy_to_host_async()
            waiting.append(result)
            if len(waiting) > _IN_FLIGHT:
                yield waiting.popleft()
        yield from waiting

    def _below(self, nodes: Sequence[Node], at: int) -> Iterator[Any]:
        """Subtrees that go on from what the first `at` slots of every row hold."""
        small = [node for node in nodes if node.size <= PIECES[-1]]
        yield from self._small(small, at)
        large = sorted((n for n in nodes if n.size > PIECES[-1]), key=lambda node: node.size)
        chains = [chain(node) for node in large]
        # Texts of their own go side by side, a row each; what has branches is read into all rows.
        whole = [nodes for nodes, branches in chains if not branches]
        for start in range(0, len(whole), self._rows):
            yield from self._runs(whole[start : start + self._rows], at)
        for nodes, branches in chains:
            if branches:
                yield from self._runs([nodes] * self._rows, at)
                yield from self._below(branches, at + sum(len(node.tokens) for node in nodes))

    def _small(self, nodes: Sequence[Node], at: int) -> Iterator[Any]:
        if not nodes:
            return
        largest, best = max(node.size for node in nodes), None
        for piece in PIECES:
            if piece >= largest:
                bins = packed(nodes, piece)
                cost = -(-len(bins) // self._rows) * piece
                if best is None or cost <= best[0]:
                    best = cost, piece, bins
        assert best is not None  # none is larger than the largest piece
        _, piece, bins = best
        for start in range(0, len(bins), self._rows):
            strips = []
            for members in bins[start : start + self._rows]:
                strips.append(Strip())
                for node in members:
                    strips[-1].write(node)
            yield from self._piece(strips, at, piece)

    def _runs(self, rows: Sequence[Sequence[Node]], at: int) -> Iterator[Any]:
        """Chains of nodes, one for each row, into the cache."""
        runs: list[tuple[np.ndarray, int, list[tuple[int, Asked]]]] = []
        for nodes in rows:
            begin = nodes[0].depth
            asked = [
                (node.depth - begin + offset, what)
                for node in nodes
                for offset, what in sorted(node.asked.items())
            ]
            runs.append((np.concatenate([node.tokens for node in nodes]), begin, asked))
        longest = max(len(tokens) for tokens, _, _ in runs)
        piece = min(_fitting(longest), PIECES[-1])
        for start in range(0, longest, piece):
            strips = []
            for tokens, begin, asked in runs:
                own = tokens[start : start + piece].tolist()
                depths = range(begin + start, begin + start + len(own))
                here = [(p - start, what) for p, what in asked if start <= p < start + piece]
                # Seen by all that comes behind it in this row.
                strips.append(Strip(own, list(depths), [_ALWAYS] * len(own), here))
            yield from self._piece(strips, at + start, piece)

    def _piece(self, strips: list[Strip], at: int, piece: int) -> Iterator[Any]:
        """Read a strip in each row, behind the `at` tokens that the cache holds."""
        programs, B = self._programs, self._rows
        if at + piece > self._slots:
            slots = _fitting(at + piece)
            self._cache = (
                self._of._grown(self._cache, slots) if at else programs.empty(batch=B, slots=slots)
            )
            self._slots = slots
        token_BT = np.full((B, piece), programs.model.pad_id, np.int32)
        depth_BT = np.zeros((B, piece), np.int32)
        # Padding stands behind all else, and is seen by nothing but padding.
        until_BS = np.full((B, self._slots), _ALWAYS, np.int32)
        asked: list[list[tuple[int, Asked]]] = [[] for _ in range(B)]
        for b, strip in enumerate(strips):
            n = len(strip.tokens)
            token_BT[b, :n], depth_BT[b, :n] = strip.tokens, strip.depths
            untils = np.array(strip.untils, np.int64) + at
            until_BS[b, at : at + n] = np.minimum(untils, _ALWAYS)
            asked[b] = strip.asked
        x_BTD, self._cache = self._of._read(
            *(programs.params, self._cache),
            *map(programs.place, (token_BT, depth_BT, until_BS, np.full(B, at, np.int32))),
        )
        self._tell(sum(len(strip.tokens) for strip in strips))
        if any(asked):
            yield from self._of.scores(x_BTD, asked)


def _fitting(n: int) -> int:
    """The next of 128, 192, 256, 384, 512, ...: few shapes, of which at most a third is padded."""
    power = max(PIECES[0], power_of_two(n))
    return power * 3 // 4 if power > PIECES[0] and n <= power * 3 // 4 else power


def _put(
    found: list[Scored], asked: list[list[Asked]], log_p_BRK: jax.Array, likeliest_BR: jax.Array
) -> None:
    log_p, likeliest = np.asarray(log_p_BRK), np.asarray(likeliest_BR)
    for b, row in enumerate(asked):
        for r, what in enumerate(row):
            for k, (token, owners) in enumerate(what.items()):
                for owner, number in owners:
                    found[owner].log_p[number] = log_p[b, r, k]
                    found[owner].greedy[number] = likeliest[b, r] == token


def _read(
    model: Model,
    params: Params,
    cache: Cache,
    token_BT: Int[Array, 'B T'],
    depth_BT: Int[Array, 'B T'],
    until_BS: Int[Array, 'B S'],
    at_B: Int[Array, ' B'],
) -> tuple[Float[Array, 'B T D'], Cache]:
    x_BTD, written = decode_lib.features(
        *(model, params, token_BT),
        cache=cache,
        at_B=at_B,
        position_BT=depth_BT,
        until_BS=until_BS,
    )
    assert written is not None  # given a cache, a model returns one
    return x_BTD, written


def _read_whole(
    model: Model, params: Params, token_BT: Int[Array, 'B T'], length_B: Int[Array, ' B']
) -> Float[Array, 'B T D']:
    return decode_lib.features(model, params, token_BT, length_B=length_B)[0]


def _scores(
    model: Model,
    params: Params,
    x_BTD: Float[Array, 'B T D'],
    place_BR: Int[Array, 'B R'],
    target_BRK: Int[Array, 'B R K'],
) -> tuple[Float[Array, 'B R K'], Int[Array, 'B R']]:
    """Log-probabilities of some tokens at some places, and the likeliest token there."""
    here_BRT = place_BR[:, :, None] == jnp.arange(x_BTD.shape[1])
    x_BRD = jnp.einsum('BRT,BTD->BRD', here_BRT.astype(x_BTD.dtype), x_BTD, precision='highest')
    logits_BRV = decode_lib.head(model, params, x_BRD)

    def of_rows(logits_BRV: jax.Array, target_BRK: jax.Array) -> tuple[jax.Array, jax.Array]:
        total_BR1 = jax.nn.logsumexp(logits_BRV, axis=-1, keepdims=True)
        log_p_BRK = jnp.take_along_axis(logits_BRV, target_BRK, axis=-1) - total_BR1
        return log_p_BRK, jnp.argmax(logits_BRV, axis=-1)

    rows = layout.rows()  # the vocabulary whole on the devices of each row
    return jax.shard_map(of_rows, in_specs=rows, out_specs=rows)(
        jax.reshard(logits_BRV, rows), target_BRK
    )


def _grown(cache: Cache, slots: int) -> Cache:
    """The cache with room for so many tokens in each row."""

    def widen(x: jax.Array, axis: int) -> jax.Array:
        more = [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, more)

    layers = [
        replace(
            layer,
            k_BKHS=jax.tree.map(functools.partial(widen, axis=3), layer.k_BKHS),
            v_BKSH=jax.tree.map(functools.partial(widen, axis=2), layer.v_BKSH),
        )
        for layer in cache.layers
    ]
    return replace(cache, layers=layers)
