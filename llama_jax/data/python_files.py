"""The text that every Python installation carries: its source code and its docstrings."""

import ast
import hashlib
import inspect
import os
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

Record = dict[str, str]  # text, module, package, docstring, body
_SKIPPED_DIRECTORIES = {
    *('test', 'tests', 'idle_test', '__pycache__', 'site-packages', 'dist-packages'),
}


def python_files(where: str) -> list[tuple[str, Path]]:
    """(dotted module, file) of all modules, sorted, without tests. `where`: stdlib or installed."""
    if where == 'stdlib':
        roots = [Path(sysconfig.get_path('stdlib'))]
    else:
        roots = [Path(sysconfig.get_path(key)) for key in ('purelib', 'platlib')]
    found: dict[str, Path] = {}
    for root in roots:
        for path in _python_paths(root):
            parts = path.relative_to(root).with_suffix('').parts
            if parts[-1].startswith('_sysconfigdata') or parts == ('pydoc_data', 'topics'):
                continue  # the machine's build flags; prose, which documents() reads
            parts = parts[:-1] if parts[-1] == '__init__' and len(parts) > 1 else parts
            found.setdefault('.'.join(parts), path)
    return sorted(found.items())


def _python_paths(root: Path) -> Iterator[Path]:
    """Files below `root`. Directories that are skipped are not entered: the standard library has
    all installed packages below it."""
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_DIRECTORIES]
        yield from (Path(directory, name) for name in names if name.endswith('.py'))


def fingerprint(files: list[tuple[str, Path]]) -> str:
    """Hash of the Python version and of the names and contents of the files, hexadecimal."""
    digest = hashlib.blake2b(platform.python_version().encode(), digest_size=16)
    for module, path in files:
        digest.update(f'{module}\0{hashlib.blake2b(path.read_bytes()).hexdigest()}\n'.encode())
    return digest.hexdigest()


def code_records(module: str, path: Path) -> Iterator[Record]:
    """The source of a module, unless it is empty."""
    text = _source(path)
    if text.strip():
        yield _record(module, text)


def docstring_records(module: str, path: Path) -> Iterator[Record]:
    """One record per docstring of the module, its classes and its functions.

    A function's has its body beside it: the source without the docstring.
    """
    text = _source(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return  # a template, or a file for another Python version
    lines = text.split('\n')
    for node, name in _definitions(tree, module):
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or '')
        if docstring.strip() and _is_unicode(docstring):
            yield _record(name, docstring, docstring=docstring, body=_body(node, lines))


def topic_records() -> Iterator[Record]:
    """The language reference that `help()` shows, one record per topic."""
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions package it apart
        return
    for topic, text in sorted(topics.topics.items()):
        yield _record(f'pydoc_data.topics.{topic}', text)


def _record(name: str, text: str, *, docstring: str = '', body: str = '') -> Record:
    package = name.split('.')[0]
    return dict(text=text, module=name, package=package, docstring=docstring, body=body)


def _source(path: Path) -> str:
    """The decoded file with newlines as '\\n', or '' where no encoding fits."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ''


def _is_unicode(text: str) -> bool:
    """False for a literal with a lone surrogate, which UTF-8 cannot hold."""
    return not re.search('[\ud800-\udfff]', text)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[_Documented, str]]:
    """(node, dotted name) in the order of the source."""
    yield tree, module
    stack = [(child, module) for child in reversed(tree.body)]
    while stack:
        node, parent = stack.pop()
        name = parent
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f'{parent}.{node.name}'
            yield node, name
        statements = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
        stack.extend((child, name) for child in reversed(statements))


def _body(node: _Documented, lines: list[str]) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ''
    docstring = node.body[0]
    before = lines[node.lineno - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno or 0 : node.end_lineno]
    return textwrap.dedent('\n'.join(before + after)) if len(node.body) > 1 else ''
