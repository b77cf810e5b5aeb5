"""Text that the model writes during a run: after the prompts of the configuration, and in answer to
held-out records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import precision
from llama_jax.data.encoded import Records
from llama_jax.data.loader import Loader
from llama_jax.data.pieces import Encoded
from llama_jax.data.record import Chat, Labelled, Text
from llama_jax.errors import UserError
from llama_jax.model import layers
from llama_jax.objectives.asked import Unmasking
from llama_jax.objectives.base import EXTRA, backbone
from llama_jax.objectives.classify import Classification
from llama_jax.text.chat import ChatFormat, Conversation, end_ids
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment
from llama_jax.train.place import place
from llama_jax.train.step import State

TEMPERATURE = 0.8
"""Of what is written after prompts; records are answered without chance."""
SEED = 0
"""Of the choice of records."""


class Sample(NamedTuple):
    prompt: str
    text: str
    """What the model wrote; of a classification the label."""
    reference: str | None = None
    """What a record has in its place."""


class Asked(NamedTuple):
    """What a sample is made of."""

    prompt: str
    tokens: list[int]
    """What is continued."""
    source: list[int] | None
    """What an encoder reads."""
    temperature: float
    reference: str | None = None


Sampler = Callable[[State], Iterator[Sample]]


def sampler(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    chat: ChatFormat | None = None,
    held_out: Callable[[], Loader] | None = None,
) -> Sampler | None:
    """A function that continues the prompts of the configuration, as what a user says where the
    objective reads chats, and answers records of `held_out`. An encoder reads them, where there is
    one, and the decoder writes from the beginning.

    None when there is nothing to write, there are no validations, or several processes: samples are
    a look at the model, not worth a second program on every host. Raises UserError for what does
    not fit the model's context.
    """
    config, objective = experiment.evaluation, experiment.objective
    if config.examples and objective.reads is Text:
        raise UserError(
            f'--evaluation.examples {config.examples} has no effect with '
            f'{type(objective).__name__}, which reads texts without an answer: set '
            '--evaluation.prompts'
        )
    if not config.every or jax.process_count() > 1:
        return None
    asked = [_prompt(experiment, prompt, tokenizer, chat) for prompt in config.prompts]
    _check(experiment, asked)
    if config.examples and held_out is not None:
        if objective.reads is Labelled:
            return _labels(experiment, tokenizer, mesh, held_out)
        if getattr(objective, 'predicts', True):  # or it makes numbers of texts
            asked += _records(experiment, tokenizer, held_out)
    ends = end_ids(chat, tokenizer) if objective.reads is not Text else (tokenizer.eos_id,)
    return _writer(experiment, tokenizer, mesh, asked, ends) if asked else None


def _writer(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    asked: Sequence[Asked],
    ends: tuple[int, ...],
) -> Sampler:
    from llama_jax.generate.generator import Generator

    if (unmasks := experiment.objective.reading.unmasks) and not experiment.objective.reading.text:
        return _unmasker(experiment, tokenizer, mesh, asked, ends, unmasks)

    def run(state: State) -> Iterator[Sample]:
        generator = Generator(
            experiment.model,
            backbone(state.evaluated),
            mesh=mesh,
            compute=experiment.compute,
            eos_ids=ends,
            pad_id=tokenizer.pad_id,
        )
        sources = [one.source for one in asked if one.source is not None]
        completions = generator(
            [one.tokens for one in asked],
            sources=sources or None,
            max_tokens=experiment.evaluation.sample_tokens,
            temperature=[one.temperature for one in asked],
            seed=list(range(len(asked))),
        )
        for one, completion in zip(asked, completions, strict=True):
            yield Sample(one.prompt, tokenizer.decode(completion.tokens), one.reference)

    return run


def _unmasker(
    experiment: Experiment,
    tokenizer: Tokenizer,
    mesh: Mesh,
    asked: Sequence[Asked],
    ends: tuple[int, ...],
    unmasks: Unmasking,
) -> Sampler:
    """Of a model that fills masks in: one a pass, those that it is most certain of first."""
    from llama_jax.generate.diffusion import Unmasker

    def run(state: State) -> Iterator[Sample]:
        unmask = Unmasker(
            experiment.model,
            backbone(state.evaluated),
            mesh=mesh,
            compute=experiment.compute,
            mask_id=tokenizer.mask_id,
            end_ids=ends,
            pad_id=tokenizer.pad_id,
            **unmasks._asdict(),
        )
        completions = unmask(
            [one.tokens for one in asked],
            max_tokens=experiment.evaluation.sample_tokens,
            temperature=[one.temperature for one in asked],
            seed=list(range(len(asked))),
        )
        for one, completion in zip(asked, completions, strict=True):
            yield Sample(one.prompt, tokenizer.decode(completion.tokens), one.reference)

    return run


def _prompt(
    experiment: Experiment, prompt: str, tokenizer: Tokenizer, chat: ChatFormat | None
) -> Asked:
    begin = tokenizer.control['<s>']
    if experiment.objective.reads is Chat and chat is not None:
        conversation = Conversation([{'role': 'user', 'content': prompt}])
        ids = chat.encode(conversation, tokenizer, begin=[begin])
        return Asked(prompt, ids, None, TEMPERATURE)
    text = tokenizer.encode(prompt).tolist()
    if experiment.model.encoder_layers:
        return Asked(prompt, [begin], text or [begin], TEMPERATURE)
    return Asked(prompt, [begin, *text], None, TEMPERATURE)


def _records(
    experiment: Experiment, tokenizer: Tokenizer, held_out: Callable[[], Loader]
) -> list[Asked]:
    """Records of the first set, chosen by chance, that leave room for an answer."""
    config, context = experiment.evaluation, experiment.model.context
    reads = experiment.model.encoder_layers > 0
    with held_out() as loader:
        (records, *_) = loader.texts
    assert isinstance(records, Records)
    found: list[Asked] = []
    for number in np.random.default_rng(SEED).permutation(len(records)).tolist():
        if not records.length(number):
            continue
        one = asked_of(records.encoded(number), tokenizer, reads=reads)
        if len(one.tokens) + config.sample_tokens <= context >= len(one.source or ()):
            found.append(one)
        if len(found) == config.examples:
            break
    if not found:
        raise UserError(
            f'no held-out record leaves room for --evaluation.sample-tokens {config.sample_tokens} '
            f'in the context of {context}: lower it, or set --evaluation.examples 0'
        )
    return found


def asked_of(encoded: Encoded, tokenizer: Tokenizer, *, reads: bool) -> Asked:
    """What stands before the last learnt run of a record, and that run."""
    ids, weights = encoded.parts[0], encoded.weights[0]
    if reads:
        begin, reference = [tokenizer.control['<s>']], tokenizer.decode(encoded.parts[1])
        return Asked(_shown(ids, tokenizer), begin, ids.tolist(), 0.0, reference)
    if not weights.any():  # a part without an answer, which stands in the next one
        ids, weights = np.concatenate(encoded.parts), np.concatenate(encoded.weights)
    learnt = np.flatnonzero(weights > 0)
    if not len(learnt):
        return Asked(_shown(ids, tokenizer), ids.tolist(), None, 0.0)
    end = int(learnt[-1]) + 1
    begin_at = end - int(np.argmin(np.append((weights[:end] > 0)[::-1], False)))
    prompt, answer = ids[:begin_at], ids[begin_at:end]
    reference = tokenizer.decode(answer)
    return Asked(_shown(prompt, tokenizer), prompt.tolist(), None, 0.0, reference)


def _shown(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, show_control=True)


def _labels(
    experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh, held_out: Callable[[], Loader]
) -> Sampler:
    """Texts of the first batch of the first set, each with the label that the model gives it."""
    objective, compute = experiment.objective, experiment.compute
    assert isinstance(objective, Classification)
    with held_out() as loader:
        batch = next(loader)

    @jax.jit
    def labels(params: layers.Params, batch: dict[str, jax.Array]) -> jax.Array:
        model = layers.bind(experiment.model, backbone(params))
        with precision.matmuls(compute.precision):
            logit_BMC = objective.logits(model, batch, extra=params[EXTRA], compute=compute)
        return jax.numpy.argmax(logit_BMC, axis=-1)

    def run(state: State) -> Iterator[Sample]:
        found_BM = np.asarray(labels(state.evaluated, place(batch, mesh)))
        left = experiment.evaluation.examples
        for row, segment_T in enumerate(batch['segments']):
            for segment in range(1, min(int(segment_T.max()), left) + 1):
                here_T = segment_T == segment
                text = tokenizer.decode(batch['inputs'][row][here_T])
                given, wanted = found_BM[row, segment - 1], batch['label'][row][here_T][0]
                yield Sample(text, *(objective.labels[i] for i in (given, wanted)))
            left -= min(int(segment_T.max()), left)

    return run


def _check(experiment: Experiment, asked: Sequence[Asked]) -> None:
    context, tokens = experiment.model.context, experiment.evaluation.sample_tokens
    for one in asked:
        shown = repr(one.prompt if len(one.prompt) <= 40 else f'{one.prompt[:37]}...')
        if len(one.source or ()) > context:
            raise UserError(
                f'the prompt {shown} of --evaluation.prompts has {len(one.source or ())} tokens, '
                f'and the encoder reads {context}: shorten it'
            )
        before = len(one.tokens)
        if before + tokens > context:
            raise UserError(
                f'--evaluation.sample-tokens {tokens} after the prompt {shown} ({before} tokens '
                f'with the begin token) is more than the context of {context}: '
                + (
                    f'set --evaluation.sample-tokens {context - before} or less'
                    if before < context
                    else 'shorten the prompt'
                )
            )
