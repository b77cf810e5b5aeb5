"""Prompts in, tokens out: batches padded to few shapes, each compiled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.errors import UserError
from llama_jax.generate.controls import Controls, Logprob, numbered
from llama_jax.generate.decode import Drawn, State
from llama_jax.generate.finite import NOT_FINITE
from llama_jax.generate.prefill import Shape, check_sources, prefill, shape_of
from llama_jax.generate.programs import Programs, bucket, check_chunk, check_prompt
from llama_jax.generate.quantized import NOTHING, Quantization
from llama_jax.generate.settings import Settings, has_penalties, history_of, rows_of
from llama_jax.generate.speculative.draft import Draft, Heads, Lookup
from llama_jax.generate.speculative.loop import check, draw_rest
from llama_jax.generate.speculative.verify import Counts, Speculation
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params


@dataclass(frozen=True)
class Completion:
    """What one row generated."""

    tokens: list[int]
    """Without the end id."""
    finish_reason: Literal['stop', 'length']
    """An end id, or max_tokens."""
    logprobs: tuple[Logprob, ...] = ()
    """One per token, where asked for."""
    speculation: Speculation | None = field(default=None, compare=False)
    """How drafting went; None where there was nothing to draft."""


class Generator:
    """Completes batches of prompts with one model.

    A batch is padded: rows to a power of two times the mesh's batch shards, prompts and outputs to
    powers of two. Each shape compiles once; lengths within it, settings and seeds compile nothing.
    A row's tokens do not depend on its batch mates.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        compute: Compute,
        eos_ids: tuple[int, ...],
        pad_id: int,
        prefill_chunk: int = 512,
        quantization: Quantization = NOTHING,
    ):
        """Longer prompts are read in pieces of `prefill_chunk` tokens (a power of two), which
        bounds the memory that attention takes. See Programs for the rest, and its errors."""
        check_chunk(prefill_chunk)
        self.prefill_chunk = prefill_chunk
        self.programs = Programs(
            config,
            params,
            mesh=mesh,
            compute=compute,
            end_ids=eos_ids,
            pad_id=pad_id,
            quantization=quantization,
        )

    @classmethod
    def of(cls, programs: Programs, *, prefill_chunk: int = 512) -> Generator:
        """One with programs that are there already."""
        check_chunk(prefill_chunk)
        made = cls.__new__(cls)
        made.prefill_chunk, made.programs = prefill_chunk, programs
        return made

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.programs.config

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sources: Sequence[Sequence[int]] | None = None,
        speculate: Lookup | Heads | Draft | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Complete each prompt, in one loop on the device. `sources`: what an encoder reads for
        each of them; an encoder-decoder needs it. `speculate`: how tokens are drafted, so that the
        model runs less often; greedy rows draw the same tokens, others from the same distribution
        (with Lookup and Heads the same tokens too).

        Settings are the fields of Controls, one value for all rows or a sequence with one per row;
        the default temperature is 0. A prompt that is there several times goes on from `seed`,
        seed + 1 and so on, unless seeds are given row by row: rows of one prompt and one seed draw
        the same tokens. Raises UserError for what cannot be done, NotFiniteError where the logits
        of a row are no numbers.
        """
        drawn, counts, controls = self._drawn(prompts, settings, sources, speculate)
        return [self._completion(drawn, i, one, counts) for i, one in enumerate(controls)]

    def draw(self, prompts: Sequence[Sequence[int]], **settings: Any) -> Drawn:
        """The same completions as arrays of the host, a row for each prompt, with the end id of
        each that has one; what stands behind it is padding."""
        drawn, _, _ = self._drawn(prompts, settings)
        if (drawn.token_BT == NOT_FINITE).any():
            raise self.programs.not_finite('the model gives')
        return jax.tree.map(lambda x: x[: len(prompts)], drawn)

    def _drawn(
        self,
        prompts: Sequence[Sequence[int]],
        settings: dict[str, Any],
        sources: Sequence[Sequence[int]] | None = None,
        speculate: Lookup | Heads | Draft | None = None,
    ) -> tuple[Drawn, Counts | None, list[Controls]]:
        if not len(prompts):
            raise UserError('no prompts: give at least one')
        programs, counts = self.programs, None
        controls, shape = self._checked(prompts, settings, sources, speculate)
        with jax.set_mesh(programs.mesh):
            state, first, rows, n_top = self._read(prompts, controls, shape, sources)
            drawn, n_more = [first], max(one.max_tokens for one in controls) - 1
            if n_more and speculate is not None:
                more, counts = draw_rest(
                    *(programs, speculate, prompts, shape, state, first, rows),
                    limits=_limits(prompts, controls),
                    n_more=n_more,
                    n_top=n_top,
                )
                drawn.append(more)
            elif n_more:
                _, more = programs.decode(
                    *(programs.params, state, rows, n_more),
                    slots=bucket(n_more),
                    n_top=n_top,
                )
                drawn.append(more)
        drawn, counts = jax.device_get((drawn, counts))
        whole = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *drawn)
        return whole, counts, controls

    def stream(
        self,
        prompt: Sequence[int],
        *,
        source: Sequence[int] | None = None,
        chunk: int = 16,
        **settings: Any,
    ) -> Iterator[list[int]]:
        """Complete one prompt; yields the first token, then `chunk` at a time, without the end id.

        The same tokens as a call of the generator. While the caller deals with one piece, the
        device computes the next.
        """
        if chunk < 1:
            raise UserError(f'chunk {chunk}: a stream yields at least one token at a time')
        sources = None if source is None else [source]
        controls, shape = self._checked([prompt], settings, sources)
        with jax.set_mesh(self.programs.mesh):
            state, first, rows, n_top = self._read([prompt], controls, shape, sources)
        return self._pieces(state, first, rows, n_top, controls[0], chunk)

    def _pieces(
        self,
        state: State,
        first: Drawn,
        rows: Settings,
        n_top: int | None,
        one: Controls,
        chunk: int,
    ) -> Iterator[list[int]]:
        programs, ends = self.programs, self._ends(one)

        def arrived(drawn: Drawn, n: int) -> tuple[list[int], int | None]:
            """Tokens before the end, and what ends them, where it is there."""
            tokens = np.asarray(drawn.token_BT)[0, :n].tolist()
            n_kept = _n_kept(tokens, {*ends, NOT_FINITE})
            return tokens[:n_kept], tokens[n_kept] if n_kept < n else None

        # At once: it does not wait for the program of the others to be made.
        tokens, end = arrived(first, 1)
        if tokens:
            yield tokens
        ready, n_ready, n_left = None, 0, one.max_tokens - 1
        while end is None and (n_ready or n_left):
            following, n_next = None, min(chunk, n_left)
            if n_next:
                with jax.set_mesh(programs.mesh):
                    state, following = programs.decode(
                        programs.params, state, rows, n_next, slots=chunk, n_top=n_top
                    )
                following.token_BT.copy_to_host_async()
            if ready is not None:
                tokens, end = arrived(ready, n_ready)
                if tokens:
                    yield tokens
            ready, n_ready, n_left = following, n_next, n_left - n_next
        if end == NOT_FINITE:
            raise programs.not_finite('the model gives')

    def shape(self, n_prompts: int, longest: int, max_tokens: int, source: int = 0) -> Shape:
        """What a batch is padded to; for sizing memory (see Programs.cache_bytes)."""
        return shape_of(
            self.programs,
            prompts=n_prompts,
            longest=longest,
            max_tokens=max_tokens,
            prefill_chunk=self.prefill_chunk,
            source=source,
        )

    def _checked(
        self,
        prompts: Sequence[Sequence[int]],
        settings: dict[str, Any],
        sources: Sequence[Sequence[int]] | None = None,
        speculate: Lookup | Heads | Draft | None = None,
    ) -> tuple[list[Controls], Shape]:
        controls = controls_of(len(prompts), {'temperature': 0.0, **settings})
        for i, (prompt, one) in enumerate(zip(prompts, controls, strict=True)):
            check_prompt(prompt, f'prompt {i}', vocab=self.config.ids)
            one.check(vocab=self.config.ids)
            if one.stop or one.prompt_logprobs is not None:
                raise UserError(
                    'stop strings and prompt_logprobs are for requests of the Engine '
                    '(engine/engine.py), not for a Generator'
                )
            self.programs.check_length(len(prompt), one.max_tokens, f'prompt {i}')
        longest, most = max(map(len, prompts)), max(one.max_tokens for one in controls)
        n_draft = 0
        if speculate is not None:
            check(self.programs, speculate, longest=max(_limits(prompts, controls)))
            n_draft = speculate.n_draft
        source = check_sources(self.programs, prompts, sources)
        if not isinstance(settings.get('seed'), _SEVERAL):
            read = zip(prompts, sources or [()] * len(prompts), strict=True)
            controls = numbered([tuple(map(tuple, each)) for each in read], controls)
        return controls, self.shape(len(prompts), longest, most + n_draft, source)

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        controls: list[Controls],
        shape: Shape,
        sources: Sequence[Sequence[int]] | None = None,
    ) -> tuple[State, Drawn, Settings, int | None]:
        """Prefill: the state after the first tokens, and these; and the settings of all rows."""
        programs, vocab = self.programs, self.config.vocab
        rows = rows_of(
            controls,
            lengths=[len(prompt) for prompt in prompts],
            rows=shape.rows,
            end_ids=programs.end_ids,
            vocab=vocab,
            bias=any(one.logit_bias for one in controls),
        )
        history = None
        if any(map(has_penalties, controls)):
            history = history_of(prompts, rows=shape.rows, vocab=vocab)
        reported = [one.logprobs for one in controls if one.logprobs is not None]
        n_top = max(reported) if reported else None
        rows, history = jax.tree.map(programs.place, (rows, history))
        x_BD, cache, length = prefill(
            programs, prompts, shape, sources, limits=_limits(prompts, controls)
        )
        state, drawn = programs.begin(
            programs.params, cache, x_BD, length, rows, history, n_top=n_top
        )
        return state, drawn, rows, n_top

    def _ends(self, one: Controls) -> set[int]:
        return {*(() if one.ignore_end else self.programs.end_ids), *one.stop_ids}

    def _completion(
        self, drawn: Drawn, row: int, one: Controls, counts: Counts | None
    ) -> Completion:
        tokens = drawn.token_BT[row, : one.max_tokens].tolist()
        if NOT_FINITE in tokens:
            raise self.programs.not_finite(f'prompt {row}: the model gives')
        n_kept = _n_kept(tokens, self._ends(one))
        return Completion(
            tokens[:n_kept],
            'stop' if n_kept < len(tokens) else 'length',
            logprobs_of(drawn, row, n_kept, one.logprobs),
            None if counts is None else counts.of(row),
        )


_SEVERAL = (list, range, np.ndarray)
"""What holds a value for each row."""


def controls_of(n: int, settings: dict[str, Any]) -> list[Controls]:
    """Controls of `n` rows from settings that are one for all or a sequence with one per row."""
    several = {name: list(value) for name, value in settings.items() if isinstance(value, _SEVERAL)}
    for name, values in several.items():
        if len(values) != n:
            raise UserError(f'{len(values)} values of {name} for {n} prompt(s): one, or one each')
    known = Controls.__dataclass_fields__
    unknown = next((name for name in settings if name not in known), None)
    if unknown:
        raise UserError(f'there is no setting {unknown}: there are {", ".join(known)}')
    return [
        Controls(**{**settings, **{name: values[i] for name, values in several.items()}})
        for i in range(n)
    ]


def _limits(prompts: Sequence[Sequence[int]], controls: list[Controls]) -> list[int]:
    """How long each text may become."""
    return [len(p) + one.max_tokens for p, one in zip(prompts, controls, strict=True)]


def logprobs_of(drawn: Drawn, row: int, n: int, n_top: int | None) -> tuple[Logprob, ...]:
    """Of the first `n` tokens of a row; none unless asked for. `drawn` is on the host."""
    if n_top is None:
        return ()
    assert drawn.logprob_BT is not None
    assert drawn.top_BTR is not None and drawn.top_logprob_BTR is not None
    return tuple(
        Logprob(
            int(drawn.token_BT[row, t]),
            float(drawn.logprob_BT[row, t]),
            tuple(
                zip(
                    drawn.top_BTR[row, t, :n_top].tolist(),
                    drawn.top_logprob_BTR[row, t, :n_top].tolist(),
                    strict=True,
                )
            ),
        )
        for t in range(n)
    )


def _n_kept(tokens: list[int], ends: set[int]) -> int:
    """Tokens before the first end."""
    return next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
