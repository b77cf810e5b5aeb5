"""Chromium without a window, spoken to over a pipe in its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
# The protocol wants its two pipes as descriptors 3 and 4.
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
MAC = '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome'


def find() -> str | None:
    """A browser of this machine that runs."""
    for path in filter(None, map(shutil.which, (*NAMES, MAC))):
        if not subprocess.run([path, '--version'], capture_output=True).returncode:
            return path
    return None


class Page:
    """One page. Exceptions and console errors of the page are in `problems`."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._buffer, self._id = write, read, b'', 0
        self.problems: list[str] = []
        target = self._call('Target.createTarget', url='about:blank')['targetId']
        attached = self._call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, self._session, **params)

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        self.call('Page.navigate', url=url)

    def run(self, code: str) -> Any:
        """The value of an expression; a promise is waited for."""
        answer = self.call(
            'Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True
        )
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def wait(self, code: str, seconds: float = 10.0) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.run(f'!!({code})'):
            assert time.monotonic() < until, f'{code}\n{self.run("document.body.innerText")}'
            time.sleep(0.02)

    def picture(self, path: Path) -> None:
        data = self.call('Page.captureScreenshot', format='png')['data']
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {'id': self._id, 'method': method, 'params': params}
        if session:
            message['sessionId'] = session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._receive()
            if answer.get('id') == self._id:
                assert 'error' not in answer, answer
                return answer['result']
            params = answer.get('params', {})
            if answer.get('method') == 'Runtime.exceptionThrown':
                self.problems.append(str(params['exceptionDetails']))
            elif answer.get('method') == 'Log.entryAdded' and params['entry']['level'] == 'error':
                self.problems.append(params['entry']['text'])

    def _receive(self) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            data = os.read(self._read, 1 << 20)
            assert data, 'the browser has ended'
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)


@contextlib.contextmanager
def opened() -> Iterator[Page]:
    """A page of the browser of this machine; the test is skipped where there is none."""
    found = find()
    if not found:
        pytest.skip('no Chromium or Chrome on this machine')
    with page(found) as one:
        yield one


@contextlib.contextmanager
def page(browser: str) -> Iterator[Page]:
    """A page of a browser that is started for it."""
    its_read, write = os.pipe()
    read, its_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(sys.executable, '-c', _START, str(its_read), str(its_write)),
            *(browser, '--headless', '--remote-debugging-pipe', f'--user-data-dir={profile}'),
            *('--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run'),
            *('--disable-background-networking', 'about:blank'),
        ]
        process = subprocess.Popen(
            command,
            pass_fds=(its_read, its_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        try:
            yield Page(write, read)
        finally:
            os.close(write)
            os.close(read)
            process.terminate()
            process.wait(10)
