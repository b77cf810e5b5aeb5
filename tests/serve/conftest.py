"""Engines that end with their test, and servers on a port of their own."""

import contextlib
import socket
import threading

import pytest

from llama_jax.serve.app import build
from tests.serve import fake


@pytest.fixture
def engine():
    """Makes engines; each must be idle at the end of the test, however its requests ended."""
    made = []

    def make(**settings):
        made.append(fake.FakeEngine(**settings))
        return made[-1]

    yield make
    for one in made:
        idle = one.idle()
        one.close()
        assert idle, one.stats()


@pytest.fixture
def app(engine):
    """Makes applications around an engine of their own."""

    def make(*, keys=(), limits=fake.SMALL, parts=None, **settings):
        made = build(fake.served(engine(**settings), **(parts or {})), keys=keys, limits=limits)
        return made

    return make


@contextlib.contextmanager
def running(app, *, grace_seconds=10.0, connections=None, holds=None):
    """Serves `app` in a thread; gives (its address, the server). `holds`: bytes of answers that the
    system keeps for a client that does not read."""
    from llama_jax.serve.run import Server, bind

    sock = bind('127.0.0.1', 0)
    if holds:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, holds)
    server = Server(app, grace_seconds=grace_seconds, connections=connections)
    thread = threading.Thread(target=server.run, kwargs={'sockets': [sock]})
    thread.start()
    try:
        yield f'http://127.0.0.1:{sock.getsockname()[1]}', server
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()
