"""The formats of `text.chat` as Jinja templates, for programs that read nothing else."""

from __future__ import annotations

from llama_jax.text.chat import ChatFormat, ChatML, Headers, Llama2
from llama_jax.text.template import Template

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    '{% set turns = messages[1:] %}'
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in messages %}{% for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] %}"
    "{% if tag in message['content'] %}"
    "{{ raise_exception(tag + ' means something to Llama 2: take it out of the message') }}"
    '{% endif %}{% endfor %}{% endfor %}'
    '{% for message in turns %}'
    "{% if message['role'] != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('a chat of Llama 2 is [system] user, then assistant and user in turns') }}"
    '{% endif %}'
    "{% set said = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}"
    '{% endfor %}'
)


def source_of(chat: ChatFormat | None, *, begin: bool = False) -> str | None:
    """The template that writes what the format does; None without one. `begin`: the model reads
    bos before every text, which programs leave to the template of a chat."""
    if isinstance(chat, Template):
        return chat.source
    if isinstance(chat, Headers):
        return _headers(chat)
    if isinstance(chat, ChatML):
        return '{{ bos_token }}' * begin + _CHATML
    return _LLAMA2 if isinstance(chat, Llama2) else None


def _headers(chat: Headers) -> str:
    role = (
        "('system' if message['role'] == 'developer' else "
        "'ipython' if message['role'] == 'tool' else message['role'])"
    )
    return (
        f"{{{{ '{chat.begin}' }}}}{{% for message in messages %}}"
        f"{{{{ '{chat.start}' + {role} + '{chat.stop}\n\n' + message['content'] + '{chat.end}' }}}}"
        '{% endfor %}{% if add_generation_prompt %}'
        f"{{{{ '{chat.start}assistant{chat.stop}\n\n' }}}}{{% endif %}}"
    )
