"""Tasks: what is asked of a model, and the files that hold the items.

A task is a TOML file with the fields of `Task`, or a JSONL file of items alone, whose fields then
say what is asked. A template is text in which `{{name}}` stands for a field of the item, as in
lm-eval. docs/tasks.md shows each kind.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llama_jax.errors import UserError

Kind = Literal['choices', 'label', 'text', 'perplexity', 'retrieval']
_FIELD = re.compile(r'\{\{\s*(\w+)\s*\}\}')


@dataclass(frozen=True)
class Task:
    """One task. Paths are seen from the directory of its file."""

    test: str
    """JSONL file of the items."""
    kind: Kind = 'choices'
    """Which of several texts is right; the class that a trained head names; what the model writes;
    the likelihood of whole texts; which document a query finds."""
    name: str = ''
    """Default: that of the file."""
    train: str = ''
    """JSONL file that shots are drawn from; default: none."""
    prompt: str = '{{prompt}}'
    """Template of what is asked."""
    description: str = ''
    """In front of all shots."""
    chat: bool = False
    """A prompt is what a user says, in the chat format of the model, and its answer the
    assistant's; shots are turns before them, the description is the system message."""
    target: str = 'answer'
    """Field with the answer: the text or the number (from 0) of a choice; the text to write, or a
    list of such, each of which is right."""
    choices: tuple[str, ...] | str = 'choices'
    """The choices of every item, or the field that holds those of each."""
    between: str = ' '
    """Between a prompt and its answer."""
    separator: str = '\n\n'
    """Between shots."""
    shots: int = 0
    shot_seeds: int = 3
    """So many draws of the shots; without shots there is one."""
    domain: str = ''
    """What stands in front of an answer in any case ('Answer:'); default: the last line of the
    template, behind its last field."""
    content_free: tuple[str, ...] = ('N/A', '', '[MASK]')
    """Inputs without content, for calibration (Zhao et al. 2021)."""
    max_tokens: int = 64
    until: tuple[str, ...] = ('\n',)
    """What the model writes ends before any of these."""
    text: str = 'text'
    """Field with a whole text, or with the one that has a label."""
    other: str = ''
    """Field with the second text of a labelled pair."""
    window: int = 2048
    """Tokens that are read at once, of a whole text; at most those of the context."""
    stride: int = 0
    """So many tokens of each further window are scored, after the others as context; 0: all."""
    query: str = '{{query}}'
    document: str = '{{document}}'
    limit: int = 0
    """Of the items the first so many; 0: all."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f'kind {self.kind!r}: give one of {", ".join(get_args(Kind))}')
        for name in ('shots', 'stride', 'limit'):
            if getattr(self, name) < 0:
                raise UserError(f'{name} {getattr(self, name)}: 0 or more')
        for name in ('shot_seeds', 'max_tokens', 'window'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} {getattr(self, name)}: at least 1')
        if self.stride > self.window:
            raise UserError(
                f'stride {self.stride} is above the window of {self.window}: tokens between would '
                'not be scored'
            )
        if isinstance(self.choices, tuple) and len(set(self.choices)) < max(2, len(self.choices)):
            raise UserError('choices: give two or more, each once')
        if self.kind in ('choices', 'text') and not _FIELD.search(self.prompt):
            raise UserError(f'prompt {self.prompt!r} holds no field, such as {{{{question}}}}')
        for name in _USELESS[self.kind]:
            if getattr(self, name) != _default(name):
                raise UserError(f'{name} has no effect on a task of kind {self.kind}: leave it out')
        for name in ('between', 'separator', 'domain', 'content_free') if self.chat else ():
            if getattr(self, name) != _default(name):
                raise UserError(
                    f'{name} has no effect on a chat, whose format stands there: leave it out'
                )
        if self.shots and not self.train:
            raise UserError('shots are drawn from the file that train names: name one')


_OF_PROMPTS = (
    *('prompt', 'description', 'target', 'between', 'separator', 'shots', 'train', 'chat'),
)
_OF_CHOICES = ('choices', 'domain', 'content_free')
_OF_TEXT = ('max_tokens', 'until')
_OF_WHOLE = ('window', 'stride')
_OF_LABELS = ('other',)
_OF_PAIRS = ('query', 'document')
_USELESS: dict[str, tuple[str, ...]] = {
    'choices': (*_OF_TEXT, 'text', *_OF_WHOLE, *_OF_LABELS, *_OF_PAIRS),
    'label': (
        *(name for name in _OF_PROMPTS if name != 'target'),
        *('shot_seeds', *_OF_CHOICES, *_OF_TEXT, *_OF_WHOLE, *_OF_PAIRS),
    ),
    'text': (*_OF_CHOICES, 'text', *_OF_WHOLE, *_OF_LABELS, *_OF_PAIRS),
    'perplexity': (
        *(*_OF_PROMPTS, 'shot_seeds', *_OF_CHOICES, *_OF_TEXT, *_OF_LABELS, *_OF_PAIRS),
    ),
    'retrieval': (
        *(*_OF_PROMPTS, 'shot_seeds', *_OF_CHOICES, *_OF_TEXT, 'text', *_OF_WHOLE, *_OF_LABELS),
    ),
}


def has(kind: Kind, name: str) -> bool:
    """Whether a setting has an effect on tasks of this kind."""
    return name not in _USELESS[kind]


def _default(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(Task) if f.name == name)


@dataclass(frozen=True)
class Item:
    """One line of a file of items, checked."""

    line: int
    fields: Mapping[str, Any]
    prompt: str = ''
    """Of 'choices' and 'text', without shots; the whole text of 'perplexity'; else the query."""
    answers: tuple[str, ...] = ()
    """What is right: of 'choices' one text, of 'text' one or more; of 'retrieval' the document."""
    choices: tuple[str, ...] = ()

    @property
    def gold(self) -> int:
        """Number of the right choice."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True)
class Loaded:
    """A task with its items."""

    task: Task
    items: tuple[Item, ...]
    train: tuple[Item, ...]


def load(path: Path, **changes: int) -> Loaded:
    """The task of a .toml or .jsonl file with some settings changed, where its kind has them, and
    its items. Raises UserError with file and line."""
    if not path.is_file():
        raise UserError(f'there is no task file {path}: give a .toml or .jsonl file')
    if path.suffix == '.toml':
        task = _of_toml(path)
    elif path.suffix in ('.jsonl', '.ndjson'):
        task = _of_fields(path)
    else:
        raise UserError(f'{path} is no task: give a .toml or .jsonl file')
    changed: dict[str, Any] = {n: x for n, x in changes.items() if has(task.kind, n)}
    try:
        task = dataclasses.replace(task, name=task.name or path.stem, **changed)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    items = tuple(_items(task, path.parent / task.test))
    if task.limit:
        items = items[: task.limit]
    train = tuple(_items(task, path.parent / task.train)) if task.train else ()
    if task.shots > len(train):
        raise UserError(
            f'{path}: {task.shots} shots, and {task.train} has {len(train)} items: ask for fewer'
        )
    if train and (path.parent / task.train).samefile(path.parent / task.test):
        raise UserError(f'{path}: train and test are one file: shots would be of the test items')
    if task.kind == 'retrieval' and len(items) < 2:
        raise UserError(f'{path}: among one document everything is found: give more')
    return Loaded(task, items, train)


def _of_toml(path: Path) -> Task:
    try:
        settings = tomllib.loads(path.read_text(encoding='utf-8-sig'))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is no TOML: {error}') from None
    known = {field.name: field for field in dataclasses.fields(Task)}
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f': did you mean {near[0]}?' if near else f': there are {", ".join(known)}'
            raise UserError(f'{path}: a task has no {name}{hint}')
        given[name] = _typed(path, name, value)
    if 'test' not in given:
        raise UserError(f'{path}: test is missing, the JSONL file of the items')
    try:
        return Task(**given)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def _typed(path: Path, name: str, value: Any) -> Any:
    """A value of a TOML file as the field wants it."""
    usual = _default(name)
    if isinstance(usual, bool):
        right = isinstance(value, bool)
    elif isinstance(usual, int):
        right = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(usual, tuple):
        right = isinstance(value, list) and all(isinstance(x, str) for x in value)
    else:
        right = isinstance(value, str) or (name == 'choices' and isinstance(value, list))
        right = right and (isinstance(value, str) or all(isinstance(x, str) for x in value))
    if not right:
        kind = {bool: 'true or false', int: 'a number', tuple: 'a list of texts'}.get(
            type(usual), 'a text'
        )
        raise UserError(f'{path}: {name} is {value!r}, it must be {kind}')
    return tuple(value) if isinstance(value, list) else value


def _of_fields(path: Path) -> Task:
    """What the fields of the first item say."""
    _, first = next(_lines(path))
    fields = set(first)
    if {'prompt', 'choices', 'answer'} <= fields:
        return Task(path.name)
    if {'prompt', 'answer'} <= fields:
        return Task(path.name, kind='text')
    if {'query', 'document'} <= fields:
        return Task(path.name, kind='retrieval')
    if {'text', 'label'} <= fields:
        other = 'other' if 'other' in fields else ''
        return Task(path.name, kind='label', target='label', other=other)
    if 'text' in fields:
        return Task(path.name, kind='perplexity')
    raise UserError(
        f'{path}, line 1: fields {", ".join(map(repr, first))} are of no kind of task: give '
        'prompt, choices and answer; prompt and answer; query and document; text and label; text; '
        'or write a .toml file that names them'
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that is not empty."""
    if not path.is_file():
        raise UserError(f'there is no file {path} of items')
    found = False
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}, line {number} is no JSON: {error}') from None
            if not isinstance(value, dict):
                raise UserError(f'{path}, line {number} is no JSON object')
            found = True
            yield number, value
    if not found:
        raise UserError(f'{path} holds no items')


def _items(task: Task, path: Path) -> Iterator[Item]:
    for number, fields in _lines(path):
        try:
            yield _item(task, number, fields)
        except UserError as error:
            raise UserError(f'{path}, line {number}: {error}') from None


def _item(task: Task, number: int, fields: Mapping[str, Any]) -> Item:
    if task.kind == 'perplexity':
        text = _text(fields, task.text)
        if not text:
            raise UserError(f'field {task.text!r} is empty: leave the line out')
        return Item(number, fields, text)
    if task.kind == 'label':
        label = _text(fields, task.target)
        pair = {'other': _text(fields, task.other)} if task.other else {}
        if not all(part.strip() for part in (_text(fields, task.text), *pair.values())):
            raise UserError('a text is empty: leave the line out')
        return Item(number, pair, _text(fields, task.text), (label,))
    if task.kind == 'retrieval':
        return Item(number, fields, filled(task.query, fields), (filled(task.document, fields),))
    prompt = filled(task.prompt, fields)
    answer = _field(fields, task.target)
    if task.kind == 'text':
        answers = (answer,) if isinstance(answer, str) else tuple(answer or ())
        if not answers or not all(isinstance(text, str) and text for text in answers):
            raise UserError(f'field {task.target!r} is {answer!r}: give a text, or a list of texts')
        return Item(number, fields, prompt, answers)
    choices = task.choices
    if isinstance(choices, str):
        given = _field(fields, choices)
        if not isinstance(given, list) or not all(isinstance(x, str) and x for x in given):
            raise UserError(f'field {choices!r} is {given!r}: give a list of texts')
        if len(given) < 2 or len(set(given)) < len(given):
            raise UserError(f'field {choices!r}: give two choices or more, each once')
        choices = tuple(given)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise UserError(
            f'field {task.target!r} is {answer!r}, none of the choices {", ".join(choices)}, nor '
            f'the number of one (from 0)'
        )
    return Item(number, fields, prompt, (answer,), choices)


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with the fields of an item in it. Raises UserError for one that is missing."""
    return _FIELD.sub(lambda match: _text(fields, match[1]), template)


def free_of_content(task: Task, content: str) -> str:
    """The prompt of a task with the same text as every field."""
    return _FIELD.sub(lambda _: content, task.prompt)


def domain_of(task: Task) -> str:
    """What stands in front of every answer, whatever was asked: '' where nothing does."""
    return task.domain or _FIELD.split(task.prompt)[-1].split('\n')[-1].strip()


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        there = ', '.join(map(repr, fields)) or 'none'
        raise UserError(f'field {name!r} is missing (there: {there})')
    return fields[name]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f'field {name!r} is {value!r}: give a text')
    return str(value)
