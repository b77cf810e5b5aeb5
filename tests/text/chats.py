"""A vocabulary for chats, and plain jinja2 as `transformers` sets it up: what templates print."""

import datetime
import itertools
import json

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMES = (
    *('<s>', '</s>', '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin_of_text|>'),
    *('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>'),
    *('<|header_start|>', '<|header_end|>', '<|eot|>', '<|eom|>', '<|user|>', '<|tool_x|>'),
)


class Bytes:
    """A vocabulary of bytes; control tokens follow."""

    def __init__(self, names=NAMES):
        self.control = {name: 256 + i for i, name in enumerate(names)}
        self.vocab_size = 256 + len(names)
        self.bos_id, self.eos_id = self.control.get('<s>'), self.control.get('</s>')
        self.pad_id, self.end_ids, self.dummy_prefix = self.eos_id, (self.eos_id,), False
        self.space_after_control, self.takes_space = True, {}

    def encode(self, text, *, continues=False, most=None):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids, *, show_control=False):
        return b''.join(self.token_bytes(i) for i in ids).decode()

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else b''

    def read(self, ids):
        """Control tokens by name among pieces of text."""
        name = {i: name for name, i in self.control.items()}
        groups = itertools.groupby(ids, lambda i: name.get(i, 'text'))
        pieces = [(kind, list(group)) for kind, group in groups]
        return [
            piece
            for kind, ids in pieces
            for piece in ([self.decode(ids)] if kind == 'text' else [kind] * len(ids))
        ]

    def controls(self, ids):
        return [i for i in ids if i >= 256]


class _Generation(Extension):
    tags = {'generation'}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
        return nodes.CallBlock(self.call_method('held'), [], [], body).set_lineno(lineno)

    def held(self, caller):
        return caller()


def plain(source, messages, *, tools=None, documents=None, prompt=True, **variables):
    """The text, by jinja2 alone."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        how = {'indent': indent, 'separators': separators, 'sort_keys': sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda text: datetime.datetime.now().strftime(text)
    thoughts = ('reasoning_content', 'thinking', 'reasoning')
    seen = []
    for message in messages:
        found = next((message[key] for key in thoughts if message.get(key) is not None), None)
        if found is not None:
            message = {'thinking': found, **message, 'reasoning_content': found}
        seen.append(message)
    return environment.from_string(source).render(
        messages=seen,
        tools=tools,
        documents=documents,
        add_generation_prompt=prompt,
        **variables,
    )
