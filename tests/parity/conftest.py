"""One server of the real SmolLM2 for all tests of its clients."""

import pytest

from tests.serve.process import serving

LENGTH = 160


@pytest.fixture(scope='session')
def smollm2_server():
    """Still starting: its `url` waits, and a test may do other work before it asks for that."""
    with serving('--weights', 'smollm2', '--length', LENGTH) as server:
        yield server
        server.interrupt()
        assert server.exit_code() == 0, server.log
