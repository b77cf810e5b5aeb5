"""The files of a comparison's report: they load nothing, bear any name, are always the same."""

import json
import re

import pytest

from llama_jax.report import comparison
from llama_jax.report.draw import html as drawn
from llama_jax.report.draw import write_pngs
from llama_jax.report.picture import Axis, Curve, Picture
from llama_jax.report.style import ARM_COLOURS, arm_style
from llama_jax.report.tables import Cell, Row, Table, markdown
from tests.report import compared
from tests.report.compared import judged
from tests.report.pages import Page

HOSTILE = '<b onload=alert(1)>因果|*x*_`$y$`\u202e'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    workdir = compared.write(tmp_path_factory.mktemp('runs') / 'whole', rates=(1e-3,))
    comparison.write(workdir)
    return workdir


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    # A directory's name may hold all but a slash.
    compared.ARMS[HOSTILE] = compared.ARMS['spans']
    try:
        workdir = tmp_path_factory.mktemp('runs') / 'hostile'
        compared.write(workdir, arms=('causal', HOSTILE), title=f'# {HOSTILE}', command=HOSTILE)
    finally:
        del compared.ARMS[HOSTILE]
    comparison.write(workdir)
    return workdir


def files(workdir):
    return {
        path.relative_to(workdir).as_posix(): path.read_bytes()
        for path in [*workdir.glob('report.*'), *workdir.glob('figures/*')]
    }


def tables(text):
    """Tables of Markdown as lists of rows of cells."""
    found = re.findall(r'(?:^\|.*\|\n)+', text, re.M)
    return [[re.split(r'(?<!\\)\|', line)[1:-1] for line in table.splitlines()] for table in found]


@pytest.mark.slow
def test_the_same_records_make_the_same_bytes(written):
    first = files(written)
    assert {'report.html', 'report.md', 'figures/alignment-uniformity.png'} <= set(first)
    comparison.write(written)
    assert files(written) == first


def test_nothing_is_loaded_and_nothing_runs(written, hostile):
    for workdir in (written, hostile):
        html = (workdir / 'report.html').read_text('utf-8')
        for tag, attributes in Page(html).elements:
            assert tag not in {
                'script',
                'img',
                'iframe',
                'object',
                'embed',
                'base',
                'form',
                'b onload',
            }
            assert not [name for name in attributes if name.startswith('on')]
            href = attributes.get('href', 'data:,')
            assert href == 'data:,' or re.fullmatch('#[a-z-]+|#m[0-9a-f]+', href)
            assert 'src' not in attributes
        local = re.sub(r'clip-path="url\(#p[0-9a-f]+\)"', '', html)
        assert '://' not in html and 'url(' not in local and '@import' not in html
        assert "default-src 'none'" in html


def test_links_of_the_page_lead_somewhere(written):
    elements = Page((written / 'report.html').read_text('utf-8')).elements
    wanted = [x['href'][1:] for tag, x in elements if tag == 'a']
    assert wanted == [x['id'] for tag, x in elements if tag == 'h2'] and len(set(wanted)) > 10


def test_hostile_names_are_shown_as_text(hostile):
    html = (hostile / 'report.html').read_text('utf-8')
    shown = '&lt;b onload=alert(1)&gt;因果|*x*_`$y$`⟨U+202E⟩'
    assert (
        f'</i>{shown}</th>' in html
        and f'# {shown} (untuned)</h1>' in html
        and f'<pre>{shown}</pre>' in html
    )
    assert '<b onload' not in html and '\u202e' not in html
    text = (hostile / 'report.md').read_text('utf-8')
    escaped = r'&lt;b onload=alert(1)&gt;因果\|\*x\*\_\`\$y\$\`⟨U+202E⟩'
    assert text.startswith(f'# \\# {escaped} (untuned)\n') and f'\n| {escaped} | ' in text
    outside = re.sub(r'^(`{3,})\n.*?\n\1$', '', text, flags=re.M | re.S)
    assert '<b' not in outside and '\u202e' not in text


def test_markdown_tables_are_whole(written, hostile):
    for workdir in (written, hostile):
        found = tables((workdir / 'report.md').read_text('utf-8'))
        assert len(found) >= 9
        for head, rule, *rows in found:
            assert rows and all(re.fullmatch(r' -{3}:? ', cell) for cell in rule)
            assert {len(row) for row in (head, rule, *rows)} == {len(head)}


def test_both_reports_have_the_same_tables(written):
    html = (written / 'report.html').read_text('utf-8')
    numbers = [
        re.findall('<td.*?>(?:<b>)?(.*?)(?:</b>)?</td>', row)
        for row in re.findall('<tbody>(.*?)</tbody>', html)
    ]
    found = tables((written / 'report.md').read_text('utf-8'))
    plain = [
        [re.sub(r'\\|\*\*', '', cell).strip() for row in rows for cell in row[1:]]
        for _, _, *rows in found
    ]
    assert [[x.replace('&#x27;', "'") for x in row] for row in numbers] == plain


def test_pictures_of_the_markdown_are_files(written):
    text = (written / 'report.md').read_text('utf-8')
    named = re.findall(r'^!\[(.+)\]\((figures/[a-z0-9-]+\.png)\)$', text, re.M)
    made = {path for path in files(written) if path.endswith('.png')}
    assert {path for _, path in named} == made and len(named) == len(made) > 12
    for path in made:
        data = (written / path).read_bytes()
        assert data.startswith(b'\x89PNG') and len(data) > 10_000


def test_pngs_have_the_colours_of_the_arms_in_order(written):
    from matplotlib import colors, image

    pixels = image.imread(written / 'figures' / 'recall-span-1-tokens.png')[..., :3]
    legend = pixels[int(0.85 * len(pixels)) :]
    places = []
    for light, _ in ARM_COLOURS:
        same = abs(legend - colors.to_rgb(light)).max(-1) < 0.01
        if same.any():
            ys, xs = same.nonzero()
            places.append((xs.min() // 20, ys.min(), light))
    # The legend goes down its columns.
    assert [x[2] for x in sorted(places)] == [light for light, _ in ARM_COLOURS[:5]]
    assert abs(pixels[: len(pixels) // 2] - colors.to_rgb(ARM_COLOURS[3][0])).max(-1).min() < 0.01


def test_more_arms_than_colours_are_told_apart():
    styles = [arm_style(i) for i in range(20)]
    assert len(set(styles)) == 20 and styles[12] == 'arm arm-2 again'
    for dark in (0, 1):
        assert len({c[dark] for c in ARM_COLOURS}) == len(ARM_COLOURS)


def test_any_name_and_any_points_can_be_drawn(tmp_path):
    curves = [
        Curve(HOSTILE, [(0.0, 1.0), (1.0, 2.0)], arm_style(0)),
        Curve('_hidden', [(1.0, None), (2.0, 3.0)], arm_style(11), dots=True),
        Curve('', [(3.0, 1.0)], f'{arm_style(2)} seed', line=False),
        Curve('none', [(3.0, None)], arm_style(3)),
    ]
    for log in (False, True):
        picture = Picture(f'any-{log}', 'title $x$', 'unit', Axis('x', log=log), curves)
        (path,) = write_pngs(tmp_path / 'figures', [picture])
        assert path.stat().st_size > 5000
        assert '&lt;b onload' in drawn(picture) and '<b onload' not in drawn(picture)


def test_names_of_a_drawing_are_of_one_picture(written):
    html = (written / 'report.html').read_text('utf-8')
    for figure in re.findall('<svg.*?</svg>', html, re.S):
        made = set(re.findall(' id="(.*?)"', figure))
        assert set(re.findall(r'(?:url\(|href=")#(\w+)', figure)) <= made
    every = re.findall(' id="([mp][0-9a-f]{10})"', html)
    assert len(set(every)) == len(every) > 50


def test_drawings_have_the_colours_of_either_theme(written):
    html = (written / 'report.html').read_text('utf-8')
    style = re.search('<style>(.*?)</style>', html, re.S)[1]
    used = set(re.findall(r'var\(--c-(\w+)\)', html))
    light, dark = style.split('@media (prefers-color-scheme: dark)')[:2]
    for part in (light, dark):
        assert used <= set(re.findall(r'--c-(\w+):', part))
    assert not re.findall('(?:fill|stroke): #', html)


@pytest.mark.slow
def test_records_are_left_as_they_are(tmp_path):
    workdir = compared.write(tmp_path / 'three', arms=('causal', 'masked'))
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    comparison.write(workdir)
    assert {p: p.read_bytes() for p in before} == before
    new = {p.relative_to(workdir).parts[0] for p in workdir.rglob('*') if p not in before}
    assert new - {'causal', 'masked'} == {'report.html', 'report.md', 'figures'}


def test_text_in_markdown():
    assert markdown('a|b_c*d`e\n# <x>') == r'a\|b\_c\*d\`e \# &lt;x&gt;'
    table = Table(['n\nm', 'a|b'], [Row('r', [Cell('1', best=True)])])
    assert table.markdown() == '| n m | a\\|b |\n| --- | ---: |\n| r | **1** |\n'


def test_a_command_cannot_end_its_code_block(tmp_path):
    workdir = compared.write(tmp_path / 'x', arms=('causal',), command='a\n```\n# b')
    found = judged(workdir)
    text = comparison.text(found.grid, comparison.content(found))
    assert '\n````\na\n```\n# b\n````\n' in text
    assert json.loads((workdir / 'grid.json').read_text())['command'] in text
