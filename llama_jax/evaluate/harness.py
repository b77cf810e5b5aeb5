"""A model for lm-eval (EleutherAI's lm-evaluation-harness), in this process.

All three kinds of request: what contexts share is read once, and texts are batched over the devices
(generate/continuations.py). Importing this needs the extra `eval`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax import installed
from llama_jax.errors import UserError

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a local task asks no hub
try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as missing:
    raise UserError(f'lm-eval takes {missing.name}: {installed.extra("eval")}') from None

from llama_jax.evaluate.subject import Subject
from llama_jax.evaluate.windows import windows
from llama_jax.generate.continuations import Request
from llama_jax.generate.controls import Controls
from llama_jax.text.chat import Conversation

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

MAX_TOKENS = 256
"""That are written where a task does not say how many (lm-eval's default)."""
_CONTROLS = {
    'temperature': 'temperature',
    'top_p': 'top_p',
    'top_k': 'top_k',
    'min_p': 'min_p',
    'typical_p': 'typical_p',
    'repetition_penalty': 'repetition_penalty',
    'min_new_tokens': 'min_tokens',
    'seed': 'seed',
}
"""Settings of a YAML file, and those of ours."""


class HarnessLM(TemplateLM):
    """`Subject` as lm-eval asks one."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject = subject

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.subject.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """In front of a text whose first token is asked for."""
        return self.subject.prefix_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at once."""
        return self.subject.context

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are written, where a task does not say."""
        return MAX_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the caches of lm-eval."""
        return self.subject.name.replace('/', '__')

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, in which what spells a control token is one."""
        return self.subject.encode(string, special=True, begin=add_special_tokens is not False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval, and none of the continuation is lost where a token spans the cut."""
        request = self.subject.pair(context, continuation, special=True)
        return list(request.context), list(request.continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scored = self.subject.score([Request(*request[1:]) for request in requests])
        answers = [(one.total, bool(one.greedy.all())) for one in scored]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial('loglikelihood', text, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of the context, each token scored once."""
        owners, asked = [], []
        for i, request in enumerate(requests):
            # The begin token stands in front of the first window, and is not asked for.
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for one in windows(ids, [self.prefix_token_id], window=self.max_length):
                owners.append(i)
                asked.append(one)
        totals = [0.0] * len(requests)
        for i, scored in zip(owners, self.subject.score(asked), strict=True):
            totals[i] += scored.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes up to a stop string, its end, or as many tokens as are allowed. Of
        a context that leaves no room the beginning is left out."""
        prompts, controls = [], []
        for request in requests:
            context, settings = request.args
            one = self._controls(settings)
            room = self.max_length - one.max_tokens
            if room < 1:
                raise UserError(
                    f'max_gen_toks {one.max_tokens}: there is no room left in the context of '
                    f'{self.max_length}, lower it'
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if len(ids) > room:
                log.warning('a context of %d tokens is cut to its last %d', len(ids), room)
            prompts.append(ids[-room:])
            controls.append(one)
        texts = [one.text for one in self.subject.write(prompts, controls)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial('generate_until', request.args, text)
        return texts

    def _controls(self, settings: Mapping[str, Any]) -> Controls:
        settings = dict(settings)
        until = settings.pop('until', None) or ()
        until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        most = [
            settings.pop(name, None) for name in ('max_gen_toks', 'max_new_tokens', 'max_tokens')
        ]
        max_tokens = next((n for n in most if n is not None), MAX_TOKENS)
        draws = settings.pop('do_sample', settings.get('temperature', 0) > 0)
        given: dict[str, Any] = {'max_tokens': max_tokens, 'stop': until, 'temperature': 1.0}
        for name, value in settings.items():
            if name not in _CONTROLS:
                raise UserError(
                    f'generation_kwargs: {name} is not known here: there are until, max_gen_toks, '
                    f'do_sample, {", ".join(_CONTROLS)}'
                )
            given[_CONTROLS[name]] = value
        if not draws:
            given['temperature'] = 0.0
        return Controls(**given)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What names the template in lm-eval's caches."""
        if chat_template and self.subject.chat is None:
            raise UserError(f'{self.subject.name} has no chat format: leave the template out')
        return repr(self.subject.chat) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text, its control tokens spelled: `tok_encode` reads them again."""
        chat = self.subject.chat
        if chat is None:
            raise UserError(f'{self.subject.name} has no chat format: leave the template out')
        conversation = Conversation(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        ids = chat.encode(conversation, self.subject.vocabulary, begin=())
        return self.subject.vocabulary.decode(ids, show_control=True)


def evaluate(
    model: TemplateLM,
    directory: Path,
    *,
    tasks: Sequence[str] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What lm-eval finds for the YAML tasks of a directory (all, or those that are named)."""
    import lm_eval
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=str(directory), include_defaults=False)
    names = sorted(manager.all_tasks) if tasks is None else list(tasks)
    if not names:
        raise UserError(f'{directory} holds no task of lm-eval')
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return dict(result)


def table(result: Mapping[str, Any]) -> str:
    """lm-eval's own table."""
    from lm_eval.utils import make_table

    return make_table(dict(result))
