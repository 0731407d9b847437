"""The fixtures of the tests with an origin and a mitmdump, for those that need more of a system than Python."""

from tests.e2e.conftest import new_client, origin, proxy, shared, start_proxy

__all__ = ["new_client", "origin", "proxy", "shared", "start_proxy"]
