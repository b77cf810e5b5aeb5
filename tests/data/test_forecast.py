"""How long an epoch is, and what a run will read, against plans that are walked to the end."""

import numpy as np
import pytest

from llama_jax.data import forecast
from tests.data.lengths import Lengths, planned, rows
from tests.data.objective import Causal, Noisy, Streams

LENGTHS = np.clip(np.random.default_rng(0).lognormal(4, 1.2, 300).astype(int), 1, None)
MAKERS = (Causal(), Noisy(), Streams())


def walked(plan, n):
    """Units and documents of each source in the first n rows."""
    return np.array(rows(plan, n)[-1][1].read)


@pytest.mark.slow
@pytest.mark.parametrize('sample', [100, 16_384])
@pytest.mark.parametrize('maker', MAKERS, ids=lambda maker: type(maker).__name__)
@pytest.mark.parametrize('epochs', [0.05, 1.7])
def test_rows_for_some_epochs_read_the_text_so_often(maker, epochs, sample, monkeypatch):
    """Counted, and extrapolated from a part of an epoch."""
    monkeypatch.setattr(forecast, 'SAMPLE', sample)
    plan = planned([Lengths(LENGTHS)], maker)
    wanted = epochs * (LENGTHS.sum() + maker.ends * len(LENGTHS))
    n = round(forecast.rows_for(plan, wanted))
    ((read, _),) = walked(plan, n)
    one_row = read / n
    # The mean of 100 rows is off by some percent; that of the 16,384 of a run by a tenth of it.
    tolerance = one_row + (0.05 * wanted if n > sample else 0)
    assert read == pytest.approx(wanted, abs=tolerance)


def test_several_sources_are_read_in_their_shares():
    sources = [Lengths(LENGTHS[:100]), Lengths(LENGTHS[100:])]
    plan = planned(sources, Causal(), weights=[3.0, 1.0])
    wanted = sum(source.units for source in sources)
    read = walked(plan, round(forecast.rows_for(plan, wanted)))[:, 0]
    assert read.sum() == pytest.approx(wanted, abs=64)
    assert read[0] / read.sum() == pytest.approx(0.75, abs=0.02)


def test_what_rows_will_read(monkeypatch):
    plan = planned([Lengths(LENGTHS), Lengths(LENGTHS[:20])], Causal(), weights=[2.0, 1.0])
    exact = walked(plan, 150)
    assert forecast.reading(plan, 150) == tuple(map(tuple, exact.tolist()))
    monkeypatch.setattr(forecast, 'SAMPLE', 60)
    units = np.array(forecast.reading(plan, 150))[:, 0]
    np.testing.assert_allclose(units, exact[:, 0], rtol=0.1)
