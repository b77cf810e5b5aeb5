"""What the loop asks of an objective. The loop knows no objective by name.

Streams. An objective that feeds two sequences to the model (an encoder and a decoder, two views)
names the arrays of the second 'STREAM/key'. Arrays of one stream have one length; the packer lays
each stream in a row of its own, and segment k of one belongs to segment k of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.pieces import Encoded, Example, Maker, Piece, Sizes
from llama_jax.data.record import Chat, Preference, Problem, Record, Text
from llama_jax.errors import UserError
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import Params
from llama_jax.model.transformer import Transformer
from llama_jax.objectives.asked import NOTHING, Reading
from llama_jax.objectives.rollout import Rollout
from llama_jax.text.chat import ChatFormat
from llama_jax.text.vocabulary import Vocabulary

Batch = dict[str, Any]
"""Arrays [B, T] of one global batch: what `example` gives, and 'segments' and 'positions' of each
stream."""


class Loss(NamedTuple):
    """Sums over a batch, or over one microbatch of it; only their totals are ever divided."""

    total: jax.Array
    """Weighted sum of what is minimised, float32 []."""
    weight: jax.Array
    """Sum of weights, float32 []: `total` / `weight` is the loss."""
    metrics: dict[str, jax.Array]
    """Further weighted sums, float32 []. 'nll' where the objective has a likelihood: negative
    log-likelihood in nats."""
    largest: dict[str, jax.Array] = {}  # noqa: RUF012  a tuple's default, which nobody writes to
    """Figures float32 [] of which a batch has the largest of its microbatches."""
    kept: Batch = {}  # noqa: RUF012
    """Arrays [B, ...] that the further updates by the same batch find in it, or that `carry` is
    given."""
    weights: dict[str, jax.Array] = {}  # noqa: RUF012
    """By the name of a metric what it is divided by, float32 []; default: `weight`."""

    def plus(self, other: Loss) -> Loss:
        """Both microbatches together; `kept` is of neither."""
        largest = jax.tree.map(jnp.maximum, self.largest, other.largest)
        sums = ((x.total, x.weight, x.metrics, x.weights) for x in (self, other))
        total, weight, metrics, weights = jax.tree.map(jnp.add, *sums)
        return Loss(total, weight, metrics, largest, weights=weights)

    def means(self) -> dict[str, jax.Array]:
        """The loss, and every metric, by its weight; NaN for what has a weight of its own that is
        0: there was nothing to measure it on."""
        sums = {'loss': self.total, **self.metrics}
        means = {
            name: x / jnp.maximum(self.weights.get(name, self.weight), 1.0)
            for name, x in sums.items()
        }
        for name, own in self.weights.items():
            means[name] = jnp.where(own > 0, means[name], jnp.nan)
        return means


class Context(NamedTuple):
    """What the loss is told beside the batch."""

    step: jax.Array | None = None
    """Steps taken before this one, int32 []. None outside of training."""
    carried: Params = {}  # noqa: RUF012
    """See `Objective.carried`; {} for an objective that carries nothing."""
    features: jax.Array | None = None
    """Of a part of a sum of which another `joins` the forward pass: what the model makes of the
    inputs of the first part [B, T, D], so that it is computed once. None: there is no such pass."""


ALONE = Context()
"""Of a loss outside of a run, of an objective that carries nothing."""


class Objective(Maker, Protocol):
    """A frozen dataclass with pure functions. `Base` has the usual answers."""

    @property
    def reading(self) -> Reading:
        """What the trained model can be asked for, and how: see `asked.py`. `NOTHING` for an
        objective that gives text no likelihood."""
        ...

    @property
    def causal(self) -> bool:
        """How the backbone looks when it is read for representations: at what stands before, or at
        the whole segment. Of an encoder-decoder the encoder is read, and this is not asked."""
        ...

    @property
    def chats(self) -> bool:
        """Whether records, or some of them, are written in the chat format of the model."""
        ...

    @property
    def accumulates(self) -> bool:
        """Whether the loss of a batch is the sum over its rows, so that microbatches give the
        same."""
        ...

    @property
    def marks(self) -> bool:
        """Whether examples hold control tokens besides those that begin, end and pad a text."""
        ...

    @property
    def has_likelihood(self) -> bool:
        """Whether metrics['nll'] over 'targets' of positive 'weights' is the likelihood of text as
        it stands."""
        ...

    @property
    def knows(self) -> bool:
        """Whether its examples need what `know` says of each record before the first step; they get
        it as `Piece.given`."""
        ...

    def know(self, model: Transformer, batch: Batch, *, compute: Compute) -> jax.Array:
        """What is to be known of the records of a batch, under the parameters that a run begins
        with: float32 [B, M, C], of segment m + 1 of each row at place m."""
        ...

    @property
    def lends(self) -> bool:
        """Whether its loss is made of `read`, one pass over its inputs as they stand, and takes the
        `features` of its context in place of it; so that other parts of a sum can read it too."""
        ...

    @property
    def joins(self) -> bool:
        """Whether it has no stream of its own, but reads what the model makes of the inputs of the
        first part of a sum."""
        ...

    def beside(self, example: Example, piece: Piece, *, rng: np.random.Generator) -> Example | None:
        """Where it `joins`: arrays that stand beside those of the first part's example, as long as
        its inputs. None where the piece gives none."""
        ...

    @property
    def needs_adapters(self) -> bool:
        """Whether the loss asks for the model without its adapters."""
        ...

    @property
    def rollout(self) -> Rollout | None:
        """What the model writes to the prompts of a batch before it learns from it, where the
        objective is on policy; it is `OnPolicy` then. None: it learns from the data."""
        ...

    @property
    def updates(self) -> int:
        """Updates of the parameters by one batch, all in one step."""
        ...

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        """Initial values of parameters beside the backbone's, {} for none. Names end in letters."""
        ...

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        """Arrays beside the parameters that go from step to step without a gradient, as before the
        first step: the EMA of a teacher, a queue; what never changes (`carry` returns it as it is)
        is frozen. {} for none. `params` are those that the run begins with, the objective's own
        under EXTRA. Names end in letters, by which they are placed; they are in every checkpoint,
        and the loss finds them in its `context`."""
        ...

    def carry(self, carried: Params, params: Params, kept: Batch, step: jax.Array) -> Params:
        """What is carried on after the update number `step` [], from 0, to `params`; `kept` is that
        of the loss. It is not asked after an update that was skipped."""
        ...

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        *,
        extra: Params,
        compute: Compute,
        key: jax.Array | None,
        context: Context = ALONE,
    ) -> Loss:
        """Loss sums of a batch (device). Without a key there is no dropout."""
        ...

    def loss_tokens(self, batch: Batch) -> int:
        """Tokens of a batch that bear loss (host)."""
        ...

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        """Model FLOPs per position of a row for forward and backward, attention counted causally
        where it is causal."""
        ...

    def flops_of_run(self, model: ModelConfig, seq_len: int, steps: int) -> float:
        """The mean of `flops` over the steps of a run; 0 steps where their number is not known."""
        ...

    def stretched(self, ratio: float) -> Self:
        """The objective of a run `ratio` times as long: its steps are in proportion."""
        ...

    def check(self, model: ModelConfig) -> None:
        """Raise UserError where the objective cannot be trained on this architecture."""
        ...

    def check_steps(self, steps: int) -> None:
        """Raise UserError where a run of so many steps would leave out a part of it."""
        ...


@dataclass(frozen=True)
class Base:
    """The usual answers: one stream, plain text, no parameters of its own."""

    @property
    def reading(self) -> Reading:
        return NOTHING

    @property
    def reads(self) -> type[Record]:
        return Text

    def encoded(self, record: Any, *, vocabulary: Vocabulary, chat: ChatFormat | None) -> Encoded:
        raise TypeError(f'{type(self).__name__} reads text, which is encoded as it stands')

    @property
    def encoding(self) -> tuple[Any, ...]:
        return ()

    def whole(self, lengths: tuple[int, ...], *, seq_len: int) -> Sizes | None:
        raise TypeError(f'{type(self).__name__} reads text, whose pieces have the sizes of `sizes`')

    def sizes(self, n: int, *, seq_len: int, draw: float) -> Sizes | None:
        raise TypeError(f'{type(self).__name__} takes the places that `whole` says')

    @property
    def chats(self) -> bool:
        return self.reads in (Chat, Preference, Problem)

    @property
    def ends(self) -> bool:
        return False

    @property
    def causal(self) -> bool:
        return True

    @property
    def accumulates(self) -> bool:
        return True

    @property
    def marks(self) -> bool:
        return False

    @property
    def has_likelihood(self) -> bool:
        return False

    @property
    def knows(self) -> bool:
        return False

    def know(self, model: Transformer, batch: Batch, *, compute: Compute) -> jax.Array:
        raise TypeError(f'{type(self).__name__} needs to know nothing of its records')

    @property
    def lends(self) -> bool:
        return False

    @property
    def joins(self) -> bool:
        return False

    def beside(self, example: Example, piece: Piece, *, rng: np.random.Generator) -> Example | None:
        raise TypeError(f'{type(self).__name__} makes examples of its own')

    @property
    def needs_adapters(self) -> bool:
        return False

    @property
    def rollout(self) -> Rollout | None:
        return None

    @property
    def updates(self) -> int:
        return 1

    def lengths(self, seq_len: int) -> dict[str, int]:
        return {'': seq_len}

    def segments(self, seq_len: int) -> int:
        return 0

    def extra(self, model: ModelConfig, key: jax.Array) -> Params:
        return {}

    def carried(self, model: ModelConfig, params: Params, key: jax.Array) -> Params:
        return {}

    def carry(self, carried: Params, params: Params, kept: Batch, step: jax.Array) -> Params:
        return carried

    def check(self, model: ModelConfig) -> None:
        return

    def flops(self, model: ModelConfig, seq_len: int) -> float:
        raise NotImplementedError(f'{type(self).__name__} does not say its FLOPs')

    def flops_of_run(self, model: ModelConfig, seq_len: int, steps: int) -> float:
        return self.flops(model, seq_len)

    def stretched(self, ratio: float) -> Self:
        return self

    def check_steps(self, steps: int) -> None:
        return


EXTRA = 'objective'
"""Where parameters hold those of the objective, beside the backbone's."""


def backbone(params: Params) -> Params:
    """The parameters of the model, without the objective's own."""
    return {name: value for name, value in params.items() if name != EXTRA}


def followed(average: Params, params: Params, *, momentum: float) -> Params:
    """An exponential average of the backbone, one step on: `momentum` of it stays."""
    return jax.tree.map(
        lambda old, new: momentum * old + (1 - momentum) * new, average, backbone(params)
    )


def after_begin(seq_len: int) -> dict[str, int]:
    """`lengths` of an objective with a begin token before each piece. Raises UserError where a row
    holds no more than that."""
    if seq_len < 2:
        raise UserError(
            f'a row of {seq_len} positions has no room for a token after the begin token: raise '
            'the sequence length'
        )
    return {'': seq_len}


def stream_of(key: str) -> str:
    """The stream that an array belongs to: '' or what stands before the last '/'."""
    return key.rpartition('/')[0]


def in_stream(stream: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a part put into `stream`."""
    return {f'{stream}/{key}': value for key, value in arrays.items()}


def of_stream(stream: str, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of `stream`, streams within it included, by the names they have without it."""
    return {
        key.removeprefix(f'{stream}/'): value
        for key, value in arrays.items()
        if key.startswith(f'{stream}/')
    }
