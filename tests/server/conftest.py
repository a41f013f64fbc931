import pytest

from tests.server.support import serving


@pytest.fixture(scope="module")
def live(tiny):
    """A server over the tiny Llama, shared by a module's tests.

    Without a prefix cache: other engines of the tests write to the same pool while this one is idle.
    """
    with serving(tiny(enable_prefix_caching=False)) as server:
        yield server
