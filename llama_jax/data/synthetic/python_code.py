"""Tasks made of the Python installation: the same modules are held out as of `python_corpus`."""

from __future__ import annotations

import ast
import functools
import re
import textwrap
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from llama_jax.data import python_files, splits
from llama_jax.data.synthetic.made import Made, one, shuffled, some

Found = Iterator[tuple[str, Made]]
_LINES = (3, 12)
_CHARACTERS = 400


def _seeded(*of: str) -> np.random.Generator:
    """A generator for each item, so that none depends on those before."""
    return np.random.default_rng(zlib.crc32('\0'.join(of).encode('utf-8', 'replace')))


@functools.cache
def _docstrings(files: tuple[tuple[str, object], ...]) -> list[tuple[str, python_files.Record]]:
    found = [
        (module, record)
        for module, path in files
        for record in python_files.docstring_records(module, path)  # type: ignore[arg-type]
    ]
    return found + [(record['module'], record) for record in python_files.topic_records()]


def _documented() -> list[tuple[str, python_files.Record]]:
    """(module, record of a docstring or of a topic of `help()`)."""
    return _docstrings(tuple(python_files.python_files('stdlib')))


def minimal_pairs_python() -> Found:
    """Which of two functions is Python: the other one is broken in one place, and `ast` says so."""
    seen: set[str] = set()
    for module, path in python_files.python_files('stdlib'):
        for record in python_files.code_records(module, path):
            for name, source in _functions(record['text']):
                wrong = broken(source, _seeded(module, name))
                if wrong is None or source in seen:
                    continue
                seen.add(source)
                # With its end: of two of which one goes on the shorter could not lose.
                right = f'{source}\n'
                choices = shuffled(_seeded(name, module), [right, f'{wrong}\n'])
                yield (
                    splits.by_hash(module),
                    Made(f'{module}.{name}', '', right, choices, group=module),
                )


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """Name and source of short functions, methods among them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split('\n')
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            source = textwrap.dedent('\n'.join(lines[node.lineno - 1 : node.end_lineno]))
            fits = _LINES[0] <= source.count('\n') + 1 <= _LINES[1]
            if fits and len(source) <= _CHARACTERS:
                yield f'{node.name}:{node.lineno}', source


_BREAKS: tuple[tuple[str, str], ...] = (
    (r'\)', ''),
    (r'\)', '))'),
    (r':(?=\n)', ''),
    (r':(?=\n)', '::'),
    (r' == ', ' = '),
    (r' not in ', ' in not '),
    (r'(?<=for )(\w+) in ', r'\1 on '),
    (r'\n +(?=\S)', '\n'),
    (r'def ', 'define '),
    (r', ', ',, '),
)
"""What is replaced, in one place, and by what."""


def broken(source: str, rng: np.random.Generator) -> str | None:
    """A source with one thing replaced that is no Python any more; None where there is none."""
    if not is_python(source):
        return None
    for i in rng.permutation(len(_BREAKS)).tolist():
        pattern, by = _BREAKS[i]
        places = list(re.finditer(pattern, source))
        if places:
            place = places[int(rng.integers(len(places)))]
            wrong = source[: place.start()] + place.expand(by) + source[place.end() :]
            if not is_python(wrong):
                return wrong
    return None


def is_python(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


_WORD = re.compile(r'[^\W\d_]{5,}')
_CONTEXT = (50, 180)
"""Words in front of the last one."""


def cloze() -> Found:
    """The last word of a passage, which stands in it before, as in LAMBADA (Paperno et al. 2016):
    among other words that it repeats."""
    for module, record in _documented():
        words = list(re.finditer(r'\S+', record['text']))
        ends: set[int] = set()
        for start in range(0, len(words) - _CONTEXT[0], _CONTEXT[0]):
            part = words[start : start + _CONTEXT[1]]
            begin = part[0].start()
            text = record['text'][begin : part[-1].end()]
            made = _cloze_of(text, f'{module}:{record["module"]}:{start}', module)
            # Passages overlap: each last word is asked for once.
            if made is not None and begin + len(made.prompt) not in ends:
                ends.add(begin + len(made.prompt))
                yield splits.by_hash(module), made


def _cloze_of(text: str, key: str, module: str) -> Made | None:
    rng = _seeded(key)
    long = list(_WORD.finditer(text))
    n = Counter(place[0] for place in long)
    repeated = [word for word, count in n.items() if count > 1]
    before = len(text) // 2
    last = [
        place
        for place in long
        if place[0] in repeated
        and place.start() > before
        and text[place.start() - 1] == ' '
        and text.find(place[0]) < place.start()
        and len(text[: place.start()].split()) >= _CONTEXT[0]
    ]
    if not last or len(repeated) < 4:
        return None
    place = last[-1]
    said = {word for word in repeated if text.find(word) < place.start()} - {place[0]}
    if len(said) < 3:
        return None
    wrong = some(rng, sorted(said), 3)
    choices = shuffled(rng, [f' {word}' for word in (place[0], *wrong)])
    begin = text[: place.start()].rstrip(' ')
    return Made(key, begin, f' {place[0]}', choices, text[place.end() :], module)


def order_sensitivity() -> Found:
    """Which of two texts has its words in order, between the same first and last word."""
    seen: set[str] = set()
    for module, record in _documented():
        words = record['text'].split()[:40]
        rng = _seeded(module, record['module'])
        text = ' '.join(words)
        if len(words) < 12 or text in seen:
            continue
        seen.add(text)  # some stand in several modules, which may be of several splits
        # A capital letter in front and a stop at the end would say it.
        middle = some(rng, words[1:-1], len(words) - 2)
        mixed = ' '.join([words[0], *middle, words[-1]])
        if mixed != text:
            key = f'{module}:{record["module"]}'
            choices = shuffled(rng, [text, mixed])
            yield splits.by_hash(module), Made(key, '', text, choices, group=module)


def docstring_fits() -> Found:
    """Which of two docstrings a function has; the other one is of the same package."""
    own: dict[str, list[tuple[str, python_files.Record, str]]] = defaultdict(list)
    seen: set[str] = set()
    for module, record in _documented():
        line = record['docstring'].strip().split('\n')[0].strip()
        fits = record['body'].strip() and len(record['body']) <= 2 * _CHARACTERS
        if fits and len(line) >= 20 and line not in seen:
            seen.add(line)  # some stand in several modules, which may be of several splits
            own[record['package']].append((module, record, line))
    for found in own.values():
        # Of one split, so that no held-out docstring stands in training.
        of_split: dict[str, list[str]] = defaultdict(list)
        for module, _, line in found:
            of_split[splits.by_hash(module)].append(line)
        for module, record, line in found:
            rng, split = _seeded(module, record['module']), splits.by_hash(module)
            others = sorted({*of_split[split]} - {line})
            if others:
                yield (
                    split,
                    Made(
                        f'{module}:{record["module"]}',
                        # The space is the answer's, as in a text that is read in one piece.
                        f'{record["body"].rstrip()}\n#',
                        f' {line}',
                        tuple(f' {x}' for x in shuffled(rng, [line, one(rng, others)])),
                        '\n',
                        module,
                    ),
                )
