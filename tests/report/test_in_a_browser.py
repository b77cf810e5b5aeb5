"""Pages as a browser lays them out, where this machine has one: wide and as narrow as a phone."""

import pytest

from llama_jax.report import comparison
from tests.report import compared, run
from tests.report.compared import THREE
from tests.report.pages import report
from tests.serve import browser

SHOWN = "document.readyState === 'complete' && document.querySelector('svg')"
# What is wider scrolls within its own card, never the page.
OUTSIDE = """
[...document.querySelectorAll('body *')].filter((one) => {
    const box = one.getBoundingClientRect();
    const within = one.closest('.card, .tables, figure, pre, details, .scroll');
    return box.width && box.right > innerWidth + 1 && (!within || within === one);
}).map((one) => one.tagName + '.' + one.className)
"""


@pytest.fixture(scope='module')
def page():
    with browser.opened() as one:
        yield one


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pages')
    report(folder / 'run', lines=run.metrics())
    compared.write(folder / 'three', arms=THREE)
    comparison.write(folder / 'three')
    return {name: folder / name / 'report.html' for name in ('run', 'three')}


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('name', ['run', 'three'])
def test_a_page_fits_its_window(page, pages, name, width):
    page.problems.clear()
    page.open(pages[name].as_uri(), width=width)
    page.wait(SHOWN)
    page.wait(f'innerWidth === {width}')
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.run('document.documentElement.scrollWidth') <= width
    assert page.run(OUTSIDE) == []
    # Pictures fill their card, and no more.
    widths = page.run("[...document.querySelectorAll('svg')].map((x) => x.clientWidth)")
    assert len(widths) > 3 and min(widths) > 100 and max(widths) <= width
    assert not page.problems
