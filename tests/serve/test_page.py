"""The page in a browser, where this machine has one."""

import contextlib

import pytest

from tests.serve import browser, fake
from tests.serve.conftest import running
from tests.serve.fake import says

READY = "document.readyState === 'complete' && model && !document.getElementById('send').disabled"
IDLE = "!running && !document.querySelector('.writing')"
TEXT = 'One & <b>two</b>,\n你好 🙂.'


@pytest.fixture(scope='module')
def page():
    with browser.opened() as one:
        yield one


@pytest.fixture
def opened(page, app):
    """Opens the page of a server with these settings; gives the page and the engine."""
    with contextlib.ExitStack() as stack:

        def make(*, ready=READY, **settings):
            made = app(**settings)
            url, _ = stack.enter_context(running(made))
            page.problems.clear()
            page.open(url)
            page.wait(f"location.href.startsWith('{url}')")
            page.wait(ready)
            page.run("localStorage.clear(), sessionStorage.clear(), setMode('chat')")
            return made.state.service.served.engine

        yield make
    page.open('about:blank')


def send(page, text):
    page.run(f'input.value = {text!r}; document.getElementById("composer").requestSubmit()')


def articles(page):
    return page.run("[...document.querySelectorAll('article .text')].map((one) => one.textContent)")


def test_chat(page, opened):
    engine = opened(script=says(TEXT))
    send(page, 'Hello <i>you</i>')
    page.wait(f'{IDLE} && messages.length === 2')
    assert articles(page) == ['Hello <i>you</i>', TEXT]
    assert page.run("document.querySelectorAll('article b, article i').length") == 0
    facts = page.run("document.querySelector('.facts span').textContent")
    assert facts.startswith(f'{len(TEXT.encode())} tokens') and 'tokens/s' in facts
    send(page, 'More')
    page.wait(f'{IDLE} && messages.length === 4')
    asked = fake.Bytes().decode(engine.requests[-1].prompt)
    assert asked == f'user: Hello <i>you</i>\nassistant: {TEXT}\nuser: More\nassistant: '
    page.run("[...document.querySelectorAll('button')].findLast((b) => b.textContent === 'Again')"
             '.click()')  # fmt: skip
    page.wait(f'{IDLE} && messages.length === 4')
    assert fake.Bytes().decode(engine.requests[-1].prompt) == asked
    assert not page.problems


def test_tokens_are_shaded_and_tell_their_alternatives(page, opened):
    opened(script=says('a你'))
    send(page, 'x')
    page.wait(IDLE + ' && messages.length === 2')
    # The three bytes of one character are one span.
    shades = "[...document.querySelectorAll('.token')].map((t) => [t.textContent, t.tokens.length])"
    assert page.run(shades) == [['a', 1], ['你', 3]]
    assert float(page.run("document.querySelector('.token').style.getPropertyValue('--surprise')"))
    colour = "getComputedStyle(document.querySelector('.token')).backgroundColor"
    shaded = page.run(colour)
    page.run("document.querySelector('.token').dispatchEvent(new Event('click', {bubbles: true}))")
    assert page.run("tip.hidden ? '' : tip.querySelector('.drawn').textContent") == 'a77.9%'
    page.run("control('logprobs').click()")
    assert page.run(colour) != shaded


def test_stop_frees_the_row(page, opened):
    engine = opened(pause=0.005)
    send(page, 'x')
    page.wait("document.querySelectorAll('.token').length > 5")
    page.run("document.getElementById('stop').click()")
    page.wait(IDLE)
    assert engine.idle(1.0) and engine.stats().requests_total == {'cancelled': 1}
    assert 'stopped' in page.run("document.querySelector('.facts span').textContent")


def test_completion_and_its_controls(page, opened):
    engine = opened()
    page.run("document.getElementById('completion').click()")
    for name, value in (('max_tokens', 4), ('temperature', 0), ('seed', 7), ('top_k', 3)):
        page.run(f"control('{name}').value = {value}")
    page.run("control('stop').value = 'END\\\\n'")
    send(page, 'ab')
    page.wait(f'{IDLE} && document.querySelector("article button")')
    assert articles(page) == ['ababab']
    got = engine.requests[0].controls
    assert (got.max_tokens, got.temperature, got.seed, got.top_k) == (4, 0, 7, 3)
    assert got.stop == ('END\n',)
    page.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Go on')"
             '.click()')  # fmt: skip
    page.wait(f'{IDLE} && document.querySelector(".text").textContent.length === 10')


def test_what_the_server_refuses_is_told_and_marked(page, opened):
    opened()
    page.run("control('top_p').value = 5")
    send(page, 'keep me')
    page.wait(f'{IDLE} && document.querySelector(".wrong")')
    assert 'top_p 5.0 is not in (0, 1]' in page.run("document.querySelector('.wrong').textContent")
    assert page.run("control('top_p').getAttribute('aria-invalid')") == 'true'
    assert page.run('[input.value, messages.length]') == ['keep me', 0]


def test_key(page, opened):
    opened(keys=('secret',), ready="document.getElementById('key-label')?.hidden === false")
    page.run("$('key').value = 'secret'; $('key').dispatchEvent(new Event('change'))")
    page.wait(READY)
    send(page, 'x')
    page.wait(IDLE + ' && messages.length === 2')


def test_model_without_a_chat_format(page, opened):
    opened(parts={'chat': None}, ready=READY)
    assert page.run("document.getElementById('chat').disabled")
