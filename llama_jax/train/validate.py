"""Validation: the loss on held-out text, and its likelihood in bits per byte, set by set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import layout, precision
from llama_jax.data.config import labels
from llama_jax.data.loader import Loader
from llama_jax.data.overlap import warn_of_overlap
from llama_jax.data.recipe import Given
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.objectives.base import Batch, Context, Loss, Objective
from llama_jax.text.chat import ChatFormat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment, rows_read
from llama_jax.train.place import place, rows_here
from llama_jax.train.rollouts import Rollouts
from llama_jax.train.step import loss_of


class LossStep(Protocol):
    """A compiled function (params, batch, carried) -> loss sums."""

    def __call__(self, params: Params, batch: Batch, carried: Params | None = None) -> Loss: ...


Stop = Callable[[], bool]
"""Whether to stop here; all processes ask equally often, and are told the same."""
POOL = 1 << 16
"""Positions of a batch, where the loss of a text depends on those that are read with it: no fewer,
whatever a batch of training has, and as many at each validation."""
SEED = 0
"""Of the sample and of its corruption: the same for all runs and at every validation."""


def loss_step(
    config: ModelConfig, objective: Objective, compute: Compute, *, accumulate: int = 1
) -> LossStep:
    """The loss sums without dropout; see `State` for what the objective carries.

    `accumulate`: microbatches, as in training, so that it takes no more memory than training does.
    """

    def sums(params: Params, carried: Params, batch: Batch) -> Loss:
        context = Context(carried=carried)
        loss = loss_of(config, objective, params, batch, compute=compute, key=None, context=context)
        return loss._replace(kept={})

    def step(params: Params, batch: Batch, carried: Params | None = None) -> Loss:
        with precision.matmuls(compute.precision):
            if accumulate == 1:
                return sums(params, carried or {}, batch)
            parts = {name: layout.interleaved(x, accumulate) for name, x in batch.items()}
            each = jax.lax.map(functools.partial(sums, params, carried or {}), parts)
            return jax.tree.map(functools.partial(jnp.sum, axis=0), each)

    return jax.jit(step)


class Validation:
    """The validation of a run: each of its sets, and all of them together.

    Every set is read in a fixed random order: whole, or, where `evaluation.batches` says how many
    batches are used, a sample that is shared out by the tokens of the sets, one batch each at
    least. A batch is of one set, so that each has figures of its own.

    Of an objective whose loss is no sum over rows, such as a contrastive one, several batches are
    read as one, a pool of texts that is always the same: a batch of training has few wrong answers
    where its texts are of few documents. What does not fill the last pool of a set is left out, and
    a set that fills none is one.

    Of an objective that is on policy, rewards are measured of what the parameters write to the
    prompts: the same draws at every validation, and the loss is less the mean reward.
    """

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        mesh: Mesh,
        rollouts: Rollouts | None = None,
        *,
        chat: ChatFormat | None = None,
    ) -> None:
        """Open all sets, which raises UserError for what is not there, before any step."""
        self._experiment, self._tokenizer, self._mesh = experiment, tokenizer, mesh
        self._rollouts, self._chat = rollouts, chat
        self._sources = experiment.data.of('validation')
        self.given: Sequence[Given] | None = None  # what is known of the records of each set
        warn_of_overlap(experiment.data)
        self.labels = labels(self._sources)
        tokens, digests = [], []
        self._opened: list[Loader] = []  # files may change while a run trains
        for index in range(len(self._sources)):
            with self.open(index) as loader:
                self._opened.append(loader)
                tokens.append(sum(text.tokens for text in loader.texts))
                digests.append(loader.digest)
        at_once = self.rows // rows_read(experiment)
        self.batches = shared_out(-(-experiment.evaluation.batches // at_once), tokens)
        if at_once > 1 and not experiment.evaluation.batches:
            self.batches = [self._pools(index) for index in range(len(self._sources))]
        self.tokens = sum(tokens)
        self.digest = hashlib.sha256(repr((digests, self.batches)).encode()).hexdigest()[:16]
        self._dummy_prefix = tokenizer.bos_id if tokenizer.dummy_prefix else None
        self._step = loss_step(
            experiment.model,
            experiment.objective,
            experiment.compute,
            accumulate=experiment.train.accumulate,
        )

    def __call__(
        self, params: Params, stop: Stop = lambda: False, *, carried: Params | None = None
    ) -> dict[str, Any]:
        """Figures over all sets, and 'NAME/LABEL' for each of several; `carried` is that of State.
        'likelihood' says 'bound' where bits per byte are one, and no exact value, and
        'bits_per_byte_se' how far texts and draws may be off.

        `stop` is asked before every batch; the figures are of what was read until then.
        """
        likelihood = self._experiment.objective.has_likelihood
        sums = []
        for index, batches in enumerate(self.batches):
            with self.open(index) as loader:
                chosen = itertools.islice(loader, batches)
                read = itertools.takewhile(lambda _: not stop(), chosen)
                if self._rollouts is not None:
                    sums.append(self._rollouts.measured(read, params, loader.documents))
                    continue
                sums.append(
                    loss_sums(
                        functools.partial(self._step, carried=carried),
                        params,
                        read,
                        place=lambda batch: place(batch, self._mesh),
                        byte_lengths=self._tokenizer.byte_lengths if likelihood else None,
                        dummy_prefix=self._dummy_prefix,
                    )
                )
        result = figures(added(sums))
        asked = self._experiment.objective.reading.whole
        if 'bits_per_byte' in result and asked is not None and asked.kind != 'exact':
            result['likelihood'] = asked.kind
            if (error := standard_error(sums)) is not None:
                result['bits_per_byte_se'] = error
        if len(sums) > 1:
            for label, of_set in zip(self.labels, map(figures, sums), strict=True):
                result |= {f'{name}/{label}': value for name, value in of_set.items()}
        return result

    @property
    def rows(self) -> int:
        """Rows that are read at once."""
        experiment = self._experiment
        rows, batches = rows_read(experiment), experiment.evaluation.batches
        if experiment.objective.accumulates:
            return rows
        at_once = max(1, POOL // (rows * experiment.train.seq_len))
        return rows * (min(at_once, batches) if batches else at_once)

    def _pools(self, index: int) -> int:
        """Pools that a set fills, or one."""
        with self.open(index) as loader:
            return max(1, loader.filled()[0] // self.rows)

    def open(self, index: int) -> Loader:
        """One of the sets, from its beginning, as it was when the validation was made."""
        experiment = self._experiment
        data = dataclasses.replace(
            experiment.data, sources=(self._sources[index],), validation=(), workers=0
        )
        return Loader(
            data,
            split='validation',
            tokenizer=self._tokenizer,
            maker=experiment.objective,
            batch=self.rows,
            seq_len=experiment.train.seq_len,
            seed=SEED,
            rows=rows_here(experiment, self._mesh, self.rows),
            epochs=1,
            chat=self._chat,
            given=None if self.given is None else self.given[index],
            of=next(iter(self._opened[index : index + 1]), None),
        )


def shared_out(batches: int, tokens: Sequence[int]) -> list[int | None]:
    """How many batches each set gets, by its tokens: one or more. None is all, for 0 batches."""
    if not batches:
        return [None] * len(tokens)
    exact = [batches * n / max(sum(tokens), 1) for n in tokens]
    given = [max(1, int(share)) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i]):
        given[i] += sum(given) < batches and exact[i] >= 1
    return list(given)


def loss_sums(
    step: LossStep,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    place: Callable[[dict[str, Any]], dict[str, jax.Array]],
    byte_lengths: np.ndarray | None,
    dummy_prefix: int | None = None,
) -> dict[str, float]:
    """Sums over all `batches`: 'loss', the objective's metrics, what they are divided by, 'bytes',
    and 'square ...' for `standard_error`.

    Args:
      batches: this process's share of each global batch.
      place: puts a share on the devices as part of the global batch.
      byte_lengths: UTF-8 bytes of each token [V]; None for an objective without a likelihood.
      dummy_prefix: the begin token behind which the tokenizer puts a space that no text has; it is
        not counted. None where it puts none.
    """
    sums: dict[str, float] = {}
    pending: tuple[Loss, jax.Array | None] | None = None

    def collect(pending: tuple[Loss, jax.Array | None] | None) -> None:
        if pending is not None:
            loss, n_bytes = pending
            values = {'loss': loss.total, 'weight': loss.weight, **loss.metrics}
            values |= {f'weight {name}': x for name, x in loss.weights.items()}
            if n_bytes is not None:
                values['bytes'] = n_bytes
            told = jax.device_get(values)  # one transfer
            if n_bytes is not None:
                told |= _squares(float(told['nll']), float(told['bytes']))
            for name, value in told.items():  # adds in float64
                sums[name] = sums.get(name, 0.0) + float(value)

    for batch in batches:
        n_bytes = None
        if byte_lengths is not None:
            bytes_BT = np.where(batch['weights'] > 0, byte_lengths[batch['targets']], 0)
            if dummy_prefix is not None:
                bytes_BT = bytes_BT - _dummy_prefixes(batch, bytes_BT, dummy_prefix)
            # Summed on the devices: they know which rows are held by several processes.
            n_bytes = jnp.sum(place({'bytes': bytes_BT.astype(np.int32)})['bytes'])
        loss = step(params, place(batch))
        collect(pending)  # while the devices compute this batch
        pending = loss, n_bytes
    collect(pending)
    return sums


def _dummy_prefixes(batch: dict[str, Any], bytes_BT: np.ndarray, begin_id: int) -> np.ndarray:
    """1 at the first text of each document that begins here: the target of the begin token, or
    what stands behind it where each token is its own target."""
    begins_BT = (batch['positions'] == 0) & (batch['inputs'] == begin_id)
    behind_BT = np.zeros_like(begins_BT)
    behind_BT[:, 1:] = (begins_BT & (batch['weights'] == 0))[:, :-1]
    return (begins_BT | behind_BT) & (bytes_BT > 0)


def added(sums: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums of several sets together."""
    total: dict[str, float] = {}
    for of_set in sums:
        for name, value in of_set.items():
            total[name] = total.get(name, 0.0) + value
    return total


def figures(sums: dict[str, float]) -> dict[str, Any]:
    """'loss' and the objective's metrics per unit of weight; with a likelihood also 'bytes' and
    'bits_per_byte'."""
    common = sums.get('weight', 0.0)
    means = {
        name: x / max(sums.get(f'weight {name}', common), 1.0)
        for name, x in sums.items()
        if name.partition(' ')[0] not in ('bytes', 'weight', 'square')
        and sums.get(f'weight {name}', 1.0)  # else there was nothing to measure it on
    }
    if 'bytes' not in sums:
        return means
    result: dict[str, Any] = {**means, 'bytes': int(sums['bytes'])}
    if result['bytes']:
        result['bits_per_byte'] = sums['nll'] / math.log(2) / result['bytes']
    return result


def _squares(nll: float, n_bytes: float) -> dict[str, float]:
    """Of one batch what `standard_error` has the sums of."""
    return {
        'square n': 1.0,
        'square nll': nll * nll,
        'square bytes': n_bytes * n_bytes,
        'square both': nll * n_bytes,
    }


def standard_error(sets: Sequence[dict[str, float]]) -> float | None:
    """Of bits per byte, in each set a ratio of sums over batches (Cochran 1977, section 2.11): that
    of the texts and of what is drawn for them together. None where a set has fewer than two
    batches."""
    variance = n_bytes = 0.0
    for sums in sets:
        n, own = sums.get('square n', 0.0), sums.get('bytes', 0.0)
        if n < 2 or not own:
            return None
        ratio = sums['nll'] / own
        squares = ratio * (ratio * sums['square bytes'] - 2 * sums['square both'])
        variance += max(sums['square nll'] + squares, 0.0) * n / (n - 1)
        n_bytes += own
    return math.sqrt(variance) / n_bytes / math.log(2) if n_bytes else None


def score(result: dict[str, Any]) -> float | None:
    """What makes a validation the best: bits per byte, or the loss of an objective without a
    likelihood. None when it is not finite: NaN would stay the best for ever."""
    figure = result.get('bits_per_byte', result['loss'])
    return figure if math.isfinite(figure) else None
