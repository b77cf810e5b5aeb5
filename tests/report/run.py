"""A run as the loop leaves it, on real text, with the curves of a small model that learns."""

import inspect
import json
import math
import random
import textwrap
from dataclasses import replace

import configs
from llama_jax.report.compressors import compress
from llama_jax.train.experiment import digest, to_dict

TOKENS_PER_STEP = 2048
FLOPS_PER_TOKEN = 27_262_976.0
PEAK = 212.4e9
SECONDS_PER_STEP = 0.41
BYTES_PER_TOKEN = 3.31

# What a page has to survive: markup, scripts of several kinds, controls, right-to-left overrides.
HOSTILE = (
    '</pre><script>alert("1 & 2")</script><img src="https://example.org/x.png" onerror=a>\n'
    '滾滾長江東逝水，浪花淘盡英雄。是非成敗轉頭空：青山依舊在\n'
    '\U0001f999 \U0001f469\u200d\U0001f52c ends\u2028here\x85\x00\x1b[31m\x7f \u202eesrever'
)


def documents():
    """Held-out text: the source of the functions of one module."""
    return [inspect.getsource(f) for f in vars(textwrap).values() if inspect.isfunction(f)]


def facts(**changes):
    """run.json"""
    experiment = configs.get('quickstart')
    experiment = replace(experiment, train=replace(experiment.train, steps=800))
    return {
        'name': 'quickstart',
        'experiment': to_dict(experiment),
        'digest': digest(experiment),
        'versions': {'python': '3.11.13', 'jax': '0.10.2', 'flax': '0.12.8'},
        'device': 'cpu',
        'devices': 1,
        'processes': 1,
        'git_commit': '19155f4e0d3bb3f4ec0a2e0a5a3a6d5d2f4ab8f1-dirty',
        'parameters': 3_607_808,
        'flops_per_token': FLOPS_PER_TOKEN,
        'peak_flops': PEAK,
        'peak_convention': (
            'MFU = model FLOPs per second / (devices x peak). Model FLOPs: 6 per weight and '
            'position. Peak: float32 matrix product of 2048^3 measured at start'
        ),
        'started': '2025-11-23T20:14:02+00:00',
        'command': ['experiments/pretrain.py', 'quickstart', '--workdir', 'runs/quick start'],
        **changes,
    }


def metrics(*, steps=800, log_every=10, validate_every=200):
    """Lines of metrics.jsonl."""
    chance = random.Random(7)
    lines, seconds = [], 0.6
    for step in range(log_every, steps + 1, log_every):
        done = step / max(steps, 800)
        nll = 2.05 + 5.6 * math.exp(-14 * done) + 0.9 * math.exp(-2.2 * done)
        speed = TOKENS_PER_STEP / SECONDS_PER_STEP * chance.uniform(0.92, 1.03)
        seconds += log_every * TOKENS_PER_STEP / speed
        at = {
            'step': step,
            'tokens': step * TOKENS_PER_STEP,
            'flops': step * TOKENS_PER_STEP * FLOPS_PER_TOKEN,
            'seconds': seconds,
        }
        noisy = nll + chance.gauss(0, 0.06)
        lines.append(
            {
                'kind': 'train',
                **at,
                'loss': noisy + 0.004,
                'nll': noisy,
                'accuracy': 0.62 * (1 - math.exp(-4 * done)),
                'grad_norm': 0.35 + 2.4 * math.exp(-25 * done) + abs(chance.gauss(0, 0.08)),
                'learning_rate': 3e-3
                * (step / 50 if step < 50 else 0.55 + 0.45 * math.cos(math.pi * done)),
                'skipped': 0,
                'tokens_per_second': speed,
                'mfu': speed * FLOPS_PER_TOKEN / PEAK,
                'seconds_waiting': 0.02 * chance.random(),
            }
        )
        if step % validate_every == 0:
            held_out = nll + 0.16
            lines.append(
                {
                    'kind': 'validation',
                    **at,
                    'loss': held_out + 0.004,
                    'nll': held_out,
                    'bits_per_byte': held_out / math.log(2) / BYTES_PER_TOKEN,
                    'bytes': sum(len(text.encode()) for text in documents()),
                }
            )
            for prompt, text in samples(step):
                lines.append({'kind': 'sample', 'step': step, 'prompt': prompt, 'text': text})
    return lines


def samples(step):
    source = inspect.getsource(textwrap.TextWrapper)
    return [
        ('def ', source[source.index('def ') + 4 :][: 60 + step // 2]),
        ('import os\n', f'import step_{step}\n' + inspect.getsource(textwrap.dedent)[:400]),
        ('<b>滾滾', HOSTILE),
    ]


def write(path, *, facts=None, lines=None, baselines=True, tail=''):
    """A run directory. `tail` is what a kill left at the end of metrics.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    (path / 'run.json').write_text(json.dumps(facts or globals()['facts']()), 'utf-8')
    text = ''.join(
        json.dumps(line, ensure_ascii=False) + '\n'
        for line in (metrics() if lines is None else lines)
    )
    (path / 'metrics.jsonl').write_text(text + tail, 'utf-8')
    if baselines:
        told = {'split': 'validation', **compress(documents())}
        (path / 'baselines.json').write_text(json.dumps(told), 'utf-8')
    return path
