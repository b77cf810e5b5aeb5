"""Ticks, numbers and curves, of which charts are made."""

import re

import pytest

from llama_jax.report.chart import (
    Axis,
    Curve,
    _range_y,
    chart,
    log_ticks,
    running_median,
    thin,
    ticks,
)
from llama_jax.report.text import compact, duration, significant, tick_labels


@pytest.mark.parametrize(
    ('low', 'high', 'wanted'),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.9, 7.7, [2, 3, 4, 5, 6, 7]),
        (0, 0.003, [0, 0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (999_999.5, 1_000_000.5, [999_999.6, 999_999.8, 1_000_000, 1_000_000.2, 1_000_000.4]),
    ],
)
def test_ticks(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted, rel=1e-12)


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(5e12, 4e13) == pytest.approx([5e12, 1e13, 2e13])
    assert log_ticks(1e12, 1e16) == pytest.approx([1e12, 1e13, 1e14, 1e15, 1e16])
    assert len(log_ticks(1, 1e20)) <= 5
    assert log_ticks(6.1e12, 6.2e12) == [6.1e12, 6.2e12]


def test_numbers_as_people_write_them():
    assert [significant(x) for x in (0, 2.513, 0.003, 41_321, 7e-6, 9.996)] == [
        *('0', '2.51', '0.00300', '41,300', '7.00e-6', '10.0'),
    ]
    assert [compact(x) for x in (0, 813, 999.9, 4_213_760, 999_999, 70e9)] == [
        *('0', '813', '1.00k', '4.21M', '1.00M', '70.0B'),
    ]
    assert [duration(x) for x in (8.06, 59.96, 247, 3840, 200_000)] == [
        *('8.1 s', '60.0 s', '4 min 07 s', '1 h 04 min', '2 d 7 h'),
    ]
    assert tick_labels([0, 500_000, 1_000_000]) == ['0', '0.5M', '1.0M']
    assert tick_labels([0, 0.001, 0.002]) == ['0', '0.001', '0.002']
    assert tick_labels([0, 1e-5, 2e-5]) == ['0', '1e-5', '2e-5']


@pytest.mark.parametrize(
    ('ys', 'include', 'wanted'),
    [
        ([2, 4], [], (2 - 0.12, 4 + 0.12, 0)),
        ([0, 4, 4], [], (0, 4 + 0.24, 0)),  # a curve may lie on the frame at 0
        ([2, 4], [6], (2 - 0.24, 6 + 0.24, 0)),
        ([5, 5], [], (4.5 - 0.06, 5.5 + 0.06, 0)),  # a flat one in the middle
        ([0], [], (-0.1 - 0.012, 0.1 + 0.012, 0)),
        (
            [2, *[1] * 98, 9],
            [],
            (1 - 0.06, 2 + 0.06, 1),
        ),  # the spike does not count, the beginning does
        ([2, None, 3.9], [], (2 - 0.114, 3.9 + 0.114, 0)),
    ],
)
def test_lowest_and_highest_of_a_frame(ys, include, wanted):
    curve = Curve('', [(float(x), y) for x, y in enumerate(ys)], 'trend')
    assert _range_y([curve], include) == pytest.approx(wanted)


def test_thinning_keeps_the_extremes():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[77] = (77.0, -99.0)
    points[5000:5100] = [(x, None) for x, _ in points[5000:5100]]
    kept = thin(points, lambda x: x / 10_000)
    assert len(kept) <= 800 and kept == sorted(kept, key=lambda p: p[0])
    assert {(4321.0, 99.0), (77.0, -99.0)} <= set(kept)
    assert any(y is None for _, y in kept)


def test_running_median():
    line = [(float(i), 2.0 * i) for i in range(9)]
    smooth = running_median(line, 3)
    assert smooth[:6] == line[:6]  # as many before as after: a straight line stays
    assert smooth[8] == (8.0, 13.0)  # of 10, 12, 14, 16
    spike = [*line[:4], (4.0, 1e9), *line[5:]]
    assert running_median(spike, 3)[4] == (4.0, 10.0)
    holed = [(0.0, 1.0), (1.0, None), (2.0, 5.0), (3.0, 7.0), (4.0, 0.0)]
    assert running_median(holed, 2)[:3] == [(0.0, 1.0), (1.0, None), (2.0, 3.0)]
    long = running_median([(float(i), 1.0) for i in range(9999)], 100)
    assert len(long) <= 602 and long[-1] == (9998.0, 1.0)


def test_a_point_between_others_that_are_not_finite_is_seen():
    points = [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, None), (4.0, 2.0)]
    figure = chart('t', 'u', Axis('x'), [Curve('', points, 'trend')])
    assert re.search(r'<path class="trend" d="(.*?)"', figure)[1].count('h0') == 3
