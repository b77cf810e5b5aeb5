"""Where chat templates run: `jinja2`'s sandbox as `transformers` sets it up, bounded in time and
size, with strings that keep track of who wrote them (text/marked.py).

A template comes with a model and is not trusted. `jinja2`'s sandbox keeps it from Python's insides;
what it makes is bounded here. Every call, filter, operator and turn of a loop counts, and looks at
the clock; what one of them can make is bounded by the sizes of strings and lists. The functions
that cannot be bounded in this way, which no known chat template uses, are not there.

Needs `jinja2` 3.1.6 of the extra `weights`: the sandboxes before let `str.format` through
(CVE-2024-56326, CVE-2025-27516).
"""

from __future__ import annotations

import datetime
import functools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

from llama_jax.text.budget import (
    CHARACTERS,
    CURRENT,
    Budget,
    TooMuchError,
    check_items,
    check_length,
    check_power,
    check_product,
    tick,
)
from llama_jax.text.marked import (
    TEMPLATE,
    UNKNOWN,
    Marked,
    marks_of,
    text_of,
    to_json,
)

_NUMBER = 100_000
"""Largest number that a filter takes as an option: widths, counts."""
_PATTERN = 1000
"""Characters of a pattern for the time, and of the name of a value in a pattern."""
_FILTERS = (
    *('abs', 'attr', 'batch', 'capitalize', 'center', 'count', 'd', 'default', 'dictsort', 'e'),
    *('escape', 'first', 'float', 'forceescape', 'format', 'groupby', 'int', 'items'),
    *('last', 'length', 'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr', 'replace'),
    *('reverse', 'round', 'safe', 'select', 'selectattr', 'slice', 'sort', 'trim'),
    *('truncate', 'unique', 'upper', 'wordcount'),
)
_METHODS = {
    str: frozenset(
        {
            *('capitalize', 'casefold', 'center', 'count', 'endswith', 'expandtabs', 'find'),
            *('format', 'index', 'isalnum', 'isalpha', 'isascii', 'isdecimal', 'isdigit'),
            *('isidentifier', 'islower', 'isnumeric', 'isprintable', 'isspace', 'istitle'),
            *('isupper', 'join', 'ljust', 'lower', 'lstrip', 'partition', 'removeprefix'),
            *('removesuffix', 'replace', 'rfind', 'rindex', 'rjust', 'rpartition', 'rsplit'),
            *('rstrip', 'split', 'splitlines', 'startswith', 'strip', 'swapcase', 'title'),
            *('upper', 'zfill'),
        }
    ),
    dict: frozenset({'get', 'items', 'keys', 'values', 'copy'}),
    list: frozenset({'index', 'count', 'copy'}),
    tuple: frozenset({'index', 'count'}),
}


class RefusedError(Exception):
    """What a template says by raise_exception."""


class Sandbox(ImmutableSandboxedEnvironment):
    """What templates are compiled for."""

    intercepted_binops = frozenset({'+', '*', '**', '%'})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # so that nothing runs before it is counted
            cache_size=0,
            finalize=_printed,
            extensions=[_Generation, loopcontrols],
        )
        own = {'tojson': to_json, 'string': text_of, 'join': _join, 'sum': _sum}
        own |= {'indent': _indent, 'title': _title}
        filters = {name: FILTERS[name] for name in _FILTERS} | own
        self.filters = {name: _bounded(function) for name, function in filters.items()} | _COUNTED
        del self.globals['lipsum']
        self.globals.update(
            dict=_Dict(),
            namespace=_Namespace,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
        )

    # What compiled templates call.

    @staticmethod
    def concat(pieces: Iterable[str]) -> Marked:
        return tick().charge(Marked().join(pieces))

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        budget = tick()
        if isinstance(function, BuiltinMethodType | MethodType):
            function = _method(function)
        return budget.charge(super().call(context, function, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = tick()
        left, right = _safe(left), _safe(right)
        if operator == '**':
            check_power(left, right)
        elif operator == '*':
            check_product(left, right)
            check_product(right, left)
        return budget.charge(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, '__name__', None) != 'format' or not isinstance(
            getattr(value, '__self__', None), str
        ):
            return None
        pattern = value.__self__

        def filled_in(*args: Any, **options: Any) -> Marked:  # functools.partial would show self
            return _format(self, pattern, *args, **options)

        return filled_in


class Compiled:
    """A template, ready to run; several threads may run it at a time.

    Attributes:
        names: of all variables in it.
    """

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError for what is no template."""
        sandbox = Sandbox()
        tree = sandbox.parse(source)
        self.names = frozenset(name.name for name in tree.find_all(nodes.Name))
        tree = _Counted().visit(tree)
        tree.set_environment(sandbox)
        code = sandbox.compile(tree)
        self._template = jinja2.Template.from_code(sandbox, code, sandbox.make_globals(None))

    def run(self, variables: Mapping[str, Any], n_given: int) -> Marked:
        """The text for variables that hold `n_given` characters. Raises TooMuchError, RefusedError,
        and any other Exception that the template provokes."""
        # A template may look at everything it was given dozens of times.
        budget = Budget.of(CHARACTERS + 32 * n_given)
        before = CURRENT.set(budget)
        template = self._template
        try:
            return Sandbox.concat(template.root_render_func(template.new_context(dict(variables))))
        finally:
            CURRENT.reset(before)


@jinja2.pass_context
def _literal(_: Context, text: str) -> Marked:
    """A string of the template."""
    return _marked(text)


@functools.lru_cache(maxsize=4096)
def _marked(text: str) -> Marked:
    return Marked(text, TEMPLATE)


@jinja2.pass_context
def _joined(_: Context, *values: Any) -> Marked:
    """The operator `~`."""
    return tick().charge(Marked().join(map(text_of, values)))


@jinja2.pass_context
def _each(_: Context, items: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through."""
    for item in items:
        tick()
        yield item


@jinja2.pass_context
def _made(_: Context, value: Any) -> Any:
    """What the template makes without a call, such as a list or a slice."""
    return tick().charge(value)


# Filters by names that no template can spell. They take the context, so that the compiler does not
# run them by itself.
_COUNTED = {' literal': _literal, ' joined': _joined, ' each': _each, ' made': _made}


class _Counted(NodeTransformer):
    """Makes a template call what counts and marks, where it would do without."""

    def _text(self, node: nodes.Const) -> nodes.Expr:
        return _filtered('literal', node) if isinstance(node.value, str) else node

    def _data(self, node: nodes.TemplateData) -> nodes.Expr:
        return _filtered('literal', nodes.Const(node.data, lineno=node.lineno))

    def _joined(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered('joined', *node.nodes)

    def _loop(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered('each', node.iter)
        return node

    def _output(self, node: nodes.Output) -> nodes.Node:
        # What `safe` marks as markup is the same text once it is out.
        for i, child in enumerate(node.nodes):
            while isinstance(child, nodes.Filter) and child.name == 'safe' and child.node:
                node.nodes[i] = child = child.node
        return self.generic_visit(node)

    def _made(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, 'ctx', 'load') != 'load' else _filtered('made', node)

    def _getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    visit_Const, visit_TemplateData, visit_Concat = _text, _data, _joined
    visit_For, visit_Output, visit_Getitem = _loop, _output, _getitem
    visit_List = visit_Tuple = visit_Dict = visit_Compare = visit_Test = _made


def _filtered(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, f' {name}', list(args), [], None, None, lineno=value.lineno)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; it prints what it holds."""

    tags = {'generation'}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.CallBlock(self.call_method('held'), [], [], body).set_lineno(lineno)

    def held(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of Python, as far as templates need it."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        raise TooMuchError('prints a namespace')


def _raise_exception(message: Any) -> NoReturn:
    raise RefusedError(str.__str__(text_of(message)))


def _strftime_now(pattern: str) -> Marked:
    if len(pattern) > _PATTERN:
        raise TooMuchError(f'writes the time by more than {_PATTERN} characters')
    marks = set(marks_of(pattern))
    text = datetime.datetime.now().strftime(str.__str__(pattern))
    return Marked(text, TEMPLATE if marks == {TEMPLATE} else UNKNOWN)


def _printed(value: Any) -> Any:
    return value if isinstance(value, Undefined) else text_of(value)


def _safe(value: Any) -> Any:
    """`value` with methods and operators that are bounded."""
    return Marked(value) if type(value) is str else value


def _method(function: Any) -> Any:
    """A method that may be called. Raises TooMuchError for others of Python's types."""
    owner, name = _safe(function.__self__), function.__name__
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    if isinstance(owner, LoopContext | Cycler | _Generation):
        return function
    if kind is None or name not in _METHODS[kind]:
        raise TooMuchError(f'calls {type(owner).__name__}.{name}, which is not supported')
    return getattr(owner, name)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted."""

    @functools.wraps(function)  # and with it the arguments that jinja2 puts before the others
    def bounded(*args: Any, **options: Any) -> Any:
        budget = tick()
        n_passed = 2 if hasattr(function, 'jinja_pass_arg') else 1
        for option in (*args[n_passed:], *options.values()):
            if isinstance(option, int) and abs(option) > _NUMBER:
                raise TooMuchError(f'gives {option} to the filter {function.__name__}')
        return budget.charge(function(*map(_safe, args), **options))

    return bounded


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Any, d: str = '', attribute: str | int | None = None
) -> Marked:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return text_of(d).join(map(text_of, value))


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment,
    value: Any,
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    for item in value:
        start = tick().charge(start + item)
    return start


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Marked:
    """The filter of `jinja2`, with marks; what it adds is the template's."""
    space = text_of(width) if isinstance(width, str) else Marked(' ' * width, TEMPLATE)
    head, *lines = (text_of(text) + '\n').splitlines()
    check_length(len(text_of(text)) + len(space) * len(lines))
    lines = [space + line if line or blank else line for line in lines]
    joined = Marked('\n', TEMPLATE).join([head, *lines])
    return space + joined if first else joined


def _title(text: Any) -> Marked:
    source = text_of(text)
    check_items(len(source) // 4)  # words that it makes, or more
    titled = FILTERS['title'](str.__str__(source))
    return Marked(titled, source.marks if source.isascii() else UNKNOWN)


def _format(sandbox: Sandbox, pattern: str, /, *args: Any, **options: Any) -> Marked:
    """`str.format`. Fields with a format of their own are not followed."""
    formatter = SandboxedFormatter(sandbox)
    kinds = set(marks_of(pattern))
    mark = kinds.pop() if len(kinds) == 1 else UNKNOWN
    pieces: list[str] = []
    automatic = 0
    budget = tick()
    for literal, name, spec, conversion in string.Formatter().parse(str.__str__(pattern)):
        pieces.append(Marked(literal, mark))
        if name is None:
            continue
        if spec and (len(spec) > 5 or '{' in spec):
            raise TooMuchError('formats a text by more than five characters')
        if not name:
            name, automatic = str(automatic), automatic + 1
        if len(name) > _PATTERN:
            raise TooMuchError(f'names a value by more than {_PATTERN} characters')
        value, _ = formatter.get_field(name, args, options)
        if spec or conversion:
            value = formatter.convert_field(value, conversion) if conversion else value
            value = format(value, spec or '')
        pieces.append(budget.charge(text_of(value)))
        budget.tick()
    return Marked().join(pieces)
