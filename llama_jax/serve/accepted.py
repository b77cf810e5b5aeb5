"""Fields that clients send and that are not read, and what to do about those that are refused."""

from __future__ import annotations

from typing import Any

UNREAD = frozenset(
    {
        # Whose request it is, and what is kept of it at OpenAI: nothing is kept here.
        *('user', 'safety_identifier', 'metadata', 'store'),
        # How OpenAI serves it.
        *('service_tier', 'prompt_cache_key', 'prompt_cache_retention', 'prompt_cache_options'),
        # Of other servers: where to keep what, for how long, and names of requests.
        *('cache_prompt', 'keep_alive', 'request_id', 'session_id'),
    }
)
"""Taken with any value: they do not change what is answered."""
CHAT_UNREAD = UNREAD | {'verbosity'}
"""Of chats; it is for models that were trained to hear it."""

_NOTHING: dict[str, Any] = {
    'use_beam_search': False,
    'length_penalty': 1,
    'early_stopping': False,
    'repeat_penalty': 1,
    'skip_special_tokens': True,
    'spaces_between_special_tokens': True,
    'include_stop_str_in_output': False,
}
NOTHING_ASKED: dict[str, dict[str, Any]] = {
    'completion': {**_NOTHING, 'add_special_tokens': True},
    'chat': {
        **_NOTHING,
        'add_special_tokens': False,
        'best_of': 1,
        'modalities': ['text'],
        'functions': [],
        'function_call': 'none',
    },
    'embedding': {},
}
"""Taken with this value, which asks for nothing, and refused with another."""

_FORMAT = 'give response_format or regex'
INSTEAD = {
    'audio': 'texts are all that is written, leave it out',
    'best_of': 'give n, or ask /v1/completions',
    'functions': 'give tools',
    'function_call': 'give tools and tool_choice',
    'grammar': _FORMAT,
    'guided_choice': _FORMAT,
    'guided_grammar': _FORMAT,
    'guided_json': _FORMAT,
    'guided_regex': 'give regex',
    'input': 'ask /v1/embeddings, or give prompt or messages',
    'json_schema': _FORMAT,
    'max_new_tokens': 'give max_tokens',
    'messages': 'ask /v1/chat/completions, or give prompt',
    'n_predict': 'give max_tokens',
    'prompt': 'ask /v1/completions, or give messages',
    'repeat_penalty': 'give repetition_penalty',
    'structured_outputs': _FORMAT,
    'typical': 'give typical_p',
}
"""What to do about a field that is refused; others are left out."""

MESSAGE_UNREAD = frozenset(
    {'annotations', 'parsed', 'id', 'provider_specific_fields', 'cache_control'}
)
"""Of messages: clients send back what they were answered, with what they wrote down beside it."""
PART_UNREAD = frozenset({'annotations', 'cache_control', 'prompt_cache_breakpoint', 'id'})
"""Of the parts of a message."""
