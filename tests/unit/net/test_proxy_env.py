"""proxy_env: which proxy the environment prescribes for which target, and what a parent is never asked for."""

import pytest

from pullthrough.core.errors import AddressRefused, SettingsError
from pullthrough.net.proxy_env import ParentProxies, check_remote


def way(environment: dict[str, str], target: str) -> str | None:
    """The proxy for `scheme://host:port`."""
    scheme, _, authority = target.partition("://")
    host, _, port = authority.rpartition(":")
    proxy = ParentProxies.parse(environment).of(scheme, host.strip("[]"), int(port))
    return proxy.origin if proxy else None


@pytest.mark.parametrize(
    ("environment", "https", "http"),
    [
        ({}, None, None),
        ({"HTTPS_PROXY": ""}, None, None),
        ({"HTTPS_PROXY": "http://p:3128"}, "http://p:3128", None),
        ({"https_proxy": "p:3128"}, "http://p:3128", None),
        ({"HTTPS_PROXY": "http://p"}, "http://p:80", None),
        ({"HTTPS_PROXY": "https://p/"}, "https://p:443", None),
        ({"HTTPS_PROXY": "http://[2001:db8::1]:3128"}, "http://[2001:db8::1]:3128", None),
        ({"http_proxy": "http://q:1"}, None, "http://q:1"),
        ({"ALL_PROXY": "http://a:1"}, "http://a:1", "http://a:1"),
        ({"all_proxy": "http://a:1", "HTTPS_PROXY": "http://p:2"}, "http://p:2", "http://a:1"),
        ({"HTTPS_PROXY": "http://p:1", "https_proxy": "http://q:1"}, "http://p:1", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None, None),
    ],
)
def test_variables(environment: dict[str, str], https: str | None, http: str | None) -> None:
    """Either case, the upper first as in Go; a scheme's own variable before that for all."""
    assert way(environment, "https://registry.ollama.ai:443") == https
    assert way(environment, "http://registry.ollama.ai:80") == http


@pytest.mark.parametrize(
    ("members", "target", "direct"),
    [
        ("", "https://a.example:443", False),
        ("", "https://localhost:443", True),
        ("", "https://127.9.9.9:443", True),
        ("", "https://[::1]:443", True),
        ("a.example", "https://a.example:443", True),
        ("A.Example", "https://a.EXAMPLE.:443", True),
        ("a.example", "https://b.a.example:443", True),
        ("a.example", "https://ba.example:443", False),
        (".a.example", "https://b.a.example:443", True),
        (".a.example", "https://a.example:443", False),
        ("*.a.example", "https://b.a.example:443", True),
        ("b, a.example:443 ,", "https://a.example:443", True),
        ("a.example:443", "https://a.example:8443", False),
        ("10.0.0.1", "https://10.0.0.1:443", True),
        ("10.0.0.1:443", "https://10.0.0.1:444", False),
        ("10.0.0.0/8", "http://10.1.2.3:9200", True),
        ("10.0.0.0/8", "https://11.0.0.1:443", False),
        ("10.0.0.0/8", "https://ten.example:443", False),
        ("fd00::/8", "https://[fd00::1]:443", True),
        ("fd00::1", "https://[fd00::1]:443", True),
        ("[fd00::1]:443", "https://[fd00::1]:443", True),
        ("10.0.0.0/nonsense", "https://10.0.0.1:443", False),
    ],
)
def test_exceptions(members: str, target: str, direct: bool) -> None:
    """NO_PROXY by the rules of golang.org/x/net/http/httpproxy, so that cache and Ollama agree."""
    for name in ("NO_PROXY", "no_proxy"):
        environment = {"ALL_PROXY": "http://p:1", name: members}
        assert way(environment, target) == (None if direct else "http://p:1")


def test_credentials() -> None:
    """They are decoded, go into Proxy-Authorization, and are in no text about the proxy."""
    parents = ParentProxies.parse({"HTTPS_PROXY": "http://us%40r:s3cret%2F@p:3128"})
    assert parents.https is not None
    assert parents.https.fields == {"Proxy-Authorization": "Basic dXNAcjpzM2NyZXQv"}
    assert "s3cret" not in f"{parents} {parents.https.origin}"
    assert "dXNA" not in f"{parents}"
    assert ParentProxies.parse({"HTTPS_PROXY": "http://p:3128"}).all[0].fields == {}


@pytest.mark.parametrize(
    "text",
    ["socks5://u:s3cret@p:1080", "http://", "http://u:s3cret@p:port", "http://p:1/s3cret", "ftp://p", "http://p?x"],
)
def test_unusable(text: str) -> None:
    """What was expected is said; what was got may hold a password."""
    with pytest.raises(SettingsError, match=r"^environment variable HTTPS_PROXY: expected \[http") as caught:
        ParentProxies.parse({"HTTPS_PROXY": text})
    assert "s3cret" not in str(caught.value)


def test_without() -> None:
    """A proxy that turns out to be ourselves is none, for either scheme."""
    parents = ParentProxies.parse({"HTTPS_PROXY": "http://p:1", "HTTP_PROXY": "http://q:1"})
    assert [proxy.origin for proxy in parents.all] == ["http://p:1", "http://q:1"]
    assert parents.https is not None
    assert [proxy.origin for proxy in parents.without(parents.https).all] == ["http://q:1"]


@pytest.mark.parametrize("host", ["registry.ollama.ai", "example.com.", "1.1.1.1", "2606:4700::1", "local.example"])
def test_public_by_its_spelling(host: str) -> None:
    """What may be asked of a parent."""
    check_remote(host)


@pytest.mark.parametrize(
    "host",
    [
        *("printer", "localhost", "a.localhost", "printer.LOCAL.", "metadata.google.internal", "nas.home.arpa"),
        *("10.0.0.1", "127.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "fe80::1%eth0"),
        *("127.1", "2130706433", "0x7f.0.0.0x1", "10.0.0.010"),
    ],
)
def test_not_public_by_its_spelling(host: str) -> None:
    """Addresses in all spellings that a resolver may take, and names that mean something inside a network alone."""
    with pytest.raises(AddressRefused):
        check_remote(host)
