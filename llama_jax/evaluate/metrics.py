"""The metrics that arms of a comparison are measured by: one table, in the order of reports."""

from __future__ import annotations

from typing import NamedTuple

from llama_jax.data.synthetic import TASKS


class Metric(NamedTuple):
    label: str
    unit: str
    """'' for a plain number; 'share' is a number in [0, 1]."""
    higher_is_better: bool
    headline: bool
    """Common to all arms, whatever their objective: no arm is n/a."""
    task: str = ''
    """What it measures; each task has one vote when arms are ranked. '' ranks nothing."""
    needs: tuple[str, ...] = ()
    """Texts that not every corpus has: names of `Texts.absent`."""

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.higher_is_better else -1


def _share(label: str, task: str, *needs: str, headline: bool = True) -> Metric:
    return Metric(label, 'share', True, headline, task, needs)


def _bits(label: str, task: str) -> Metric:
    return Metric(label, 'bits per byte', False, False, task, ('windows',))


TASK = 'task_'
"""In front of the name of a task of data/synthetic; they are there where a suite names them."""

METRICS: dict[str, Metric] = {
    'probe_accuracy': _share('order of tokens, linear probe', 'order, frozen', 'order'),
    'finetune_accuracy': _share('order of tokens, fine-tuned', 'order, fine-tuned', 'order'),
    'topics_accuracy': _share('topics, linear probe', 'topics', 'topics', headline=False),
    'topics_embedding_accuracy': _share(
        'topics, linear probe of the embedding', '', 'topics', headline=False
    ),
    **{
        f'recall_{kind}{white}_{k}': _share(
            f'{label}, {"whitened, " if white else ""}recall@{k}', task, *needs
        )
        for kind, label, task, of in (
            ('doc', 'docstring to body', 'docstrings', ('pairs',)),
            ('span', 'span to span', 'spans', ('spans',)),
        )
        for white, needs in (('', of), ('_white', (*of, 'whitening')))
        for k in (1, 5, 10)
    },
    'alignment': Metric('alignment', '', False, True, needs=('spans',)),
    'uniformity': Metric('uniformity', '', False, True, needs=('spans',)),
    'effective_rank': Metric('effective rank', '', True, True, needs=('spans',)),
    'bits_per_byte': _bits('likelihood', 'likelihood'),
    'suffix_bits_per_byte': _bits('suffix given the first half', 'suffix'),
    'suffix_ordinary_bits_per_byte': _bits(
        'suffix given the first half, ordinary tokens alone', 'suffix'
    ),
    'middle_bits_per_byte': _bits('middle span', 'middle'),
    'middle_ordinary_bits_per_byte': _bits('middle span, ordinary tokens alone', 'middle'),
    'middle_pseudo_bits_per_byte': _bits('middle span, pseudo-likelihood', 'pseudo-likelihood'),
    'middle_pseudo_ordinary_bits_per_byte': _bits(
        'middle span, pseudo-likelihood, ordinary tokens alone', 'pseudo-likelihood'
    ),
    'calibration_error': Metric(
        'calibration error of the suffix', 'share', False, False, needs=('windows',)
    ),
    'infill_exact': _share('infill, exact match', 'infill', 'windows', 'infills', headline=False),
    **{f'{TASK}{name}': _share(name.replace('_', ' '), name, headline=False) for name in TASKS},
}
"""Name in evaluation.json to what it is."""

CURVES = ('recall_span_1', 'alignment', 'uniformity')
"""Those that `light` measures during training."""
