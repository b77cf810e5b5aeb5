"""Ticks, numbers and curves, of which charts are made."""

import re

import pytest

from llama_jax.report import draw
from llama_jax.report.picture import Axis, Curve, Picture, running_median
from llama_jax.report.text import compact, significant, tick_labels
from tests.report.pages import read_off


def picture(ys, **settings):
    points = [(float(x), y) for x, y in enumerate(ys)]
    return Picture('p', 't', 'u', Axis('x'), [Curve('', points, 'trend')], **settings)


def test_numbers_as_people_write_them():
    assert [significant(x) for x in (0, 2.513, 0.003, 41_321, 7e-6, 9.996)] == [
        *('0', '2.51', '0.00300', '41,300', '7.00e-6', '10.0'),
    ]
    assert [compact(x) for x in (0, 813, 999.9, 4_213_760, 999_999, 70e9)] == [
        *('0', '813', '1.00k', '4.21M', '1.00M', '70.0B'),
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
    found = picture(ys, whole=False, include=include).frame_y
    assert found == pytest.approx(wanted)


def test_a_long_curve_is_short_and_keeps_its_extremes():
    ys = [float(i % 7) for i in range(10_000)]
    ys[4321], ys[77] = 99.0, -99.0
    drawn = draw.html(picture(ys))
    seen = [y for _, y in read_off(drawn, 'trend')]
    assert len(seen) < 8000 and len(drawn) < 200_000
    assert max(seen) == pytest.approx(99, abs=0.5) and min(seen) == pytest.approx(-99, abs=0.5)


def test_running_median():
    line = [(float(i), 2.0 * i) for i in range(9)]
    smooth = running_median(line, 3)
    assert smooth[:6] == line[:6]  # as many before as after: a straight line stays
    assert smooth[8] == (8.0, 13.0)  # of 10, 12, 14, 16
    spike = [*line[:4], (4.0, 1e9), *line[5:]]
    assert running_median(spike, 3)[4] == (4.0, 10.0)
    assert running_median(spike[:1], 0) == spike[:1]
    holed = [(0.0, 1.0), (1.0, None), (2.0, 5.0), (3.0, 7.0), (4.0, 0.0)]
    assert running_median(holed, 2)[:3] == [(0.0, 1.0), (1.0, None), (2.0, 3.0)]
    long = running_median([(float(i), 1.0) for i in range(9999)], 100)
    assert len(long) <= 602 and long[-1] == (9998.0, 1.0)


def test_a_point_between_others_that_are_not_finite_is_seen():
    drawn = draw.html(picture([1.0, None, 3.0, None, 2.0, 2.5]))
    group = re.search('<g class="trend">.*?</g></g>', drawn)[0]
    assert group.count('<use ') == 2


def test_labels_of_a_logarithmic_axis_are_round():
    for ends, wanted in (
        ((5e12, 4e13), ['5\u202f×\u202f10¹²', '10¹³', '2\u202f×\u202f10¹³']),
        ((1e-3, 1e-2), ['0.001', '0.002', '0.005', '0.01']),
        ((1e12, 1e16), ['10¹²', '10¹³', '10¹⁴', '10¹⁵', '10¹⁶']),
    ):
        curves = [Curve('', [(x, 1.0) for x in ends], 'trend')]
        drawn = draw.html(Picture('p', 't', 'u', Axis('x', log=True), curves))
        part = drawn.split('<g class="x">')[1].split('<g class="y">')[0]
        assert re.findall('<text[^>]*>(.*?)</text>', part) == wanted


def test_rows_are_named_from_the_top_down():
    curves = [Curve('', [(-1.0, 0.0), (3.0, 0.0)], 'trend'), Curve('', [(2.0, 1.0)], 'raw')]
    shown = Picture('p', 't', 'u', Axis('x', tight=True), curves, rows=['因果', 'b<'], band=0.5)
    drawn = draw.html(shown)
    part = drawn.split('<g class="y">')[1].split('<g class="')[0]
    found = re.findall('<text[^>]* y="([\\d.]+)"[^>]*>(.*?)</text>', part)
    assert [name for _, name in found] == ['因果', 'b&lt;']
    assert float(found[0][0]) < float(found[1][0])
    assert shown.frame_x == pytest.approx((-1.16, 3.16))


@pytest.mark.parametrize(
    'name',
    [
        'Suffix given the first half, ordinary tokens alone',
        '因果' * 12,
        'bits per byte of whole texts, ' + '因果' * 6,
    ],
)
def test_long_names_of_rows_stand_within_the_picture(name):
    curves = [Curve('', [(1.9, 0.0), (2.0, 0.0), (1.95, 1.0)], 'trend')]
    shown = Picture('p', 't', 'u', Axis('x', tight=True), curves, rows=[name, 'short'])
    drawn = draw.html(shown)
    part = drawn.split('<g class="y">')[1].split('<g class="')[0]
    *lines, short = re.findall('<text[^>]*>(.*?)</text>', part)
    assert ''.join(lines).replace(' ', '') == name.replace(' ', '') and short == 'short'
    assert len(lines) == 2 and all(float(x) > 0 for x in re.findall(r'translate\(([-\d.]+)', part))
    columns = [sum(2 if ord(c) > 0x2E7F else 1 for c in text) for text in lines]
    assert max(columns) <= 29
    assert shown.frame_x[0] > 1.8  # without a band nothing holds 0
