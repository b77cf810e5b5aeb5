"""Tuned runs beside what needs no model, on the test records of `benchmarks.sets`.

python -m benchmarks.tuned labels --train train.jsonl --test test.jsonl --run runs/topics
python -m benchmarks.tuned pairs --test test.jsonl --limit 200 --run runs/decoder runs/both

labels: accuracy of naive Bayes on word counts, of logistic regression on TF-IDF (of characters, one
to three, where a script puts no spaces between words), and of runs of Classification. pairs: ROUGE
and chrF of copying the function's name, or the source where there is none, and of what runs of
SequenceToSequence write, greedily. Every figure with its 95% interval over the records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments import cli
from llama_jax import mesh as meshes
from llama_jax.data.record import Pair
from llama_jax.errors import UserError
from llama_jax.evaluate import stats, written
from llama_jax.evaluate.classifier import classified
from llama_jax.generate.generator import Generator
from llama_jax.mesh import MeshConfig
from llama_jax.text import template_files
from llama_jax.text.chat import end_ids
from llama_jax.train import restore
from llama_jax.train.sample import asked_of

Row = dict[str, Any]
_ROWS = 16
"""Prompts that are continued at a time."""


@dataclass(frozen=True)
class Options:
    what: Annotated[Literal['labels', 'pairs'], tyro.conf.Positional]
    test: Path
    """JSON lines with text and label, or source, target and name."""
    train: Path | None = None
    """The training records, for labels."""
    run: tuple[str, ...] = ()
    """Runs: RUN, RUN@STEP or RUN@best."""
    limit: int = 0
    """The first so many test records. 0: all."""
    max_tokens: int = 48
    """Of a target that is written."""


def labels(options: Options) -> None:
    if options.train is None:
        raise UserError('labels are learnt from --train: name the file')
    train, test = _rows(options.train, 0), _rows(options.test, options.limit)
    answers = [row['label'] for row in test]
    for name, model in _baselines(train).items():
        model.fit([row['text'] for row in train], [row['label'] for row in train])
        _tell(name, {'accuracy': model.predict([row['text'] for row in test]) == answers})
    mesh = meshes.make(MeshConfig())
    for run in options.run:
        trained = restore.load(run, mesh, what='--run')
        found = classified(trained, [row['text'] for row in test], mesh).best
        _tell(run, {'accuracy': np.array(found) == np.array(answers)})


def pairs(options: Options) -> None:
    written.check()
    rows = _rows(options.test, options.limit)
    if all('name' in row for row in rows):
        copied, label = [row['name'].replace('_', ' ').strip() for row in rows], 'the name'
    else:
        copied, label = [row['source'] for row in rows], 'the source'
    _tell(label, _scores(copied, rows))
    for run in options.run:
        _tell(run, _scores(_written(run, rows, options.max_tokens), rows))


def _written(run: str, rows: Sequence[Row], max_tokens: int) -> list[str]:
    """What a run writes for each source."""
    mesh = meshes.make(MeshConfig())
    trained = restore.load(run, mesh, what='--run')
    tokenizer, config = trained.tokenizer, trained.config
    chat = template_files.kept(restore.named(run, '--run').workdir)
    reads = config.encoder_layers > 0
    generator = Generator(
        config,
        trained.params,
        mesh=mesh,
        compute=trained.experiment.compute,
        eos_ids=end_ids(chat, tokenizer),
        pad_id=tokenizer.pad_id,
    )
    asked = [
        asked_of(
            trained.experiment.objective.encoded(
                Pair(row['source'], row['target']), vocabulary=tokenizer, chat=chat
            ),
            tokenizer,
            reads=reads,
        )
        for row in rows
    ]
    # As much as the context has room for; nothing where a source fills it.
    room = [min(max_tokens, config.context - len(one.tokens)) for one in asked]
    found = [''] * len(asked)
    fits = [i for i, n in enumerate(room) if n > 0]
    if len(fits) < len(asked):
        print(f'{run}: {len(asked) - len(fits)} sources fill the context: nothing is written')
    for begin in range(0, len(fits), _ROWS):
        some = fits[begin : begin + _ROWS]
        completions = generator(
            [asked[i].tokens for i in some],
            sources=[asked[i].source or [] for i in some] if reads else None,
            max_tokens=[room[i] for i in some],
        )
        for i, completion in zip(some, completions, strict=True):
            found[i] = tokenizer.decode(completion.tokens).strip()
    return found


def _scores(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    each = [written.scores(t, [row['target']]) for t, row in zip(texts, rows, strict=True)]
    return {name: np.array([one[name] for one in each]) for name in ('rouge1', 'rougeL', 'chrf')}


def _baselines(train: Sequence[Row]) -> dict[str, Any]:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    text = ''.join(row['text'] for row in train[:200])
    spaced = text.count(' ') > len(text) / 20
    words: dict[str, Any] = {} if spaced else {'analyzer': 'char', 'ngram_range': (1, 3)}
    return {
        'naive Bayes': make_pipeline(CountVectorizer(**words), MultinomialNB()),
        'TF-IDF and logistic regression': make_pipeline(
            TfidfVectorizer(sublinear_tf=True, **words), LogisticRegression(C=10, max_iter=1000)
        ),
    }


def _rows(path: Path, limit: int) -> list[Row]:
    lines = path.read_text('utf-8').split('\n')
    rows = [json.loads(line) for line in lines if line.strip()]
    return rows[:limit] if limit else rows


def _tell(name: str, scores: dict[str, np.ndarray]) -> None:
    for metric, values in scores.items():
        found = stats.of_mean(values.astype(float))
        shown = '{value:.4f} [{low:.4f}, {high:.4f}], n = {n}'.format(**found)
        print(f'{name:<32}{metric:<10}{shown}', flush=True)


def main() -> None:
    options = cli.options(Options, 'benchmarks.tuned', __doc__)
    {'labels': labels, 'pairs': pairs}[options.what](options)


if __name__ == '__main__':
    cli.main(main)
