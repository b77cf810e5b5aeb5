"""Eight virtual CPU devices for every test, and a process that stays as it was between them."""

import gc
import logging
import os
import platform
import signal
import sys
import threading
from pathlib import Path

import pytest

from tests.flags import FAST_COMPILATION

# Before the first import of jax.
os.environ['JAX_PLATFORMS'] = 'cpu'
# A flag and not JAX_NUM_CPU_DEVICES: a process that a test starts can override it either way.
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        FAST_COMPILATION,
    )
)

# Half of the time of these tests is compilation, and many compile the same: programs are kept, for
# the processes that tests start and for the next run as well. Their key is the whole program, its
# options and the versions of jax and XLA; it does not know the processor, hence the host's name.
_PROGRAMS = Path(__file__).parents[1] / '.pytest_cache' / 'programs' / platform.node()
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_PROGRAMS))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.02')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

# A shell that starts the tests in the background tells them, and what they start, to ignore Ctrl-C.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# SIGPIPE as well: where it is not ignored, a write to a closed socket ends the process without a
# word.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def pytest_addoption(parser):
    parser.addoption(
        '--one-of-each',
        action='store_true',
        help='take each test with its first parameters alone, but for those marked all_parameters',
    )


@pytest.hookimpl(trylast=True)  # behind the selection by -m and -k
def pytest_collection_modifyitems(config, items):
    """On another Python and jax it is functions that may fail, and less their cases."""
    if not config.getoption('one_of_each'):
        return
    seen, kept, left_out = set(), [], []
    for item in items:
        name = item.nodeid.partition('[')[0]
        again = name in seen and item.get_closest_marker('all_parameters') is None
        (left_out if again else kept).append(item)
        seen.add(name)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


_MAPS = Path('/proc/self/maps')
_MOST_MAPS = 15_000
"""Of the 65,530 that Linux gives a process. Each compiled program takes several, 35 tests of a
training loop 10,000; beyond the limit LLVM ends the process, without a word."""


def _give_up_programs(most: int) -> None:
    """Where more than `most` maps are held."""
    jax = sys.modules.get('jax')
    if jax is not None and _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='module', autouse=True)
def _few_programs():
    """Compiled programs are given up behind a file of tests, once there are many."""
    yield
    _give_up_programs(_MOST_MAPS)


@pytest.fixture(autouse=True)
def _fewer_than_the_limit():
    """Within a file they are given up as well before they reach the limit."""
    yield
    _give_up_programs(2 * _MOST_MAPS)


@pytest.fixture(autouse=True)
def _process_as_before():
    """A test leaves the process's signal handlers as they were, which is checked, and the root
    logger's handlers, which a script run by `cli.main` replaces: theirs write to closed files."""
    signals = [signal.getsignal(number) for number in _SIGNALS]
    handlers = list(logging.root.handlers)
    yield
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler and handler not in handlers:
            logging.root.removeHandler(handler)
    assert [signal.getsignal(number) for number in _SIGNALS] == signals
