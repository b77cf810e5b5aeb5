"""Chat templates that write calls of tools, and a vocabulary for them."""

from llama_jax.text.template import Template
from tests.text.chats import NAMES, Bytes

BODY = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or "" }}'
    '{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def template(call, told=''):
    tools = '{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}'
    return Template(tools + told + BODY.replace('CALL', call), {})


OBJECT = '{"name": "{{ c.function.name }}", "KEY": {{ c.function.arguments | tojson }}}'
HERMES = template('\n<tool_call>\n' + OBJECT.replace('KEY', 'arguments') + '\n</tool_call>')
LLAMA3 = template(OBJECT.replace('KEY', 'parameters'), 'Environment: ipython\n')
MISTRAL = template('[TOOL_CALLS][{{ c.function | tojson }}]')


class Vocabulary(Bytes):
    """Mistral's tag is a control token, those of Hermes are text."""

    def __init__(self):
        super().__init__((*NAMES, '[TOOL_CALLS]'))

    def decode(self, ids, *, show_control=False):
        return b''.join(map(self.token_bytes, ids)).decode(errors='replace')


VOCABULARY = Vocabulary()
