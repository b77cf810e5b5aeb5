"""The README in Chinese has what the English one has: headings, commands, links; and documents name
files that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = (ROOT / name for name in ('README.md', 'README.zh-CN.md'))
PAGES = [ENGLISH, CHINESE, *sorted((ROOT / 'docs').glob('*.md'))]


def headings(text):
    """The levels of the headings, in order."""
    return [len(marks) for marks in re.findall(r'^(#+) ', _prose(text), re.MULTILINE)]


def code(text):
    """What stands between backticks, and the lines of code blocks without their comments and the
    words that explain them."""
    blocks = re.findall(r'^```\w*\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    lines = [line.split('#')[0].strip() for line in blocks[0].splitlines()]
    paths = re.findall(r'^ *([a-z_]+(?:\.py|/)|[a-z_]+/  .*?)(?= {3,}|$)', blocks[1], re.MULTILINE)
    return lines, paths, sorted(re.findall(r'`([^`\n]+)`', _prose(text)))


def links(text):
    """Where links and pictures lead, in order; not to the other language."""
    found = re.findall(r'\]\(([^)\s]+)\)', _prose(text))
    return [target for target in found if not target.startswith('README')]


def _prose(text):
    return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('part', [headings, code, links])
def test_the_chinese_readme_is_in_step(part):
    english, chinese = (part(path.read_text('utf-8')) for path in (ENGLISH, CHINESE))
    assert all(english) and chinese == english


def test_its_list_has_as_many_items_and_bold_words():
    english, chinese = (path.read_text('utf-8') for path in (ENGLISH, CHINESE))
    for pattern in (r'^\d+\. ', r'^- ', r'\*\*[^*]+\*\*'):
        found = [len(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1] > 5, pattern
    letters = re.findall(r'[\u4e00-\u9fff]', chinese)
    assert len(letters) > 1000


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', _prose(page.read_text('utf-8'))):
        name, _, heading = target.partition('#')
        if '://' in target:
            continue
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if heading:
            text = _prose(path.read_text('utf-8'))
            titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
            assert heading in [_anchor(title) for title in titles], target


def _anchor(title):
    """Of a heading, as GitHub makes it."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
