"""All texts that a suite measures on, from held-out documents, the same for every arm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama_jax.errors import UserError
from llama_jax.evaluate import choosing, examples, held, words
from llama_jax.evaluate.choosing import Asked
from llama_jax.evaluate.examples import Labelled, Middle, Pairs, Record
from llama_jax.evaluate.held import Held
from llama_jax.evaluate.per_text import text_id
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.experiment import Experiment

if TYPE_CHECKING:
    from llama_jax.evaluate.suite import Suite

MARKS = 16
"""Positions that a window leaves free in the model's context, for marks and for what is written."""
_CHARACTERS = 8192
"""Of a document on average, at most: what is encoded does not grow with the corpus."""
LEAST_TOKENS = 16
"""Tokens of a document that gives a pair of spans."""
_WHITENING = 512
"""Training texts that a whitening is fitted on, at most."""


class TooLittleError(UserError):
    """There is not enough text to choose from."""


class Texts(NamedTuple):
    topics: Labelled
    order: Labelled
    spans: Pairs
    pairs: Pairs
    whitening: list[np.ndarray]
    """Training texts, as long as spans."""
    begun: list[np.ndarray]
    """Windows [T + 1] of documents with begin and end tokens: likelihood of plain text."""
    windows: list[np.ndarray]
    """Windows [T] of text alone."""
    middles: list[Middle]
    infills: list[Middle]
    tasks: dict[str, Asked]
    """By name, those of `Suite.tasks`."""
    document: dict[str, str]
    """`text_id` of a window to the name of its document."""
    absent: dict[str, str]
    """Name of what is not there ('topics', 'order', 'pairs', 'spans', 'windows', 'whitening',
    'infills') to why."""
    about: dict[str, str | int]
    """Where the texts are from, for the record."""


def digest(found: Texts) -> str:
    """Hash of the texts: two models with the same one were measured on the same."""
    return examples.digest(found._replace(absent={}, about={}))


NO_LABELS = Labelled((), [], [], [])
NO_PAIRS = Pairs([], [], np.zeros(0, str), np.zeros(0, str))


def of_run(suite: Suite, experiment: Experiment, tokenizer: Tokenizer) -> Texts:
    """The texts of a suite, kept for the next arm. Raises UserError where a data set or a field is
    not there, or has too little."""
    sets, pairs = sets_of(suite, experiment)
    key = (suite, experiment.model.context, sets.digest, pairs.digest, tokenizer.digest)
    kept = _KEPT.get(key)
    tasks = tasks_of(suite, experiment, tokenizer, kept.tasks if kept else None)
    if kept is None:
        _KEPT.clear()
        kept = _KEPT[key] = collect(suite, sets, pairs, tokenizer)._replace(tasks=tasks)
    return kept


_KEPT: dict[object, Texts] = {}


def tasks_of(
    suite: Suite,
    experiment: Experiment,
    tokenizer: Tokenizer,
    kept: dict[str, Asked] | None = None,
) -> dict[str, Asked]:
    """The items of the suite's tasks, those that are `kept` or made now. Raises UserError where one
    is longer than the model reads."""
    context, reading = experiment.model.context, experiment.objective.reading
    tasks = kept or {
        name: choosing.asked(name, tokenizer, n=suite.task_items, longest=context - MARKS)
        for name in suite.tasks
    }
    for name, task in tasks.items():
        choosing.check(name, task, reading, tokenizer, context=context)
    return tasks


def sets_of(suite: Suite, experiment: Experiment) -> tuple[Held, Held]:
    """The data sets that a suite is measured on, and those of its pairs. Raises UserError where
    they are not there."""
    if suite.text != held.OWN:
        sets = held.of_name(suite.text)
    else:
        sets = held.of_run(experiment.data, experiment.objective.reads)
    name = held.pairs_name(suite.text, suite.pairs, experiment.data)
    return sets, sets if name == held.OWN else held.of_name(name) if name else Held(())


def collect(
    suite: Suite,
    sets: Held,
    pairs: Held,
    tokenizer: Tokenizer,
    *,
    strict: bool = False,
    called: str = '',
) -> Texts:
    """The texts of a suite from opened data sets. What the data is too little for, or has no fields
    for, is absent. Raises TooLittleError where there is nothing to measure on; if `strict` also
    where two spans or windows are missing. `called`: what they are called in errors, if not by
    their names."""
    seed, name = suite.seed, called or sets.names
    absent: dict[str, str] = {}
    every = _records(suite, sets)
    topics = examples.topics(
        every,
        tokenizer,
        n_topics=suite.topics,
        per_topic=suite.per_topic,
        length=suite.span,
        seed=seed,
    )
    if len(topics.names) < 2:
        absent['topics'] = _no_topics(suite, every, name)
        topics = NO_LABELS
    order = examples.order(every, tokenizer, n=suite.order, length=suite.span, seed=seed)
    if min(map(len, order[1:])) < 2:
        few = f'{name} has too few held-out texts of {suite.span} tokens for three parts'
        absent['order'] = few if suite.order else 'suite.order is 0'
        order = NO_LABELS
    belong = examples.text_pairs(
        _pairs(suite, pairs),
        tokenizer,
        n=suite.pool,
        length=suite.span,
        seed=seed,
    )
    if len(belong.a) < 2:
        absent['pairs'] = _no_pairs(suite, pairs)
        belong = NO_PAIRS

    names, documents = _encoded(suite, sets.test, tokenizer)
    begun = [
        np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        for tokens in documents
    ]
    spans = examples.span_pairs(documents, n=suite.pool, length=suite.span, seed=seed, names=names)
    if not suite.pool:
        absent['spans'] = 'suite.pool is 0'
    elif len(set(spans.document.tolist())) < 2:
        absent['spans'] = (
            f'{name} has too little text: no two documents of {LEAST_TOKENS} tokens (there are '
            f'{sum(map(len, sets.test))} documents): give more'
        )
    if 'spans' in absent:
        spans = NO_PAIRS
    # More than are needed: not every window has a word to infill.
    more = examples.windows(
        documents, n=4 * suite.windows, length=suite.window, seed=seed, names=names
    )
    if not suite.windows:
        absent['windows'] = 'suite.windows is 0'
    elif len(more) < 2:
        longest = max(map(len, documents))
        absent['windows'] = (
            f'{name} has too little text: no two texts of {suite.window} tokens (the longest '
            f'document has {longest}): give more, or set --suite.window lower'
        )
    if 'windows' in absent:
        more = []
    lacks = [absent[what] for what in ('spans', 'windows') if what in absent]
    if lacks and (strict or len(lacks) == 2):
        raise TooLittleError(lacks[0])
    plain = (
        []
        if 'windows' in absent
        else examples.windows(
            begun, n=suite.windows, length=suite.window + 1, seed=seed, names=names
        )
    )
    windows = [window.tokens for window in more]
    whitening = _training_spans(suite, sets.train, tokenizer)
    if len(whitening) < 2:
        absent['whitening'] = 'a whitening is fitted on training texts, and there are none'
    python = all(documents.name.startswith('python_corpus/') for documents in sets.test)
    infill = examples.infills if python else words.infills
    infills = infill(windows, tokenizer, n=suite.windows, longest=suite.infill, seed=seed)
    if not infills and windows:
        absent['infills'] = (
            f'no word of at most {suite.infill} tokens stands twice in a window: raise '
            '--suite.infill'
        )
    return Texts(
        topics=topics,
        order=order,
        spans=spans,
        pairs=belong,
        whitening=whitening if len(whitening) > 1 else [],
        begun=[window.tokens for window in plain],
        windows=windows[: suite.windows],
        middles=examples.thirds(windows[: suite.windows], middle=suite.middle),
        infills=infills,
        tasks={},
        document={text_id(one.tokens): one.document for one in [*more, *plain]},
        absent=absent,
        about={
            'name': sets.names,
            'split': '+'.join(sets.splits),
            'documents': sum(map(len, sets.test)),
            'pairs': pairs.names if belong.a else '',
            'infills': 'names' if python else 'words',
            'selection': ' and '.join(sets.selection),
        },
    )


def _records(suite: Suite, sets: Held) -> list[Record]:
    """Held-out documents with their topics, of both splits."""
    whole = _asks(suite, 'topics_field', 'group_field')
    return [
        record
        for of, selection in ((sets.test, False), (sets.validation, True))
        for record in held.records(
            of,
            group=suite.group_field,
            label=suite.topics_field,
            selection=selection,
            whole=whole,
        )
    ]


def _pairs(suite: Suite, pairs: Held) -> list[Record]:
    whole = _asks(suite, 'pairs_fields', 'group_field')
    return held.records(pairs.test, group=suite.group_field, pair=suite.pairs_fields, whole=whole)


def check_fields(suite: Suite, sets: Held, pairs: Held) -> None:
    """Raise UserError where a field is asked for that no held-out document has."""
    if _asks(suite, 'topics_field', 'group_field'):
        records = _records(suite, sets)
        if _asks(suite, 'topics_field') and not any(one.label for one in records):
            _refuse_asked(suite, 'topics_field', sets.names)
        if _asks(suite, 'group_field') and not any(one.grouped for one in records):
            _refuse_asked(suite, 'group_field', sets.names)
    if _asks(suite, 'pairs_fields') and not any(all(x.pair) for x in _pairs(suite, pairs)):
        _refuse_asked(suite, 'pairs_fields', pairs.names)


def _asks(suite: Suite, *settings: str) -> bool:
    """Whether a field is asked for that files may have, and a data set of this project has not."""
    return any(
        getattr(suite, setting) not in (getattr(type(suite)(), setting), 'file')
        for setting in settings
    )


def _encoded(
    suite: Suite, sets: Sequence, tokenizer: Tokenizer
) -> tuple[list[str], list[np.ndarray]]:
    """Names and tokens of some documents of each set, spread evenly over it, and of a long one the
    beginning."""
    most = max(suite.pool, suite.windows)
    rng = np.random.default_rng(suite.seed)
    names, documents = [], []
    for number, of_set in enumerate(sets):
        n = min(len(of_set), max(most // len(sets), 1))
        characters = _CHARACTERS * most // (n * len(sets))
        # One of each n-th of the set, none twice.
        edges = np.arange(n + 1) * len(of_set) // n
        places = edges[:-1] + (np.diff(edges) * rng.random(n)).astype(int)
        for place in places.tolist():
            names.append(f'{number}:{place}')
            documents.append(tokenizer.encode(of_set[place][:characters]))
    return names, documents


def _training_spans(suite: Suite, sets: Sequence, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The first span of training documents, spread evenly over them."""
    found = []
    for of_set in sets:
        n = min(len(of_set), _WHITENING // len(sets))
        for i in np.linspace(0, len(of_set), n, endpoint=False).astype(int).tolist():
            # From the middle: many documents begin alike.
            text = of_set[i][:_CHARACTERS]
            tokens = tokenizer.encode(text[len(text) // 2 :][: 8 * suite.span])[: suite.span]
            if len(tokens) >= LEAST_TOKENS:
                found.append(tokens)
    return found


def _no_topics(suite: Suite, records: Iterable[Record], name: str) -> str:
    """Why there are none. Raises UserError where a field was asked for that is not there."""
    if not suite.topics:
        return 'suite.topics is 0'
    if any(record.label for record in records):
        return f'{name} has no two values of {suite.topics_field} with enough held-out documents'
    _refuse_asked(suite, 'topics_field', name)
    return f'{name} has no field {suite.topics_field}: set --suite.topics-field to one that it has'


def _no_pairs(suite: Suite, pairs: Held) -> str:
    fields = ' and '.join(suite.pairs_fields)
    if not pairs.test:
        return 'no data set of pairs is named'
    _refuse_asked(suite, 'pairs_fields', pairs.names)
    return f'{pairs.names} has no fields {fields}: set --suite.pairs-fields to those that it has'


def _refuse_asked(suite: Suite, setting: str, name: str) -> None:
    asked = getattr(suite, setting)
    if asked != getattr(type(suite)(), setting):
        fields = asked if isinstance(asked, str) else ' and '.join(asked)
        raise UserError(
            f'--suite.{setting.replace("_", "-")} {fields}: {name} has no document with that: give '
            'fields that it has, or leave it out'
        )
