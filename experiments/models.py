"""Models that the scripts use: a run of this project, or weights of others."""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from llama_jax import layout
from llama_jax.convert import pretrained
from llama_jax.errors import UserError
from llama_jax.generate.programs import Programs
from llama_jax.generate.quantized import NOTHING, Quantization
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.layers import HEADS, Params
from llama_jax.text import infill, template_files
from llama_jax.text.chat import ChatFormat, Conversation, end_ids
from llama_jax.text.infill import Infill
from llama_jax.text.template import Template
from llama_jax.text.vocabulary import Vocabulary, encode_spelled, within

if TYPE_CHECKING:
    from llama_jax.objectives.asked import Unmasking
    from llama_jax.objectives.base import Objective

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A model to generate with."""

    name: str
    config: ModelConfig
    params: Params
    """Of a run, stacked and on the mesh; of others, `Unread` and with layers apart."""
    vocabulary: Vocabulary
    begin: tuple[int, ...]
    """Ids before every prompt that is given as text (bos, where the model was trained with it)."""
    chat: ChatFormat | None
    end_ids: tuple[int, ...]
    """Any of them ends a text."""
    infill: Infill | None = None
    """How it is asked for the text before a suffix, where it was trained to."""
    step: int | None = None
    """Of the training, where it was a run of this project."""
    causal: bool = True
    """Whether a token of a text that is read for its vector sees only those before it."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What stands before a 'query' and a 'document' that are read for their vectors."""
    unmasks: Unmasking | None = None
    """How it fills masks in, where it was trained to."""
    left_to_right: bool = True
    """Whether it was trained to continue a text token by token."""

    @property
    def pad_id(self) -> int:
        """An id within the embedding: some vocabularies have a padding token behind it."""
        pad_id = self.vocabulary.pad_id
        return pad_id if pad_id < self.config.ids else self.end_ids[0]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue; of a document's beginning where it is empty."""
        ids = [*self.begin, *self.vocabulary.encode(text).tolist()]
        if not ids and self.vocabulary.bos_id is None:
            raise UserError(f'{self.name} has no token to begin with: give a --prompt with text')
        return ids or [self.vocabulary.bos_id]

    def source(self, text: str, most: int | None = None) -> list[int]:
        """Token ids that an encoder reads. What spells a control token, such as <mask>, is one.
        Raises TooLongError where the texts between these have more than `most`."""
        vocabulary = self.vocabulary if most is None else within(self.vocabulary, most)
        return encode_spelled(vocabulary, text)

    def programs(
        self, mesh: Mesh, compute: Compute, quantization: Quantization = NOTHING
    ) -> Programs:
        """What generates with it, on a mesh."""
        return Programs(
            self.config,
            self.params,
            mesh=mesh,
            compute=compute,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            quantization=quantization,
            causal=self.causal,
        )

    def without_params(self) -> Pretrained:
        """The same, for use beside programs: these have a copy of the parameters for decoding."""
        return replace(self, params={})

    def chatting(self, template: str | None) -> Pretrained:
        """The same model, asked in the format that --chat-template names; None: in its own."""
        if template is None:
            return self
        chat = template_files.chosen(template)
        if isinstance(chat, Template) and (names := chat.unknown(self.vocabulary)):
            log.warning(
                '--chat-template %s writes %s, no token of %s: the model reads it as text',
                *(template, ', '.join(names), self.name),
            )
        return replace(self, chat=chat, end_ids=end_ids(chat, self.vocabulary))

    def messages(self, conversation: Conversation) -> list[int]:
        """Token ids that ask for the next message of a chat. Raises UserError where it cannot be
        asked."""
        if self.chat is None:
            raise UserError(
                f'{self.name} has no chat format: give --prompt instead of --chat, or name a '
                'format with --chat-template'
            )
        return self.chat.encode(conversation, self.vocabulary, begin=self.begin)


def load(
    checkpoint: str | Path | None,
    weights: str | None,
    mesh: Mesh,
    what: str = '--checkpoint',
    *,
    heads: bool = False,
    any_order: bool = False,
) -> Pretrained:
    """The run `checkpoint`, which the option `what` names, or `weights`: exactly one is given, else
    UserError. With its `heads` for tokens further ahead, where these are to draft; `any_order`: see
    `from_run`."""
    if checkpoint is not None and weights is None:
        return from_run(checkpoint, mesh, what, heads=heads, any_order=any_order)
    if heads and weights is not None:
        raise UserError(
            f'--draft heads: {weights} holds weights of others, which have no such heads'
        )
    if weights is not None and checkpoint is None:
        return from_weights(weights, mesh)
    raise UserError('give either --checkpoint DIRECTORY or --weights NAME')


def from_run(
    checkpoint: str | Path,
    mesh: Mesh,
    what: str = '--checkpoint',
    *,
    heads: bool = False,
    any_order: bool = False,
) -> Pretrained:
    """RUN, RUN@STEP, RUN@best or RUN@mean:N; see `train.restore.load`. With its `heads`: UserError
    where it has none. Raises UserError for a model that can only fill masks in, unless it is used
    in `any_order`."""
    # These load Orbax and more, which weights of others do not need.
    from llama_jax.objectives.multi_token import where_heads_are
    from llama_jax.train import restore

    workdir, step = restore.named(checkpoint, what)
    beside: tuple[str, ...] = ()
    if heads:  # before the weights are read
        beside = where_heads_are(restore.experiment_of(workdir).objective, str(workdir))
    run = restore.load(checkpoint, mesh, shared_heads=True, what=what)
    objective = run.experiment.objective
    name, asked = type(objective).__name__, objective.reading
    if not asked.text and asked.unmasks is None:
        log.warning('%s was trained by %s, which does not teach to continue a text', workdir, name)
    if not asked.text and asked.unmasks is not None and not any_order:
        raise UserError(
            f'{what} {checkpoint} was trained by {name}, which fills masks in and continues no '
            'text from left to right: ask it by experiments.generate'
        )
    params = run.params
    if heads:
        params = {**params, HEADS: functools.reduce(operator.getitem, beside, run.extra)}
    tokenizer, chat = run.tokenizer, template_files.kept(workdir)
    which = step if isinstance(step, restore.Mean) else run.step
    return Pretrained(
        name=workdir.resolve().name + (f'@{which}' if step else ''),
        config=run.config,
        params=params,
        vocabulary=tokenizer,
        begin=() if tokenizer.bos_id is None or not asked.begins else (tokenizer.bos_id,),
        chat=chat,
        end_ids=end_ids(chat, tokenizer),
        infill=trained_to_infill(objective, tokenizer),
        step=run.step,
        causal=objective.causal,
        prompts=prompts_of(objective),
        unmasks=asked.unmasks,
        left_to_right=asked.text,
    )


def prompts_of(objective: Objective) -> dict[str, str]:
    """What an objective was trained to read before a query and a document."""
    from llama_jax.objectives.dense_retrieval import DenseRetrieval

    if not isinstance(objective, DenseRetrieval):
        return {}
    return {'query': objective.query_prefix, 'document': objective.passage_prefix}


def from_weights(name_or_path: str, mesh: Mesh, what: str = '--weights') -> Pretrained:
    """Weights of others, to be read; see `pretrained.find`, also for the errors. Rows of the
    embedding that no token of the vocabulary has are padding."""
    found = pretrained.find(name_or_path, what)
    text = found.text()
    config = pretrained.padded(found.config, text.vocabulary.vocab_size)
    layout.check(config.sizes(), mesh, shared_heads=True)
    return Pretrained(
        name=found.name,
        config=config,
        params=found.unmerged,
        vocabulary=text.vocabulary,
        begin=text.begin,
        chat=text.chat,
        end_ids=end_ids(text.chat, text.vocabulary),
        infill=infill.by_vocabulary(text.vocabulary, ids=config.ids),
    )


def trained_to_infill(objective: Objective, tokenizer: Vocabulary) -> Infill | None:
    """How a run is asked for the text before a suffix; None where it has never seen the marks."""
    asked = objective.reading.infill
    if asked is None or asked.first is None:
        return None
    return infill.own(tokenizer, suffix_first=asked.first == 'suffix')
