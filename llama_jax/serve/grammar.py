"""Constrained output: JSON of a schema, or text of a regular expression, by the library llguidance
(extra `serve`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import llguidance
import numpy as np

from llama_jax.engine import request
from llama_jax.errors import UserError
from llama_jax.serve import call_grammar, json_schema
from llama_jax.text.calls import CallFormat

_BLANK = r' |\n[ \t]{0,40}'
"""Between the parts of JSON, or nothing: without a limit a model may write blanks for ever."""
_KEPT = 16
"""Grammars that are kept compiled."""


class Vocabulary(Protocol):
    """What is needed of `text.vocabulary.Vocabulary`."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, continues: bool = False) -> np.ndarray: ...
    def token_bytes(self, token: int) -> bytes: ...


class Compiler:
    """Makes grammars over the tokens of one vocabulary, also those that are parts of a character.

    Any thread may call; the last few grammars stay compiled. UserErrors name the fault.
    """

    def __init__(self, vocabulary: Vocabulary, *, vocab: int, end_ids: Sequence[int]) -> None:
        """`vocab`: rows of the embedding. `end_ids`: any of them
        ends a text."""
        tokens = _Tokens(vocabulary, vocab, end_ids[0])
        self._tokens = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(tokens), eos_token=list(end_ids)
        )
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def json_schema(self, schema: Mapping[str, Any] | bool | None = None) -> Grammar:
        """JSON that is valid under a schema; None: any JSON object.

        Raises UserError for a schema that is none, that nothing fulfils, or that holds a keyword
        which cannot be enforced.
        """
        return self.make_grammar({'type': 'json_schema', 'schema': schema})

    def regex(self, pattern: str) -> Grammar:
        """Text that `pattern` matches from its beginning to its end, in the syntax of Rust's crate
        `regex`: no look-around, no word boundaries, no references back.

        Raises UserError for a pattern that is none.
        """
        return self.make_grammar({'type': 'regex', 'regex': pattern})

    def calls(
        self,
        format_: CallFormat,
        functions: Mapping[str, Mapping[str, Any]],
        *,
        several: bool = True,
        control: Mapping[str, int] | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """A call of one of `functions` as `format_` writes it, or `several`, and nothing else; the
        arguments of each are valid under its schema. `control`: ids of the tags that are control
        tokens. `answer`: or a text of this format, see `make_grammar`, instead of calls.

        Raises UserError as `json_schema` does, and names the function.
        """
        grammar = call_grammar.of(
            format_,
            {name: _of_schema(schema, call_grammar.closed) for name, schema in functions.items()},
            several=several,
            control=control or {},
            answer=_of_format(answer)[1] if answer else None,
        )
        try:
            return self._new('set of functions', grammar)
        except UserError:
            for name, schema in functions.items():
                try:
                    self.json_schema(schema)
                except UserError as error:
                    raise UserError(f'the parameters of {name!r}: {error}') from None
            raise

    def make_grammar(self, wanted: Mapping[str, Any]) -> Grammar:
        """What a server takes as `Served.make_grammar`."""
        if wanted.get('type') == 'calls':
            options = {name: value for name, value in wanted.items() if name != 'type'}
            return self.calls(options.pop('format'), options.pop('functions'), **options)
        return self._new(*_of_format(wanted))

    def _new(self, what: str, grammar: str) -> Grammar:
        return Grammar(self._compiled(what, grammar).deep_copy())

    def _compile(self, what: str, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()  # a grammar that is too large shows here
        if matcher.is_error():
            raise UserError(
                f'this {what} cannot be held ({_fault(matcher.get_error())}): correct or simplify '
                'it'
            )
        return matcher


class Grammar(request.Grammar):
    """What a constrained text may say next."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> np.ndarray:
        """Tokens that may come next, bool [V]; the end ids alone where nothing else may.

        Raises UserError when the text so far made the grammar too large.
        """
        allowed = self._matcher.compute_logit_bias()
        self._check()
        return np.frombuffer(allowed, np.uint8) != 0

    def accept(self, token: int) -> None:
        """`token` was drawn; it is one of the mask."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(
                f'the text cannot go on within its grammar ({_fault(self._matcher.get_error())}): '
                'simplify the grammar'
            )


class _Tokens:
    """A vocabulary as llguidance takes it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab: int, end_id: int) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = end_id
        n_ids = min(vocab, vocabulary.vocab_size)  # rows behind them are padding, and no text
        self.tokens = [vocabulary.token_bytes(i) for i in range(n_ids)] + [b''] * (vocab - n_ids)
        # Their text is none: no grammar over text ever allows them.
        self.special_token_ids = [i for i, token in enumerate(self.tokens) if not token]
        for i in self.special_token_ids:  # which the library tells apart by their bytes
            self.tokens[i] = b'\xff<%d>' % i

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, continues=True).tolist()


def _of_format(wanted: Mapping[str, Any]) -> tuple[str, str]:
    """What it is called, and the grammar. Raises UserError for what is none."""
    kind = wanted.get('type')
    if kind == 'regex':
        try:
            return 'regular expression', llguidance.LLMatcher.grammar_from_regex(wanted['regex'])
        except ValueError as error:  # half a surrogate pair, which no UTF-8 text can hold
            raise UserError(f'this is no regular expression ({_line(error)}): correct it') from None
    if kind not in ('json_object', 'json_schema'):
        raise UserError(f'format {kind!r} is none of json_object, json_schema, regex and calls')
    schema = wanted.get('schema')
    return 'JSON schema', _of_schema({'type': 'object'} if schema is None else schema)


def _of_schema(schema: Mapping[str, Any] | bool, change: Callable[[Any], Any] | None = None) -> str:
    """The grammar of a JSON schema; `change` as of `json_schema.held`. Raises UserError for what is
    none."""
    schema = json_schema.held(schema, change)
    try:
        text = json.dumps(schema, allow_nan=False)
        return llguidance.LLMatcher.grammar_from_json_schema(
            text, overrides={'whitespace_pattern': _BLANK}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f'this is no JSON schema ({_line(error)}): correct it') from None


def _fault(message: str) -> str:
    """The line of an error message that says what is wrong."""
    if 'coerce_one_of' in message:  # an option of the library's
        return (
            'branches of a oneOf may be valid at once: give each another type or a required '
            'property with another const, or write anyOf'
        )
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    return (said or lines or ['unknown'])[0][:300]


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]
