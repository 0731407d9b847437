"""A client that asks whether the registry is there, before it asks for what the cache has."""

import pytest

from tests.e2e.conftest import add_model, get, to_registry
from tests.support.origin import Fault, Mode, Origin
from tests.support.proxy import Proxy

COOKIE = {"Set-Cookie": "session=secret"}


@pytest.mark.parametrize("target", ["/", "/v2/"])
def test_the_registry_goes_away(origin: Origin, proxy: Proxy, target: str) -> None:
    """GET and HEAD are answered as they last were; cookies are for nobody."""
    hello = Fault(Mode.STATUS, where="registry", path=target, times=None, status=200, headers=COOKIE, body=b"{}")
    origin.faults.append(hello)
    with to_registry(proxy) as connection:
        before = get(connection, target)
        assert before[::2] == (200, b"{}")
        origin.stop()
        status, headers, body = get(connection, target)
        assert (status, body, headers["content-type"]) == (200, b"{}", "text/plain")
        assert "set-cookie" not in headers | before[1]
        assert "detail=upstream-failed" in headers["cache-status"]
        response = connection.request("HEAD", target, [])
        assert (response.status, response.read()) == (200, b"")
        assert {name.lower(): value for name, value in response.headers}["content-length"] == "2"


def test_a_page_is_passed_on(origin: Origin, proxy: Proxy) -> None:
    """The home page of a registry that is a web site too comes whole, with all its fields."""
    page = Fault(
        Mode.STATUS,
        where="registry",
        path="/",
        times=None,
        status=200,
        headers=COOKIE,
        body=b"<html>" + b" " * 100_000,
    )
    model = add_model(origin, b"x")
    with to_registry(proxy) as connection:
        # So that the registry does not count as away.
        assert get(connection, model.manifest_target)[0] == 200
        origin.faults.append(page)
        status, headers, body = get(connection, "/")
    assert (status, len(body), headers["set-cookie"]) == (200, 100_006, "session=secret")
