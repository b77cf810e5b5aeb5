"""What a comparison may say of its arms: differences with corrected intervals, and what is bold."""

from __future__ import annotations

import itertools

from llama_jax.evaluate import paired
from llama_jax.evaluate.metrics import METRICS
from llama_jax.evaluate.paired import Difference, Sample
from llama_jax.report.grid import EXACT, ArmRecords, GridRecords


class Judged:
    """Judgements of a grid, each made once."""

    def __init__(self, grid: GridRecords):
        self.grid = grid
        self._samples: dict[str, dict[str, Sample]] = {}
        self._bold: dict[str, set[str]] = {}
        self._differences: dict[str, dict[str, Difference]] = {}
        self._noise: dict[str, Difference | None] = {}

    @property
    def base(self) -> ArmRecords | None:
        """The arm that the others are compared with: the first."""
        return self.grid.arms[0] if self.grid.arms else None

    def samples(self, metric: str) -> dict[str, Sample]:
        """The metric of every arm that has it."""
        if metric not in self._samples:
            found = {arm.name: arm.sample(metric) for arm in self.grid.arms}
            self._samples[metric] = {name: x for name, x in found.items() if x.values}
        return self._samples[metric]

    def differences(self, metric: str) -> dict[str, Difference]:
        """Every other arm less the base, where both have the metric and of one kind; corrected over
        the arms."""
        if metric not in self._differences:
            self._differences[metric] = self._to_base(metric)
        return self._differences[metric]

    def bold(self, metric: str) -> set[str]:
        """The arms that no arm is shown to be better than, and that are shown to be better than
        some: by intervals corrected over all pairs of arms. None where nothing is shown, and of
        what ranks nothing. What is no exact value is judged only where there is no exact one."""
        if metric not in self._bold:
            self._bold[metric] = self._best(metric) if METRICS[metric].task else set()
        return self._bold[metric]

    def noise(self, metric: str) -> Difference | None:
        """The base arm under other seeds less itself; None where there is no such arm."""
        if metric not in self._noise:
            base = self.base
            sample = self.samples(metric).get(base.name) if base else None
            again = base.sample_again(metric) if base else None
            self._noise[metric] = paired.noise(sample, again) if sample and again else None
        return self._noise[metric]

    def _of_kind(self, metric: str, kind: str) -> dict[str, Sample]:
        arms = {arm.name: arm for arm in self.grid.arms}
        found = self.samples(metric)
        return {name: x for name, x in found.items() if arms[name].kind(metric) == kind}

    def comparable(self, metric: str) -> dict[str, Sample]:
        """The metric of the base and of every arm that has it of one kind."""
        return self._of_kind(metric, self.base.kind(metric)) if self.base else {}

    def _to_base(self, metric: str) -> dict[str, Difference]:
        base, samples = self.base, self.comparable(metric)
        if base is None or base.name not in samples:
            return {}
        pairs = [(name, base.name) for name in samples if name != base.name]
        return {pair[0]: x for pair, x in paired.differences(samples, pairs).items()}

    def _best(self, metric: str) -> set[str]:
        names = self.samples(metric)
        kinds = dict.fromkeys(a.kind(metric) for a in self.grid.arms if a.name in names)
        if EXACT not in kinds and len(kinds) != 1:
            return set()
        samples = self._of_kind(metric, EXACT if EXACT in kinds else next(iter(kinds)))
        sign = METRICS[metric].sign
        better, worse = set(), set()
        pairs = itertools.combinations(samples, 2)
        for (one, other), found in paired.differences(samples, pairs).items():
            if found.shown:
                won, lost = (one, other) if sign * found.value > 0 else (other, one)
                better.add(won)
                worse.add(lost)
        return better - worse
