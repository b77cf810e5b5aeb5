"""Measure a trained model: `python -m experiments.evaluate runs/NAME`, or weights of others:
`python -m experiments.evaluate --from smollm2 --text 'books/*.txt'`.

Prints every metric with its 95% interval and writes evaluation.json into the directory, or to
--output. What each of them is, and which do not apply to which objective: docs/evaluation.md.
runs/NAME@400 is the checkpoint of step 400, of which evaluation-400.json will tell, and
runs/NAME@best the best.

The texts are of what the run was trained on, held out (--suite.text own). With --text
'books/*.txt', or --own for what it validates on, they are others, each set with a result of its
own, evaluation-on-SET.json; what needs labels that a set does not name is n/a. With --from
the likelihood of whole texts is measured too, and is all there is where the texts are short.

With --tasks the model is asked other things: multiple choice, what it writes, whole texts,
retrieval, with shots in front; `--from smollm2 --tasks bbc_topics --shots 4`, or a file of your
own. --against OTHER asks a second model the same. --lm-eval DIRECTORY runs lm-eval's tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import cli
from llama_jax import mesh as meshes
from llama_jax.data import mix
from llama_jax.data.config import Source, labels
from llama_jax.data.overlap import warn_of_overlap
from llama_jax.data.sources import open_sources
from llama_jax.errors import UserError
from llama_jax.evaluate import per_text, whole
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.own import TooLittleError, evaluate_own
from llama_jax.evaluate.suite import Evaluation, Suite, evaluate_trained
from llama_jax.mesh import MeshConfig
from llama_jax.model.config import Compute
from llama_jax.train.records import read_run, write_atomically
from llama_jax.train.restore import Mean, load, named


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str | None] = None
    """The --workdir of a training, RUN, or RUN@STEP, RUN@best or RUN@mean:N."""
    origin: Annotated[str | None, tyro.conf.arg(name='from')] = None
    """Instead of RUN: a run all the same, or smollm2, a .gguf file, or the directory of a model."""
    output: Path | None = None
    """File for the result; default: evaluation.json in the directory, or evaluation-STEP.json; of
    one's own text evaluation-on-SET.json. Of weights of others: none."""
    text: tuple[str, ...] = ()
    """Text of one's own instead, each as one set: files, globs, directories or data sets, such as
    'books/*.txt' or zh='sanguo/*.txt', which gives the set a name."""
    own: bool = False
    """The run's own validation sets instead."""
    suite: Suite = field(default_factory=Suite)
    tasks: tuple[str, ...] = ()
    """Tasks instead: .toml or .jsonl files, or bbc_topics, zh_sentiment, python_names, sums,
    python_prose, docstrings, or one that is made here, such as star_graph, induction, reversal,
    minimal_pairs_zh: docs/tasks.md."""
    against: str | None = None
    """A second model, as --from names one, that is asked the same."""
    shots: int | None = None
    """Examples in front of each item, instead of what the task says."""
    shot_seeds: int | None = None
    """So many draws of them."""
    limit: int | None = None
    """The first so many items of a task alone."""
    truncate: bool = False
    """Leave out the beginning of what is longer than the context, and count it."""
    seed: int = 0
    """Of the shots, and of the intervals of tasks."""
    lm_eval: str | None = None
    """A directory of YAML tasks of lm-eval, or local: its suite made of installed packages."""
    compute: Compute = field(default_factory=Compute)
    """Of tasks."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


_OF_TASKS = ('against', 'shots', 'shot_seeds', 'limit', 'truncate', 'seed', 'compute')
_OF_LM_EVAL = ('shots', 'limit', 'seed', 'compute')


def main() -> None:
    options = cli.options(Options, 'evaluate', __doc__)
    if options.tasks or options.lm_eval is not None:
        return ask_tasks(options)
    for name in _OF_TASKS:
        if getattr(options, name) != getattr(Options(), name):
            raise UserError(f'--{name.replace("_", "-")} is of --tasks: name some')
    if options.text and options.own:
        raise UserError('--text and --own are two choices of text: give one of the two')
    own = bool(options.text) or options.own
    sets = mix.named_sets(options.text, '--text')
    if options.output and len(sets) > 1:
        raise UserError('--output is one file, and --text names several sets: leave one out')
    if (options.run is None) == (options.origin is None):
        raise UserError('give either RUN or --from NAME, which are two ways to name a model')
    if options.origin is not None:
        return of_origin(options.origin, sets, options)
    assert options.run is not None
    workdir, step = named(options.run, 'RUN')
    path = options.output or workdir / 'evaluation.json'
    of_comparison = any((up / 'grid.json').exists() for up in path.parents[1:4])
    if not own and options.output is None and of_comparison:
        raise UserError(
            f'{workdir} is a run of a comparison, which takes it for finished once it '
            'has an evaluation.json: give --output FILE'
        )
    _check(options.output)
    mesh = meshes.make(options.mesh)
    trained = load(options.run, mesh, what='RUN')
    if options.output is None and step is not None:
        which = f'mean-{step.n}' if isinstance(step, Mean) else trained.step
        path = workdir / f'evaluation-{which}.json'
    if not own:
        tell(evaluate_trained(trained, trained.experiment, options.suite, mesh), path)
        return
    data = trained.experiment.data
    data = dataclasses.replace(data, validation=sets or data.validation)
    if options.output and len(data.of('validation')) > 1:
        raise UserError(f'--output is one file, and {workdir} has several sets: leave it out')
    warn_of_overlap(data)
    results = evaluate_own(trained, trained.experiment, data, options.suite, mesh)
    for name, evaluation in results.items():
        print(f'{name}: {evaluation.result["text"]["documents"]:,} documents')
        tell(evaluation, options.output or path.with_name(f'{path.stem}-on-{name}.json'))


def ask_tasks(options: Options) -> None:
    """--tasks and --lm-eval."""
    if options.tasks and options.lm_eval is not None:
        raise UserError('--tasks and --lm-eval: give one after the other')
    if (options.run is None) == (options.origin is None):
        raise UserError('give either RUN or --from NAME, which are two ways to name a model')
    used = _OF_TASKS if options.tasks else _OF_LM_EVAL
    for name in ('text', 'own', 'suite', *(name for name in _OF_TASKS if name not in used)):
        if getattr(options, name) != getattr(Options(), name):
            raise UserError(
                f'--{name.replace("_", "-")} has no effect on '
                f'{"--tasks" if options.tasks else "--lm-eval"}: leave it out'
            )
    from experiments import tasks

    asking = tasks.Asking(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(tasks.Asking)}
    )
    output = options.output
    _check(output)
    name, what = (options.run, 'RUN') if options.run is not None else (options.origin, '--from')
    assert name is not None
    asked = tasks.loaded(options.tasks, asking)
    if options.against is not None:
        tasks.check_model(options.against, '--against')
    suite = tasks.lm_eval_tasks(options.lm_eval) if options.lm_eval is not None else None
    workdir = named(name, what).workdir
    if output is None and read_run(workdir) is not None:
        output = workdir / ('tasks.json' if options.tasks else 'lm-eval.json')
    mesh = meshes.make(options.mesh)
    subject = tasks.subject_of(name, mesh, options.compute, what)
    if suite is not None:
        tasks.run_lm_eval(subject, suite, asking, output)
        return
    other = None
    if options.against is not None:
        other = functools.partial(
            tasks.subject_of, options.against, mesh, options.compute, '--against'
        )
    tasks.run(subject, other, asked, asking, output)


def of_origin(name: str, sets: tuple[Source, ...], options: Options) -> None:
    """Measure a run or weights of others, by whichever name."""
    if options.own:
        raise UserError('--own is what a run validates on: give RUN without --from, or --text')
    _check(options.output)
    mesh = meshes.make(options.mesh)
    if read_run(named(name, '--from').workdir) is not None:
        trained = load(name, mesh, what='--from')
        begin: tuple[int, ...] = (trained.tokenizer.bos_id,)
    else:
        trained, begin = whole.of_others(name, mesh, '--from')
    if not sets:
        tell(evaluate_trained(trained, trained.experiment, options.suite, mesh), options.output)
        return
    data = dataclasses.replace(trained.experiment.data, validation=sets)
    every = open_sources(data, 'validation').sources
    for source, label, documents in zip(sets, labels(sets), every, strict=True):
        print(f'{label}: {len(documents):,} documents')
        likelihood = whole.likelihood_of_text(trained, documents, mesh, begin=begin)
        one = dataclasses.replace(data, validation=(source,))
        try:
            (found,) = evaluate_own(trained, trained.experiment, one, options.suite, mesh).values()
        except TooLittleError as error:
            found = Evaluation({'step': trained.step, 'little': str(error)}, {})
        tell(Evaluation({**found.result, 'whole': likelihood}, found.texts), options.output)


def _check(output: Path | None) -> None:
    if output and not output.parent.is_dir():
        raise UserError(f'--output {output}: there is no directory {output.parent}: make it first')


def tell(evaluation: Evaluation, path: Path | None) -> None:
    """Write a result where a path is given, with the parts of each text beside it, and print it."""
    result = evaluation.result
    if path is not None:
        if evaluation.texts:
            per_text.save(path.with_suffix('.npz'), evaluation.texts)
        write_atomically(path, json.dumps(result, indent=1))
    if result.get('whole'):
        print(
            'whole texts: {bits_per_byte:.4f} bits per byte, {nats_per_token:.4f} nats per token '
            '({tokens:,} tokens, {bytes:,} bytes)'.format(**result['whole'])
        )
    if 'little' in result:
        print(f'nothing else is measured: {result["little"]}')
        return
    print('\n'.join(table(result)))
    print(f'step {result["step"]}, {result["seconds"]:.0f} s{f": {path}" if path else ""}')


def table(result: dict[str, Any]) -> Iterator[str]:
    """A line for each metric: name, value, interval, examples."""
    longest = max((len(METRICS[name].label) for name in result['metrics']), default=0)
    for name, found in result['metrics'].items():
        metric = METRICS[name]
        if found['value'] is None:
            shown = f'n/a: {found["why"]}'
        else:
            low, high = found['low'], found['high']
            interval = 'of one document' if low is None else f'[{low:.3f}, {high:.3f}]'
            shown = f'{found["value"]:7.3f}  {interval}  n = {found["n"]}'
            error = f' (s.e. {x:.4f})' if (x := found.get('standard_error')) is not None else ''
            shown += f'  {kind}{error}' if (kind := found.get('kind', 'exact')) != 'exact' else ''
            shown += f'  by {by}' if (by := found.get('by', 'exact')) != 'exact' else ''
        yield f'{metric.label:<{longest + 2}}{metric.unit:<15}{shown}'


if __name__ == '__main__':
    cli.main(main)
