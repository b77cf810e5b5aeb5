"""Bodies of requests: JSON to fields, each checked by name as it is taken."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from llama_jax.serve.errors import ApiError

_T = TypeVar('_T')
_SHOWN = 60
_DIGITS = re.compile('[0-9]{1,10}')
_MANY = 50_000
"""Values of a body, after which it is read in Python: the reader in C holds Python's lock from
the beginning to the end, and no other request is served for a second."""
_CONTAINERS = 100_000


class _InPython(json.JSONDecoder):
    """The same values and errors, read more slowly, with other threads between; at most so many
    arrays and objects, for with millions of them each search for garbage is a pause as well."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant)
        self._left = _CONTAINERS
        self.parse_array = self._counted(json.decoder.JSONArray)  # type: ignore[attr-defined]
        self.parse_object = self._counted(json.decoder.JSONObject)  # type: ignore[attr-defined]
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _counted(self, parse: Callable[..., _T]) -> Callable[..., _T]:
        def counted(*args: Any) -> _T:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f'it holds more than {_CONTAINERS} arrays and objects')
            return parse(*args)

        return counted


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError for anything else."""
    try:
        text = body.decode('utf-8')
        if sum(map(body.count, (b',', b'[', b'{'))) > _MANY:
            value = _InPython().decode(text)
        else:
            value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError(400, 'the body is not UTF-8', code='invalid_json') from None
    except RecursionError:
        raise ApiError(400, 'the body is nested too deeply', code='invalid_json') from None
    except ValueError as error:
        raise ApiError(400, f'the body is not JSON: {error}', code='invalid_json') from None
    if not isinstance(value, dict):
        raise ApiError(400, f'the body is {_kind(value)}: send an object', code='invalid_json')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON number')


class Fields:
    """The fields of a body. A field that is null counts as absent.

    Every method raises ApiError with the name of the field when its value is of another kind.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        known: Iterable[str],
        unread: Iterable[str] = (),
        nothing: Mapping[str, Any] | None = None,
        instead: Mapping[str, str] | None = None,
        path: str = '',
    ):
        """Refuses what is not `known`, but for fields in `unread`, which may have any value, and
        those in `nothing` with the value there, which asks for nothing. `instead` says what to do
        about others. `path` stands before names, as in `messages[0].`."""
        self._path = path
        self._fields = {name: value for name, value in fields.items() if value is not None}
        known, unread, nothing = set(known), set(unread), nothing or {}
        for name, value in self._fields.items():
            if name in known or name in unread:
                continue
            what = 'is not supported'
            if name in nothing:
                if _same(value, nothing[name]):
                    continue
                what = f'{shown(value)} is not supported, only {json.dumps(nothing[name])}'
            remedy = (instead or {}).get(name) or _nearest(name, known)
            raise ApiError(
                400,
                f'{path}{shown(name, quote=False)} {what}: {remedy}',
                param=f'{path}{name}',
                code='unsupported_parameter',
            )

    def has(self, name: str) -> bool:
        return name in self._fields

    def raw(self, name: str) -> Any:
        return self._fields.get(name)

    def bad(self, name: str, what: str) -> NoReturn:
        """`what` is wrong with the field."""
        raise ApiError(400, f'{self._path}{name} {what}', param=f'{self._path}{name}')

    def _take(self, name: str, default: _T, kind: type | tuple[type, ...], what: str) -> Any | _T:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.bad(name, f'is {_kind(value)}: give {what}')
        return value

    def number(self, name: str, default: _T) -> float | _T:
        value = self._take(name, default, (int, float), 'a number')
        if isinstance(value, int | float):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
            if not math.isfinite(value):
                self.bad(name, 'is too large a number')
        return value

    def integer(self, name: str, default: _T, *, below: int = 2**63) -> int | _T:
        value = self._take(name, default, int, 'an integer')
        if isinstance(value, int) and abs(value) >= below:
            self.bad(name, 'is too large an integer')
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        return self._take(name, default, bool, 'true or false')

    def text(self, name: str, default: _T) -> str | _T:
        return self._take(name, default, str, 'a string')

    def object(self, name: str) -> dict[str, Any] | None:
        return self._take(name, None, dict, 'an object')

    def array(self, name: str) -> list[Any] | None:
        return self._take(name, None, list, 'an array')

    def texts(self, name: str, *, most: int, longest: int) -> tuple[str, ...]:
        """One string, or an array of them. Those that are empty or null ask for nothing."""
        value = self._take(name, (), (str, list), 'a string or an array of strings')
        texts = (value,) if isinstance(value, str) else tuple(value)
        texts = tuple(text for text in texts if text is not None and text != '')
        if len(texts) > most:
            self.bad(name, f'has {len(texts)} strings: give at most {most}')
        for text in texts:
            if not isinstance(text, str):
                self.bad(name, f'holds {_kind(text)}: give strings')
            if len(text) > longest:
                self.bad(name, f'holds {len(text)} characters: give at most {longest}')
        return texts

    def ids(self, name: str, *, vocab: int) -> tuple[int, ...]:
        """An array of token ids."""
        value = self.array(name) or []
        return self.check_ids(name, value, vocab=vocab)

    def check_ids(self, name: str, value: list[Any], *, vocab: int) -> tuple[int, ...]:
        for token in value:
            if not isinstance(token, int) or isinstance(token, bool):
                self.bad(name, f'holds {_kind(token)}: give token ids')
            if not 0 <= token < vocab:
                self.bad(name, f'holds token id {shown(token)}, outside the {vocab} ids')
        return tuple(value)

    def biases(self, name: str, *, vocab: int) -> dict[int, float]:
        """An object from token ids, as JSON spells keys, to numbers."""
        biases = {}
        for key, bias in (self.object(name) or {}).items():
            if not _DIGITS.fullmatch(key) or int(key) >= vocab:
                self.bad(name, f'has the key {shown(key)}: give token ids below {vocab}')
            if not isinstance(bias, int | float) or isinstance(bias, bool):
                self.bad(name, f'of token {key} is {_kind(bias)}: give a number')
            if not -100 <= bias <= 100:
                self.bad(name, f'of token {key} is {shown(bias)}: give a number within -100..100')
            biases[int(key)] = float(bias)
        return biases


def shown(value: Any, *, quote: bool = True) -> str:
    """A value of the user's in a message: short, on one line."""
    try:
        text = repr(value) if quote else str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f'a large {type(value).__name__}'
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _nearest(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is none."""
    near = difflib.get_close_matches(name[:_SHOWN], sorted(known), n=1, cutoff=0.8)
    return f'leave it out, or give {near[0]}' if near else 'leave it out'


def _kind(value: Any) -> str:
    names: dict[type, str] = {
        dict: 'an object',
        list: 'an array',
        str: 'a string',
        bool: 'true or false',
        type(None): 'null',
    }
    return names.get(type(value)) or f'the number {shown(value)}'
