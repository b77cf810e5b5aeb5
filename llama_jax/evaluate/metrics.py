"""The metrics that arms of a comparison are measured by: one table, in the order of reports."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    label: str
    unit: str
    """'' for a plain number; 'share' is a number in [0, 1]."""
    higher_is_better: bool
    headline: bool
    """Common to all arms, whatever their objective: no arm is n/a."""
    task: str = ''
    """What it measures; each task has one vote when arms are ranked. '' ranks nothing."""


METRICS: dict[str, Metric] = {
    'probe_accuracy': Metric('linear probe, best layer', 'share', True, True, 'topics, frozen'),
    'finetune_accuracy': Metric(
        'fine-tuned classification', 'share', True, True, 'topics, fine-tuned'
    ),
    'recall_doc_1': Metric('docstring to body, recall@1', 'share', True, True, 'docstrings'),
    'recall_doc_5': Metric('docstring to body, recall@5', 'share', True, True, 'docstrings'),
    'recall_doc_10': Metric('docstring to body, recall@10', 'share', True, True, 'docstrings'),
    'recall_span_1': Metric('span to span, recall@1', 'share', True, True, 'spans'),
    'recall_span_5': Metric('span to span, recall@5', 'share', True, True, 'spans'),
    'recall_span_10': Metric('span to span, recall@10', 'share', True, True, 'spans'),
    'alignment': Metric('alignment', '', False, True),
    'uniformity': Metric('uniformity', '', False, True),
    'bits_per_byte': Metric('likelihood', 'bits per byte', False, False, 'likelihood'),
    'suffix_bits_per_byte': Metric(
        'suffix given the first half', 'bits per byte', False, False, 'suffix'
    ),
    'middle_bits_per_byte': Metric('middle span', 'bits per byte', False, False, 'middle'),
    'middle_pseudo_bits_per_byte': Metric(
        'middle span, pseudo-likelihood', 'bits per byte', False, False, 'pseudo-likelihood'
    ),
    'infill_exact': Metric('infill, exact match', 'share', True, False, 'infill'),
}
"""Name in evaluation.json to what it is."""

CURVES = ('recall_span_1', 'alignment', 'uniformity')
"""Those that `light` measures during training."""
