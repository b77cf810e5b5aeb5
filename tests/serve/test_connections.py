"""Real sockets: those that ask for nothing and those that do not read are closed, and whoever asks
gets in."""

import contextlib
import json
import re
import socket
import time

import pytest
from starlette.responses import Response
from starlette.routing import Route

from llama_jax.serve.connections import Connections
from llama_jax.serve.gate import network_of
from tests.serve.conftest import running

HALF = b'GET /health HTTP/1.1\r\nhost: a\r\nx-slow: '
WHOLE = b'GET /health HTTP/1.1\r\nhost: a\r\n\r\n'


@pytest.fixture
def serve(app):
    """Serves an application; gives a function that opens connections to it, and the server."""
    with contextlib.ExitStack() as stack:

        def start(connections, *, grace_seconds=10.0, **settings):
            made = app(**settings)
            url, server = stack.enter_context(
                running(made, connections=connections, grace_seconds=grace_seconds, holds=4096)
            )
            port = int(url.rpartition(':')[2])

            def opened(data=b'', *, receives=None):
                one = stack.enter_context(socket.socket())
                one.settimeout(10)
                if receives:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
                one.connect(('127.0.0.1', port))
                one.sendall(data)
                return one

            return opened, server, made.state.service.served.engine

        yield start


def post(body):
    data = json.dumps(body).encode()
    head = f'POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(data)}\r\n'
    return head.encode() + b'content-type: application/json\r\n\r\n' + data


def closed(one) -> bool:
    """Whether the server closes it, without a byte."""
    try:
        return one.recv(1) == b''
    except ConnectionResetError:
        return True


def ask(one, data=WHOLE) -> bytes:
    """All of an answer of a known length, which may come in pieces."""
    one.sendall(data)
    found = one.recv(4096)
    head, _, body = found.partition(b'\r\n\r\n')
    length = re.search(rb'content-length: (\d+)', head, re.IGNORECASE)
    while length and len(body) < int(length[1]) and (more := one.recv(4096)):
        found, body = found + more, body + more
    return found


def stream_of(tokens):
    return post({'prompt': 'a', 'max_tokens': tokens, 'stream': True, 'logprobs': 20})


def test_half_a_header_does_not_keep_others_out(serve):
    opened, server, _ = serve(Connections(most=100, of_one=3, header_seconds=60))
    idle = [opened(), *(opened(HALF) for _ in range(2))]
    for one in idle:  # each newcomer takes the place of the one that has asked for longest
        assert b'200 OK' in ask(opened())
        assert closed(one)
    assert server.connections._of == {'127.0.0.1': 3}


def test_who_is_answered_keeps_a_place_while_there_is_room(serve):
    opened, *_ = serve(Connections(most=100, of_one=2, header_seconds=60))
    first, second = opened(), opened()
    for one in (first, second, first):  # the second has asked for nothing for longest
        assert b'200 OK' in ask(one)
    assert b'200 OK' in ask(opened()) and closed(second)
    assert b'200 OK' in ask(first)


def test_all_of_a_server_are_limited_as_those_of_an_address(serve):
    opened, *_ = serve(Connections(most=2, of_one=100, header_seconds=60))
    first, second = opened(HALF), opened(HALF)
    assert b'200 OK' in ask(opened()) and closed(first)
    assert b'200 OK' in ask(second, b'\r\n\r\n')


def test_header_has_a_deadline_however_it_drips(serve):
    opened, *_ = serve(Connections(most=100, of_one=100, header_seconds=0.3))
    silent, dripping, second = opened(), opened(HALF), opened()
    assert b'200 OK' in ask(second)
    second.sendall(HALF)  # of the next request of the same connection
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - begin < 5:
            for one in (dripping, second):
                one.sendall(b'a')
            time.sleep(0.02)
    assert time.monotonic() - begin < 5
    assert closed(silent) and closed(dripping) and closed(second)


def test_connections_at_work_keep_their_place(serve):
    opened, _, engine = serve(Connections(most=100, of_one=2, header_seconds=0.1), pause=0.01)
    at_work = [opened(stream_of(400)) for _ in range(2)]
    assert all(one.recv(1) for one in at_work)
    answer = opened(WHOLE).recv(4096)
    assert answer.startswith(b'HTTP/1.1 429 ') and b'retry-after: 2' in answer
    assert json.loads(answer.partition(b'\r\n\r\n')[2])['error']['code'] == 'too_many_connections'
    time.sleep(0.2)  # the deadline of headers is not theirs
    assert engine.stats().rows_busy == 2
    for one in at_work:
        one.close()
    assert engine.idle(1.0)
    assert b'200 OK' in ask(opened())


def test_reader_that_takes_nothing_is_let_go(serve):
    # What waits is more than the system holds, and the text could go on for a minute.
    settings = {'pause': 0.002, 'length': 40_000}
    opened, server, engine = serve(Connections(100, 100, write_seconds=0.6), **settings)
    one = opened(stream_of(30_000), receives=4096)
    assert one.recv(1)
    until, held = time.monotonic() + 20, 0
    while not engine.stats().requests_total and time.monotonic() < until:
        for connection in list(server.server_state.connections):
            held = max(held, connection.transport.get_write_buffer_size())
        time.sleep(0.02)
    assert 0 < held < 120_000
    assert engine.stats().requests_total == {'cancelled': 1}
    assert not server.connections._of and not server.connections._idle


def test_reader_that_takes_a_long_answer_bit_by_bit_gets_it_all(app):
    """One that is larger than what it reads in the time of a reader that takes nothing."""
    size, made = 3_000_000, app()
    made.router.routes.insert(0, Route('/large', lambda _: Response(bytes(size))))
    connections = Connections(100, 100, write_seconds=0.4)
    with running(made, connections=connections) as (url, _), socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(('127.0.0.1', int(url.rpartition(':')[2])))
        one.sendall(WHOLE.replace(b'/health', b'/large'))
        n, begin = 0, time.monotonic()
        while n < size and (more := one.recv(1 << 16)):
            n += len(more)
            time.sleep(len(more) / 1_000_000)  # bytes a second
        assert n >= size and time.monotonic() - begin > 1


def test_end_of_the_server_waits_for_nobody(serve):
    settings = {'pause': 0.002, 'length': 40_000}
    connections = Connections(100, 100)
    opened, server, engine = serve(connections, grace_seconds=1.0, **settings)
    half = opened(HALF)
    deaf = opened(stream_of(30_000), receives=4096)
    reading = opened(stream_of(30_000))
    assert deaf.recv(1)
    time.sleep(0.2)
    begin, told = time.monotonic(), b''
    server.should_exit = True
    assert closed(half) and engine.stats().rows_busy == 2  # the streams have some time left
    while piece := reading.recv(1 << 16):
        told += piece
    assert b'"finish_reason":"cancelled"' in told and b'data: [DONE]' in told
    assert engine.idle(2.0) and time.monotonic() - begin < 3


def test_networks():
    assert network_of('192.0.2.7') == '192.0.2.7' == network_of('::ffff:192.0.2.7')
    assert network_of('2001:db8:1:2:3::9') == network_of('2001:db8:1:2:ffff::1%eth0')
    assert network_of('2001:db8:1:2::9') != network_of('2001:db8:1:3::9')
    assert network_of('testclient') == 'testclient'


def test_limits_follow_the_open_files():
    for files, most, of_one in ((1024, 896, 224), (65_536, 65_408, 1024), (100, 1, 1)):
        made = Connections.within(files)
        assert (made.most, made.of_one) == (most, of_one)
