"""Reports as a reader sees them: text, charts by title, and the points of their curves."""

import math
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


def curve(figure, style):
    """The drawing of a curve."""
    return re.search(rf'<g class="{re.escape(style)}">.*?</g>', figure)[0]


def _number(label):
    """The value of a tick label such as 0.5M or 2\u202f×\u202f10¹³."""
    plain = label.replace('−', '-')
    if power := re.fullmatch('(?:(.+)\u202f×\u202f)?10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)', plain):
        exponent = power[2].translate(str.maketrans('⁰¹²³⁴⁵⁶⁷⁸⁹⁻', '0123456789-'))
        return float(power[1] or 1) * 10.0 ** int(exponent)
    units = {'k': 1e3, 'M': 1e6, 'B': 1e9}
    return float(plain.rstrip('kMB')) * units.get(plain[-1], 1)


def read_off(figure, style, *, log=False):
    """Points of a curve as a reader sees them: by its place between the labels of the axes."""

    def scale(name, place, apply):
        part = re.split('<g class="', figure.split(f'<g class="{name}">')[1])[0]
        found = re.findall(rf'<use [^>]*{place}="([\d.]+)"[^>]*>.*?<text[^>]*>(.*?)</text>', part)
        (a, low), (b, high) = ((float(at), apply(_number(x))) for at, x in (found[0], found[-1]))
        return lambda at: low + (at - a) * (high - low) / (b - a)

    x = scale('x', 'x', math.log if log else float)
    y = scale('y', 'y', float)
    path = re.search(' d="(.*?)"', curve(figure, style))[1]
    pairs = re.findall(r'[ML] (\S+) (\S+)', path)
    return [((math.exp if log else float)(x(float(a))), y(float(b))) for a, b in pairs]
