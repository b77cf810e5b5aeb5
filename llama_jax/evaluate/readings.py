"""How each objective is asked for the likelihood of a part of a text: in the form of its training.

The table below decides which of these metrics apply to which objective. In every example weight is
on the tokens that are asked for, and on no mark around them, so that all objectives are asked for
the same bytes. An objective that is not in the table is asked for none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_jax.evaluate.examples import Middle
from llama_jax.evaluate.scores import Example
from llama_jax.objectives.bart import Bart
from llama_jax.objectives.base import Objective
from llama_jax.objectives.causal import CausalLM
from llama_jax.objectives.fim import FillInMiddle
from llama_jax.objectives.masked import MaskedLM
from llama_jax.objectives.prediction import denoising
from llama_jax.objectives.prefix import PrefixLM, split_at
from llama_jax.objectives.spans import SpanCorruption, corrupt
from llama_jax.objectives.ul2 import UL2
from llama_jax.objectives.weighted import Weighted

Ask = Callable[[Any, Middle, Any], Example]
"""(objective, text, tokenizer) -> example with weight on the text's middle. The suffix is empty
where it is the rest of the text that is asked for."""


class Reading(NamedTuple):
    """What an objective can be asked for; None is n/a."""

    whole: bool = False
    """The likelihood of plain text from its beginning."""
    rest: Ask | None = None
    """Of the second half of a text given the first."""
    middle: Ask | None = None
    """Of a span given what is before it and, where the objective can see it, behind it."""
    ends: Literal['mark', 'suffix', 'length'] | None = None
    """How an infill by `middle` ends: at a control token, where the suffix follows, or at as many
    tokens as were masked. None: `middle` does not see the suffix, so there is no infill."""
    pseudo: bool = False
    """`middle` masks tokens: a pseudo-likelihood (Salazar et al. 2020), no likelihood."""


def reading(objective: Objective) -> tuple[Objective, Reading]:
    """The objective that is asked, and for what. Of a weighted sum the first part that can be."""
    if isinstance(objective, Weighted):
        for part in objective.parts:
            if _reading(part) != NOTHING:
                return part, _reading(part)
    return objective, _reading(objective)


def _reading(objective: Objective) -> Reading:
    if isinstance(objective, FillInMiddle) and not objective.rate:
        return TABLE[CausalLM]  # it has never seen the marks
    if isinstance(objective, UL2) and _span_mode(objective) is None:
        return TABLE[UL2]._replace(middle=_ul2_rest, ends=None)
    return TABLE.get(type(objective), NOTHING)


def _causal(objective: Any, text: Middle, tokenizer: Any) -> Example:
    """[bos, prefix, middle], left to right."""
    ids = np.concatenate([[tokenizer.bos_id], text.prefix, text.middle]).astype(np.int32)
    return _asked(ids[:-1], ids[1:], start=len(text.prefix), n=len(text.middle))


def _fim(objective: FillInMiddle, text: Middle, tokenizer: Any) -> Example:
    """Both sides before the middle, by the marks; PSM unless only SPM was trained."""
    control, bos = tokenizer.control, [tokenizer.bos_id]
    if objective.spm == 1:
        head = [*bos, control['<prefix>'], control['<suffix>'], *text.suffix]
        head += [control['<middle>'], *text.prefix]
    else:
        head = [*bos, control['<prefix>'], *text.prefix, control['<suffix>'], *text.suffix]
        head += [control['<middle>']]
    ids = np.array([*head, *text.middle], np.int32)
    return _asked(ids[:-1], ids[1:], start=len(head) - 1, n=len(text.middle))


def _prefix(objective: PrefixLM, text: Middle, tokenizer: Any) -> Example:
    """[bos, prefix] in full view."""
    ids = np.concatenate([[tokenizer.bos_id], text.prefix, text.middle]).astype(np.int32)
    return split_at(ids[:-1], ids[1:], 1 + len(text.prefix))


def _span(objective: SpanCorruption, text: Middle, tokenizer: Any) -> Example:
    """The middle as the one corrupted span."""
    return _one_span(text, tokenizer, encoder=objective.encoder, before=[])


def _ul2_rest(objective: UL2, text: Middle, tokenizer: Any) -> Example:
    """[S, bos, prefix] in full view: the sequential denoiser, where the mixture has one."""
    modes = [d.mode for d in objective.denoisers if d.mean_span is None]
    if not modes:
        return _ul2_span(objective, text, tokenizer)
    mode = tokenizer.control[modes[0]]
    if objective.encoder:
        inputs = np.concatenate([[mode, tokenizer.bos_id], text.prefix])
        return denoising(inputs, text.middle, tokenizer=tokenizer, encoder=True)
    plain = _prefix(PrefixLM(), text, tokenizer)
    first = {'inputs': mode, 'targets': tokenizer.pad_id, 'weights': 0, 'prefix': 1}
    return {
        key: np.concatenate([np.array([first[key]], values.dtype), values])
        for key, values in plain.items()
    }


def _ul2_span(objective: UL2, text: Middle, tokenizer: Any) -> Example:
    """The middle as the one corrupted span, after the mode of the mixture's first span denoiser."""
    before = [tokenizer.control[_span_mode(objective)]]
    return _one_span(text, tokenizer, encoder=objective.encoder, before=before)


def _span_mode(objective: UL2) -> str | None:
    return next((d.mode for d in objective.denoisers if d.mean_span is not None), None)


def _one_span(text: Middle, tokenizer: Any, *, encoder: bool, before: list[int]) -> Example:
    tokens = np.concatenate(text).astype(np.int32)
    start, end = len(text.prefix), len(text.prefix) + len(text.middle)
    place = np.arange(len(tokens))
    inputs, targets = corrupt(tokens, (start <= place) & (place < end), tokenizer=tokenizer)
    inputs = np.concatenate([before, inputs]).astype(np.int32)
    example = denoising(inputs, targets, tokenizer=tokenizer, encoder=encoder)
    first = 0 if encoder else len(inputs)  # of the targets, which begin with the sentinel
    return _asked(**example, start=first + 1, n=len(text.middle))


def _bart(objective: Bart, text: Middle, tokenizer: Any) -> Example:
    """One <mask> for the middle; the decoder has written what is before it."""
    inputs = np.concatenate([text.prefix, [tokenizer.mask_id], text.suffix])
    targets = np.concatenate([text.prefix, text.middle])
    example = denoising(inputs, targets, tokenizer=tokenizer, encoder=True)
    return _asked(**example, start=len(text.prefix), n=len(text.middle))


def _masked(objective: MaskedLM, text: Middle, tokenizer: Any) -> Example:
    """A <mask> for every token of the middle."""
    ids = np.concatenate([[tokenizer.bos_id], *text]).astype(np.int32)
    start, n = 1 + len(text.prefix), len(text.middle)
    inputs = ids.copy()
    inputs[start : start + n] = tokenizer.mask_id
    if objective.read_previous:
        return _asked(inputs, np.append(ids[1:], tokenizer.pad_id), start=start - 1, n=n)
    return _asked(inputs, ids, start=start, n=n)


def _asked(
    inputs: np.ndarray, targets: np.ndarray, *, start: int, n: int, weights: Any = None, **more: Any
) -> Example:
    """An example with weight on `n` targets from `start` on alone."""
    place = np.arange(len(targets))
    weights = ((start <= place) & (place < start + n)).astype(np.float32)
    return {'inputs': inputs, 'targets': targets, 'weights': weights, **more}


NOTHING = Reading()
TABLE: dict[type, Reading] = {
    CausalLM: Reading(whole=True, rest=_causal, middle=_causal),
    FillInMiddle: Reading(whole=True, rest=_causal, middle=_fim, ends='mark'),
    PrefixLM: Reading(rest=_prefix, middle=_prefix),
    SpanCorruption: Reading(rest=_span, middle=_span, ends='mark'),
    UL2: Reading(rest=_ul2_rest, middle=_ul2_span, ends='mark'),
    Bart: Reading(rest=_bart, middle=_bart, ends='suffix'),
    MaskedLM: Reading(middle=_masked, ends='length', pseudo=True),
}
"""ReplacedTokens and InfoNCE write no text; the generator of the former is another model."""
