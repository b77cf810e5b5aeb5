"""The functions that a chat offers to the model, and what is asked of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_jax.serve.body import Fields, shown
from llama_jax.text.calls import CallFormat, call_format
from llama_jax.text.chat import ChatFormat

TOOL_FIELDS = {'tools', 'tool_choice', 'parallel_tool_calls'}
_FREE = ('none', 'auto')
"""Choices that leave to the model what it writes."""


@dataclass(frozen=True)
class Tools:
    given: tuple[dict[str, Any], ...] = ()
    """As the template reads them."""
    callable: tuple[str, ...] = ()
    """Names that are calls."""
    format: CallFormat | None = None
    """How the model writes them; None: calls are not told from text."""
    demanded: bool = False
    """The text is calls and nothing else, by a grammar."""
    several: bool = True

    @property
    def told(self) -> bool:
        """Calls are told apart from the text."""
        return bool(self.given) and self.format is not None

    def wanted(
        self, control: Mapping[str, int], answer: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """What MakeGrammar takes for calls that are demanded, or for an answer of this format or
        calls; None: any text. `control`: tokens of the vocabulary."""
        if not (self.demanded or (self.told and answer)):
            return answer
        functions = {tool['function']['name']: tool['function'] for tool in self.given}
        return {
            'type': 'calls',
            'format': self.format,
            'functions': {name: _schema(functions[name]) for name in self.callable},
            'several': self.several,
            'control': self.tags(control),
            'answer': answer,
        }

    def tags(self, control: Mapping[str, int]) -> dict[str, int]:
        """Those around calls that are control tokens."""
        tags = (self.format.opening, self.format.closing) if self.format else ()
        return {tag: control[tag] for tag in tags if tag in control}

    def shown(self, control: Mapping[str, int]) -> dict[int, bytes]:
        """Tags that the text has to show, for calls to be told by them."""
        return {i: tag.encode() for tag, i in self.tags(control).items()} if self.told else {}


NO_TOOLS = Tools()


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments, which are an object in any case."""
    parameters = function.get('parameters')
    if parameters is None:
        return {'type': 'object', 'properties': {}, 'additionalProperties': False}
    return {'type': 'object', **parameters}


def demands_calls(body: Mapping[str, Any]) -> bool:
    """Whether a body, not checked yet, asks for a grammar of calls."""
    return (body.get('tool_choice') or 'auto') not in _FREE


def tools_of(fields: Fields, chat: ChatFormat) -> Tools:
    """Of the body of a chat."""
    given = fields.array('tools') or []
    names = _names(fields, given)
    several = fields.boolean('parallel_tool_calls', True)
    choice = fields.raw('tool_choice') or 'auto'
    if choice in _FREE:
        if not given or choice == 'none':
            return NO_TOOLS  # nor is the model told of them
        format_ = call_format(chat)
        for name in ('response_format', 'regex'):
            if _asks(fields, name) and not _tagged(format_):
                fields.bad(name, "leaves no room for calls of tools: set tool_choice to 'none'")
        return Tools(tuple(given), names, format_, several=several)
    if choice != 'required':
        names, several = (_named(fields, choice, names),), False
    if not given:
        fields.bad('tool_choice', f'is {shown(choice)} without tools: give tools')
    format_ = call_format(chat)
    if format_ is None:
        fields.bad(
            'tool_choice',
            f"is {shown(choice)}, and how this model writes calls is not known: give 'auto'",
        )
    for name in ('response_format', 'regex', 'continue_final_message'):
        if _asks(fields, name):
            fields.bad(name, 'is given, and tool_choice demands calls: leave one of them out')
    return Tools(tuple(given), names, format_, demanded=True, several=several)


def _asks(fields: Fields, name: str) -> bool:
    """Whether a field asks for anything: what is empty does not, nor does a format of text."""
    return fields.raw(name) not in (None, False, '', {}, {'type': 'text'})


def _tagged(format_: CallFormat | None) -> bool:
    """Calls are told from any other text by how they begin."""
    return format_ is not None and bool(format_.opening)


def _names(fields: Fields, given: list[Any]) -> tuple[str, ...]:
    names: list[str] = []
    for i, tool in enumerate(given):
        path = f'tools[{i}]'
        if not isinstance(tool, dict):
            fields.bad(path, 'is no object')
        function = tool.get('function')
        if tool.get('type') != 'function' or not isinstance(function, dict):
            fields.bad(path, "is no function: give type 'function' and function")
        name, parameters = function.get('name'), function.get('parameters')
        if not isinstance(name, str) or not name.strip():
            fields.bad(f'{path}.function.name', 'is missing: give a string')
        if name in names:
            fields.bad(f'{path}.function.name', f'{shown(name)} is given twice: rename one')
        if parameters is not None and (
            not isinstance(parameters, dict) or parameters.get('type', 'object') != 'object'
        ):
            fields.bad(
                f'{path}.function.parameters', "is no JSON schema of type 'object': give one"
            )
        names.append(name)
    return tuple(names)


def _named(fields: Fields, choice: Any, names: tuple[str, ...]) -> str:
    function = choice.get('function') if isinstance(choice, dict) else None
    name = function.get('name') if isinstance(function, dict) else None
    if not isinstance(choice, dict) or choice.get('type') != 'function' or name is None:
        fields.bad(
            'tool_choice',
            f"is {shown(choice)}: give 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': ...}}",
        )
    if name not in names:
        fields.bad('tool_choice', f'names {shown(name)}, which is none of tools')
    return name
