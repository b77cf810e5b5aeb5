"""A task put to a model: shots in front of items, and the score of every item."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.evaluate import retrieval, stats, written
from llama_jax.evaluate.subject import Subject
from llama_jax.evaluate.task import Item, Loaded, Task, domain_of, free_of_content
from llama_jax.evaluate.windows import windows
from llama_jax.generate.continuations import Request, Scored
from llama_jax.generate.controls import Controls

log = logging.getLogger(__name__)

HEADLINE = {
    'choices': 'acc',
    'label': 'acc',
    'text': 'exact',
    'perplexity': 'bits_per_byte',
    'retrieval': 'mrr',
}
"""The metric of each kind that comes first."""
LOWER = ('bits_per_byte', 'nats_per_token')
"""Metrics of which less is better."""


@dataclass
class Outcome:
    """What came of a task."""

    loaded: Loaded
    scores: dict[str, np.ndarray]
    """Of each metric one number for each seed and item [S, N]."""
    under: dict[str, np.ndarray] = field(default_factory=dict)
    """Of ratios what they are divided by [S, N]: bytes or tokens."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """One record for each seed and item: prompt, choices and scores."""
    facts: dict[str, Any] = field(default_factory=dict)

    def result(self, *, seed: int = 0) -> dict[str, Any]:
        """As it stands in the file of results."""
        task = self.loaded.task
        metrics = {
            name: stats.of_runs(x_SN, self.under.get(name), seed=seed)
            for name, x_SN in self.scores.items()
        }
        about: dict[str, Any] = {'kind': task.kind, 'items': len(self.loaded.items)}
        if task.kind == 'choices':
            about['chance'] = float(np.mean([1 / len(x.choices) for x in self.loaded.items]))
        if task.kind in ('choices', 'text'):
            about |= {'shots': task.shots, 'shot_seeds': _n_seeds(task)}
        return {**about, **self.facts, 'metrics': metrics}

    def against(self, other: Outcome, *, seed: int = 0) -> dict[str, Any]:
        """This one's metrics less those of another model on the same items and shots."""
        found = {}
        for name, x_SN in self.scores.items():
            # Models may cut a text into other tokens: only equal denominators are of a pair.
            under, theirs = self.under.get(name), other.under.get(name)
            if under is None or (theirs is not None and np.array_equal(under, theirs)):
                both = x_SN, other.scores[name]
                found[name] = stats.of_difference(*both, under, name in LOWER, seed=seed)
        return found


def ask(
    subject: Subject,
    loaded: Loaded,
    *,
    seed: int = 0,
    truncate: bool = False,
    shared: bool = True,
    tell: Callable[[int], None] = lambda n: None,
) -> Outcome:
    """Put a task to a model. Shots are drawn by (`seed`, number of the draw), the same for all
    items and for every model. `shared` and `tell` are those of Continuations.

    Raises UserError where items are longer than the context, which are counted and named; with
    `truncate` their beginnings are left out, and the result says how many.
    """
    kind = loaded.task.kind
    asker = _Asker(subject, loaded, seed, truncate, shared, tell)
    if kind == 'choices':
        return asker.choices()
    if kind == 'label':
        return asker.label()
    if kind == 'text':
        return asker.text()
    return asker.perplexity() if kind == 'perplexity' else asker.retrieval()


def _n_seeds(task: Task) -> int:
    return task.shot_seeds if task.shots else 1


def shots_of(loaded: Loaded, seed: int) -> list[tuple[str, list[Item]]]:
    """Of each draw the text in front of every item, and the items that it is made of."""
    task = loaded.task
    found = []
    for number in range(_n_seeds(task)):
        rng = np.random.default_rng([seed, number])
        drawn = [loaded.train[i] for i in rng.permutation(len(loaded.train))[: task.shots]]
        shown = [f'{item.prompt}{task.between}{item.answers[0]}' for item in drawn]
        found.append((task.description + ''.join(x + task.separator for x in shown), drawn))
    return found


class _Asker:
    def __init__(
        self,
        subject: Subject,
        loaded: Loaded,
        seed: int,
        truncate: bool,
        shared: bool,
        tell: Callable[[int], None],
    ):
        self._subject, self._loaded, self._task = subject, loaded, loaded.task
        self._seed, self._truncate = seed, truncate
        self._shared, self._tell = shared, tell

    def choices(self) -> Outcome:
        """'acc': of the likeliest text; of log-probabilities by character, by byte, less those
        without context or behind the domain's words alone, where there are prompts; and
        calibrated, where all items have the same choices. In a chat neither domain nor
        calibration."""
        task, subject, items = self._task, self._subject, self._loaded.items
        domain = domain_of(task)
        requests: list[Request] = []
        places: dict[tuple[Any, ...], int] = {}

        draws = shots_of(self._loaded, self._seed)
        # Without one, less those without context is nothing.
        prompted = any(item.prompt for item in items)

        def ask(context: str, choice: str, turns: int | None = None) -> int:
            """Number of the request, one for equal ones. A chat after the shots of draw `turns`."""
            key = context, choice, turns
            if key not in places:
                places[key] = len(requests)
                if turns is None:
                    requests.append(subject.pair(context, task.between + choice))
                else:
                    answer = subject.vocabulary.encode(choice, continues=True)
                    requests.append(Request(self._said(draws[turns][1], context), answer.tolist()))
            return places[key]

        every, free = [], []
        for number, (shots, _) in enumerate(draws):
            for item in items:
                context = (item.prompt, number) if task.chat else (shots + item.prompt, None)
                asked = {'ll': [ask(context[0], choice, context[1]) for choice in item.choices]}
                if prompted:
                    asked['alone'] = [ask('', choice) for choice in item.choices]
                if prompted and not task.chat:
                    asked['domain'] = [ask(domain, choice) for choice in item.choices]
                every.append((number, item, shots, asked))
            if not isinstance(task.choices, str) and not task.chat:
                prompts = [shots + free_of_content(task, text) for text in task.content_free]
                free.append([[ask(prompt, c) for c in task.choices] for prompt in prompts])
        truncated = self._fit(
            [
                (item, max(sum(map(len, requests[i])) - 1 for i in asked['ll']))
                for _, item, _, asked in every
            ]
        )
        ll = np.array([scored.total for scored in self._score(requests)])
        # Of each draw log p(choice) without content, the mean of the probabilities.
        priors = [np.log(np.mean([_softmax(ll[row]) for row in rows], axis=0)) for rows in free]
        examples = []
        for number, item, shots, asked in every:
            of = {name: ll[places] for name, places in asked.items()}
            by = {
                'acc': of['ll'],
                'acc_chars': of['ll'] / [len(choice) for choice in item.choices],
                'acc_bytes': of['ll'] / [len(choice.encode()) for choice in item.choices],
                **{f'acc_{name}': of['ll'] - x for name, x in of.items() if name != 'll'},
            }
            if priors:
                by['acc_calibrated'] = of['ll'] - priors[number]
            chosen = {name: int(np.argmax(x)) for name, x in by.items()}
            examples.append(
                {
                    **self._about(number, item, shots),
                    'choices': list(item.choices),
                    'gold': item.gold,
                    'log_p': of['ll'].tolist(),
                    **{f'log_p_{name}': x.tolist() for name, x in of.items() if name != 'll'},
                    **({'log_p_free': priors[number].tolist()} if priors else {}),
                    'chosen': chosen,
                    'scores': {name: stats.share_of_best(x, item.gold) for name, x in by.items()},
                }
            )
        facts: dict[str, Any] = {**({} if task.chat else {'domain': domain}), **truncated}
        if not isinstance(task.choices, str):
            facts['report'] = self._report(examples, task.choices)
        return self._outcome(examples, facts)

    def label(self) -> Outcome:
        """'acc' of the class that the head of a trained classifier names, and its report."""
        classify, items = self._subject.classifier, self._loaded.items
        name = self._task.name
        if classify is None:
            raise UserError(
                f'task {name} asks for a label, and {self._subject.name} was not trained by '
                'Classification: give such a run, or a task of kind choices'
            )
        for item in items:
            if item.answers[0] not in classify.labels:
                raise UserError(
                    f'task {name}, line {item.line}: the head does not know the label '
                    f'{item.answers[0]!r}: it knows {", ".join(classify.labels)}'
                )
        texts = [classify.parts(item.prompt, item.fields.get('other')) for item in items]
        truncated = self._fit(
            [(item, sum(map(len, x)) + 1) for item, x in zip(items, texts, strict=True)]
        )
        log_NC = classify(texts)
        examples = [
            {
                'line': item.line,
                'text': item.prompt,
                **item.fields,
                'choices': list(classify.labels),
                'gold': classify.labels.index(item.answers[0]),
                'log_p': log_C.tolist(),
                'chosen': {'acc': int(np.argmax(log_C))},
                'scores': {'acc': float(classify.labels[np.argmax(log_C)] == item.answers[0])},
            }
            for item, log_C in zip(items, log_NC, strict=True)
        ]
        facts = {**truncated, 'report': self._report(examples, classify.labels)}
        return self._outcome(examples, facts)

    def text(self) -> Outcome:
        """'exact', 'f1', ROUGE and chrF of what the model writes, greedily."""
        written.check()
        task, subject = self._task, self._subject
        draws = shots_of(self._loaded, self._seed)
        every = [
            (number, item, shots)
            for number, (shots, _) in enumerate(draws)
            for item in self._loaded.items
        ]
        room = subject.context - task.max_tokens
        if room < 1:
            raise UserError(
                f'task {task.name}: max_tokens {task.max_tokens} leave no room for a prompt in '
                f'the context of {subject.context}: lower it'
            )
        prompts = [
            self._said(draws[number][1], item.prompt)
            if task.chat
            else subject.encode(shots + item.prompt + task.between.rstrip(' '))
            for number, item, shots in every
        ]
        truncated = self._fit(
            [(item, len(p)) for (_, item, _), p in zip(every, prompts, strict=True)], room
        )
        prompts = [ids[-room:] for ids in prompts]
        controls = Controls(max_tokens=task.max_tokens, temperature=0.0, stop=task.until)
        found = subject.write(prompts, [controls] * len(prompts), self._tell)
        examples = [
            {
                **self._about(number, item, shots),
                'answers': list(item.answers),
                'written': one.text,
                'ended': one.reason,
                'scores': written.scores(one.text.strip(), item.answers),
            }
            for (number, item, shots), one in zip(every, found, strict=True)
        ]
        return self._outcome(examples, truncated)

    def perplexity(self) -> Outcome:
        """'bits_per_byte' and 'nats_per_token' of whole texts, each token scored once."""
        task, subject = self._task, self._subject
        window = min(task.window, subject.context)
        stride = min(task.stride, window) or window
        prefix = subject.begin or (subject.prefix_id,)
        owners, requests = [], []
        for i, item in enumerate(self._loaded.items):
            ids = subject.encode(item.prompt, begin=False)
            for request in windows(ids, prefix, window=window, stride=stride):
                owners.append(i)
                requests.append(request)
        n = len(self._loaded.items)
        nats_N, tokens_N = np.zeros(n), np.zeros(n)
        for i, scored in zip(owners, self._score(requests), strict=True):
            nats_N[i] -= scored.total
            tokens_N[i] += len(scored.log_p)
        bytes_N = np.array([len(item.prompt.encode()) for item in self._loaded.items], float)
        examples = [
            {
                'line': item.line,
                'text': item.prompt[:200],
                'tokens': int(tokens_N[i]),
                'bytes': int(bytes_N[i]),
                'scores': {
                    'bits_per_byte': nats_N[i] / math.log(2) / bytes_N[i],
                    'nats_per_token': nats_N[i] / tokens_N[i],
                },
            }
            for i, item in enumerate(self._loaded.items)
        ]
        facts: dict[str, Any] = {'window': window, 'stride': stride, 'tokens': int(tokens_N.sum())}
        facts['perplexity'] = math.exp(nats_N.sum() / tokens_N.sum())
        scores = {'bits_per_byte': nats_N[None] / math.log(2), 'nats_per_token': nats_N[None]}
        under = {'bits_per_byte': bytes_N[None], 'nats_per_token': tokens_N[None]}
        return Outcome(self._loaded, scores, under, examples, facts)

    def retrieval(self) -> Outcome:
        """recall@k and the mean reciprocal rank of each query's own document among all, by the
        cosine of mean features; equal documents are one."""
        items = self._loaded.items
        before = {name: self._subject.prompts.get(name, '') for name in ('query', 'document')}
        texts = [before['query'] + item.prompt for item in items]
        texts += [before['document'] + item.answers[0] for item in items]
        lengths = [
            (item, len(self._subject.encode(text)))
            for item, text in zip([*items, *items], texts, strict=True)
        ]
        truncated = self._fit(lengths)
        both = self._subject.vectors(texts, truncate=True)
        _, first_M, own_N = np.unique(texts[len(items) :], return_index=True, return_inverse=True)
        rank_N = retrieval.ranks_of(both[: len(items)], both[len(items) :][first_M], own_N)
        pool = len(first_M)
        examples = [
            {
                'line': item.line,
                'query': item.prompt,
                'document': item.answers[0],
                'rank': int(rank),
                'scores': {
                    'mrr': 1 / (1 + int(rank)),
                    **{f'recall_{k}': float(rank < k) for k in (1, 5, 10) if k < pool},
                },
            }
            for item, rank in zip(items, rank_N, strict=True)
        ]
        return self._outcome(examples, {**truncated, 'documents': pool})

    def _said(self, drawn: Sequence[Item], prompt: str) -> list[int]:
        """A chat in which the shots were asked and answered before."""
        description = self._task.description
        messages = [{'role': 'system', 'content': description}] if description else []
        for item in drawn:
            messages += [{'role': 'user', 'content': item.prompt}]
            messages += [{'role': 'assistant', 'content': item.answers[0]}]
        return self._subject.asked([*messages, {'role': 'user', 'content': prompt}])

    def _score(self, requests: Sequence[Request]) -> list[Scored]:
        return self._subject.score(requests, shared=self._shared, tell=self._tell)

    def _about(self, number: int, item: Item, shots: str) -> dict[str, Any]:
        return {'line': item.line, 'shot_seed': number, 'prompt': shots + item.prompt}

    def _outcome(self, examples: list[dict[str, Any]], facts: dict[str, Any]) -> Outcome:
        scores = {
            name: np.array([example['scores'][name] for example in examples]).reshape(
                -1, len(self._loaded.items)
            )
            for name in examples[0]['scores']
        }
        return Outcome(self._loaded, scores, {}, examples, facts)

    def _report(self, examples: list[dict[str, Any]], choices: Sequence[str]) -> dict[str, Any]:
        gold = [choices[example['gold']] for example in examples]
        chosen = [choices[example['chosen']['acc']] for example in examples]
        return written.report(gold, chosen, choices)

    def _fit(self, lengths: Sequence[tuple[Item, int]], room: int | None = None) -> dict[str, int]:
        """How many are too long, for the result. Raises UserError unless they may be cut."""
        room = self._subject.context if room is None else room
        long = [(n, item.line) for item, n in lengths if n > room]
        if not long:
            return {}
        if not self._truncate:
            task = self._task
            n, line = long[0]
            raise UserError(
                f'task {task.name}: {len(long)} of {len(lengths)} prompts are longer than the '
                f'{room} tokens that the model can read (the first, of line {line}: {n} tokens): '
                + (f'give fewer than {task.shots} shots, or ' if task.shots else '')
                + '--truncate to leave out what is too much'
            )
        return {'truncated': len(long)}


def _softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max())
    return weight / weight.sum()
