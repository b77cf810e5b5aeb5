"""Reports as a reader sees them: text, and charts by title."""

import re
from html.parser import HTMLParser

from llama_jax.report.page import write_report
from tests.report import run


class Page(HTMLParser):
    """Elements and visible text of a page; fails on elements that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {'meta', 'link'}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('style', 'title'):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r'\s+', ' ', ' '.join(self.texts))


def report(path, **kwargs):
    return write_report(run.write(path, **kwargs)).read_text('utf-8')


def figures(html):
    """Charts by title and x axis."""
    found = {}
    for figure in re.findall(r'<figure>.*?</figure>', html, re.S):
        title = re.search(r'<figcaption><b>(.*?)</b>', figure)[1]
        axis = re.search(r'<p class="axis">(.*?)</p>', figure)
        found[title, axis[1] if axis else None] = figure
    return found
