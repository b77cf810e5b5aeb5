"""A comparison as it leaves its records: 5 arms and 2 seeds, with curves of arms that learn."""

import json
import math
import random

from llama_jax.evaluate.metrics import METRICS, TASK
from llama_jax.report import comparison, scores
from llama_jax.report.grid import read_grid
from llama_jax.report.judged import Judged
from tests.report import run

THREE = ('causal', 'masked', 'contrastive')

STEPS = 400
TOKENS_PER_STEP = 4096

# arm: objective, FLOPs per token, own loss from and to, metrics at the end.
ARMS = {
    'causal': (
        {'class': 'CausalLM', 'z_loss': 0.0001},
        *(27.3e6, (7.6, 2.1)),
        dict(probe=0.61, finetune=0.70, doc=0.21, span=0.24, alignment=0.62, uniformity=-1.4)
        | dict(bits=1.02, suffix=0.98, middle=1.05),
    ),
    'spans': (
        {'class': 'SpanCorruption', 'density': 0.15, 'mean_span': 3.0, 'encoder': False},
        *(27.3e6, (7.2, 2.6)),
        dict(probe=0.66, finetune=0.72, doc=0.26, span=0.29, alignment=0.55, uniformity=-1.7)
        | dict(suffix=1.21, middle=0.97, infill=0.083),
    ),
    'masked': (
        {'class': 'MaskedLM', 'rate': 0.15, 'read_previous': False},
        *(26.1e6, (7.5, 2.9)),
        dict(probe=0.655, finetune=0.735, doc=0.24, span=0.31, alignment=0.58, uniformity=-1.9)
        | dict(pseudo=0.99, infill=0.061),
    ),
    'contrastive': (
        {'class': 'InfoNCE', 'views': 'spans', 'temperature': 0.05, 'learned': False},
        *(25.9e6, (3.4, 0.7)),
        dict(probe=0.64, finetune=0.66, doc=0.43, span=0.71, alignment=0.31, uniformity=-3.1),
    ),
    'causal+contrastive': (
        {
            'class': 'Weighted',
            'parts': [
                {'class': 'CausalLM', 'z_loss': 0.0001},
                {'class': 'InfoNCE', 'views': 'spans', 'temperature': 0.05, 'learned': False},
            ],
            'weights': [1.0, 0.1],
        },
        *(27.0e6, (8.0, 2.4)),
        dict(probe=0.672, finetune=0.715, doc=0.39, span=0.64, alignment=0.36, uniformity=-2.8)
        | dict(bits=1.06, suffix=1.01, middle=1.09),
    ),
}
LAYERS = 4


def noise(*keys, size=1.0):
    return random.Random(repr(keys)).gauss(0, size)


def metrics(arm, seed):
    """The metrics of evaluation.json."""
    end = ARMS[arm][-1]
    recalls = {
        f'recall_{kind}_{k}': min(1.0, end[kind.partition('_')[0]] * factor)
        for kind in ('doc', 'span', 'doc_white', 'span_white')
        for k, factor in ((1, 1.0), (5, 1.3), (10, 1.4))
    }
    values = {
        'probe_accuracy': end['probe'],
        'finetune_accuracy': end['finetune'],
        'topics_accuracy': end['probe'] - 0.1,
        'topics_embedding_accuracy': end['probe'] - 0.05,
        **recalls,
        'alignment': end['alignment'],
        'uniformity': end['uniformity'],
        'effective_rank': 50 + end['alignment'],
        'bits_per_byte': end.get('bits'),
        **{
            f'{name}{of}_bits_per_byte': end.get(name.removeprefix('middle_'))
            for name in ('suffix', 'middle', 'middle_pseudo')
            for of in ('', '_ordinary')
        },
        'calibration_error': None if 'suffix' not in end else 0.02,
        'infill_exact': end.get('infill'),
    }
    assert values.keys() == {name for name in METRICS if not name.startswith(TASK)}
    return {name: metric(value, arm, seed, name) for name, value in values.items()}


def metric(value, *keys):
    if value is None:
        return {'value': None, 'low': None, 'high': None, 'n': 0}
    value += noise(*keys, size=0.008 * max(abs(value), 0.5))
    return {'value': value, 'low': value - 0.02, 'high': value + 0.02, 'n': 500}


def evaluation(arm, seed, **changes):
    values = {**metrics(arm, seed), **changes}
    best = values['probe_accuracy']['value']
    probe = [best - 0.05 * abs(i - 3) + noise(arm, seed, i, size=0.005) for i in range(LAYERS + 1)]
    return {
        'metrics': values,
        'layers': {'probe': probe},
        'seconds': 31.5 + seed,
        'suite': {'queries': 500},
    }


def lines(arm, seed, *, steps=STEPS, light_every=50):
    """metrics.jsonl, with the lines of the light evaluation."""
    _, flops, (first, final), end = ARMS[arm]
    found = []
    for step in range(10, steps + 1, 10):
        done = step / STEPS
        loss = final + (first - final) * math.exp(-5 * done)
        at = {
            'step': step,
            'tokens': step * TOKENS_PER_STEP,
            'flops': step * TOKENS_PER_STEP * flops,
        }
        seconds = step * 0.3 * flops / 27e6
        noisy = {'loss': loss + noise(arm, seed, step, size=0.05), 'seconds': seconds}
        told = {'tokens_per_second': TOKENS_PER_STEP / 0.3 * 27e6 / flops, 'mfu': 0.4}
        found.append({'kind': 'train', **at, **noisy, **told, 'seconds_waiting': 0.0})
        if step % light_every == 0:
            grown = 1 - math.exp(-4 * done)
            values = {
                'recall_span_1': 0.05 + (end['span'] - 0.05) * grown,
                'alignment': 0.8 + (end['alignment'] - 0.8) * grown,
                'uniformity': -0.6 + (end['uniformity'] + 0.6) * grown,
            }
            for name in values:
                values[name] += noise(arm, seed, step, name, size=0.01)
            found.append({'kind': 'light', **at, **values})
        if step % 100 == 0:
            held_out = {'loss': loss + 0.1 + noise(arm, seed, step, 'held', size=0.02)}
            found.append({'kind': 'validation', **at, **held_out})
    return found


def facts(arm, seed, *, rate=3e-3):
    """run.json"""
    experiment = json.loads(json.dumps(run.facts()['experiment']))
    experiment |= {'name': arm, 'objective': ARMS[arm][0], 'seed': seed}
    experiment['train']['steps'] = STEPS
    experiment['optimizer']['schedule']['peak'] = rate
    return run.facts(
        name=arm,
        experiment=experiment,
        digest=f'{abs(hash_of(arm, seed, rate)):064x}',
        parameters=10_231_808,
        command=['experiments/compare.py', 'objectives_small', '--workdir', 'runs/compare'],
    )


def hash_of(*keys):
    return random.Random(repr(keys)).getrandbits(256)


def grid(arms=ARMS, seeds=2, **changes):
    """grid.json"""
    model = run.facts()['experiment']['model']
    entries = [
        {
            'name': x,
            'objective': ARMS[x][0],
            'model': model,
            'digest': f'{hash_of(x):064x}',
            'experiment': facts(x, 0)['experiment'],
        }
        for x in arms
    ]
    total = STEPS * TOKENS_PER_STEP
    return {
        'name': 'objectives_small',
        'title': 'One backbone under five objectives',
        'seeds': seeds,
        'arms': entries,
        'held_fixed': {
            'tokenizer': f'{hash_of("tokenizer"):064x}',
            'document order': f'{hash_of("order"):064x}',
            'initial weights': f'{hash_of("weights"):064x}',
            'schedule': 'cosine, peak 0.003, 40 warmup steps',
            'precision': 'float32',
            'tokens per batch': TOKENS_PER_STEP,
        },
        'may_differ': ['objective', 'name'],
        'budget': [
            {
                'arm': x,
                'tokens': total,
                'loss_tokens': int(total * share),
                'unique_tokens': 913_402,
                'text_seen': 1_500_000,
                'padding': 0.0123,
                'cut': 0.5,
                'parameters': 10_231_808,
                'flops': total * ARMS[x][1],
            }
            for x, share in zip(arms, (1.0, 0.2, 0.15, 0.004, 0.9), strict=False)
        ],
        'command': 'python -m experiments.compare objectives_small --workdir runs/compare',
        'versions': {'python': '3.11.13', 'jax': '0.10.2', 'scikit-learn': '1.9.0'},
        'device': 'cpu',
        'started': '2025-11-24T20:14:02+00:00',
        **changes,
    }


def write_run(path, arm, seed, *, rate=3e-3, told=None, evaluated=True, steps=STEPS):
    made = lines(arm, seed, steps=steps)
    run.write(path, facts=facts(arm, seed, rate=rate), lines=made, baselines=False)
    if evaluated:
        (path / 'evaluation.json').write_text(json.dumps(told or evaluation(arm, seed)), 'utf-8')


def write(workdir, *, arms=ARMS, seeds=2, rates=(), **changes):
    """A whole comparison. `rates` are those of a sweep, of seed 0."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'grid.json').write_text(json.dumps(grid(arms, seeds, **changes)), 'utf-8')
    for arm in arms:
        for seed in range(seeds):
            write_run(workdir / arm / f'seed-{seed}', arm, seed)
        for rate in rates:
            path = workdir / arm / f'lr-{rate:g}' / 'seed-0'
            write_run(path, arm, 0, rate=rate, evaluated=False)
            bend(path, rate)
    return workdir


def bend(path, rate):
    """Make the losses of a run depend on its learning rate."""
    text = (path / 'metrics.jsonl').read_text('utf-8')
    made = [json.loads(x) for x in text.split('\n') if x]
    for line in made:
        if 'loss' in line:
            line['loss'] += 0.3 * math.log10(rate / 2.5e-3) ** 2
        if 'recall_span_1' in line:
            line['recall_span_1'] -= 0.05 * math.log10(rate / 3.5e-3) ** 2
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in made), 'utf-8')


def page(workdir):
    found = judged(workdir)
    return comparison.page(found.grid, comparison.content(found))


def told(workdir):
    found = judged(workdir)
    return comparison.text(found.grid, comparison.content(found))


def cells(table, arm):
    """The cells of a row by column."""
    row = next(row for row in table.rows if row.name == arm)
    return dict(zip(table.head[1:], row.cells, strict=True))


def column(table, start):
    """Texts, and which of them are bold, of the column whose head starts so."""
    (at,) = [i for i, head in enumerate(table.head[1:]) if head.startswith(start)]
    found = [row.cells[at] for row in table.rows]
    return [cell.text for cell in found], [cell.best for cell in found]


def set_metric(workdir, arm, name, values, kind='exact', **more):
    """One value per seed into evaluation.json."""
    for seed, value in enumerate(values):
        path = workdir / arm / f'seed-{seed}' / 'evaluation.json'
        made = json.loads(path.read_text('utf-8'))
        told = {'value': value, 'low': 0.1, 'high': 0.9, 'n': 500, **more}
        made['metrics'][name] = told if kind == 'exact' else {**told, 'kind': kind}
        path.write_text(json.dumps(made), 'utf-8')


def judged(workdir):
    return Judged(read_grid(workdir))


def table_of(workdir):
    return scores.scores(judged(workdir), scores.HEADLINE)
