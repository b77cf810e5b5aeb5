"""Chat templates of a folder: our text beside that of plain jinja2.

python -m benchmarks.chat_templates FOLDER

Reads every *.jinja and tokenizer_config.json below the folder. Prints, for each of several chats,
how many templates give the same text, another, or refuse; and names those that differ.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.chat import Conversation
from llama_jax.text.template import Template
from llama_jax.text.template_files import of_directory
from tests.text.chats import plain

USER = {'role': 'user', 'content': ' Hi\n<b> 你好 '}
ANSWER = {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\n Hello.'}
SYSTEM = {'role': 'system', 'content': ' Be brief. '}
CALL = {
    'role': 'assistant',
    'content': '',
    'tool_calls': [
        {
            'id': 'call12345',
            'type': 'function',
            'function': {'name': 'weather', 'arguments': {'city': 'Köln "x"'}},
        }
    ],
}
RESULT = {'role': 'tool', 'name': 'weather', 'tool_call_id': 'call12345', 'content': '{"t": 3}'}
TOOL = {
    'type': 'function',
    'function': {
        'name': 'weather',
        'description': 'says <it>',
        'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
    },
}
CHATS: dict[str, list[dict[str, Any]]] = {
    'user': [USER],
    'system, user': [SYSTEM, USER],
    'three turns': [USER, ANSWER, USER],
    'system, three turns': [SYSTEM, USER, ANSWER, USER],
    'user, user': [USER, USER],
    'late system': [USER, SYSTEM, USER],
    'assistant last': [USER, ANSWER],
    'developer': [{'role': 'developer', 'content': 'dev'}, USER],
    'tools': [USER, CALL, RESULT],
}


def templates(folder: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path in sorted(folder.rglob('*.jinja')):
        tokens = {'bos_token': '<s>', 'eos_token': '</s>'}
        yield str(path.relative_to(folder)), path.read_text(encoding='utf-8'), tokens
    for path in sorted(folder.rglob('tokenizer_config.json')):
        settings = json.loads(path.read_text(encoding='utf-8'))
        found = of_directory(path.parent, settings)
        if found:
            for name, source in {'': found.source, **found.named}.items():
                yield f'{path.parent.relative_to(folder)} {name}', source, found.tokens or {}


def outcome(source: str, tokens: Mapping[str, Any], chat: str, prompt: bool) -> str:
    messages, tools = CHATS[chat], [TOOL] if chat == 'tools' else None
    expected: str | None
    try:
        expected = plain(source, messages, tools=tools, prompt=prompt, **tokens)
    except Exception:  # whatever a template raises
        expected = None
    conversation = Conversation(messages, tools=tools, add_generation_prompt=prompt)
    try:
        text = Template(source, tokens).render(conversation)
    except UserError as error:
        if expected is None:
            return 'refused by both'
        ignored = 'ignores tools' in str(error)
        return 'refused: ignores tools' if ignored else f'refused: {error}'
    return 'equal' if text == expected else 'different'


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit('give one folder with templates')
    found = list(templates(Path(sys.argv[1])))
    print(f'{len(found)} templates')
    for chat in CHATS:
        counts: Counter[str] = Counter()
        for name, source, tokens in found:
            for prompt in (True, False):
                how = outcome(source, tokens, chat, prompt)
                counts[how] += 1
                if how == 'different':
                    print(f'  {name}')
        print(f'{chat}: {dict(counts)}', flush=True)


if __name__ == '__main__':
    main()
