"""address_policy: which addresses the proxy connects to for others."""

import pytest

from pullthrough.core.errors import AddressRefused, LoopDetected
from pullthrough.net.address_policy import AddressPolicy, check_address, check_elsewhere

POLICY = AddressPolicy(frozenset({("registry.ollama.ai", 443), ("localhost", 8443)}), tunnels=True)


@pytest.mark.parametrize("address", ["104.21.75.227", "2606:4700::6812:1", "1.1.1.1"])
def test_public_addresses_pass(address: str) -> None:
    """The Internet may be reached."""
    check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("127.0.0.1", id="loopback"),
        pytest.param("::1", id="loopback v6"),
        pytest.param("10.1.2.3", id="private"),
        pytest.param("192.168.1.1", id="private"),
        pytest.param("172.16.0.1", id="private"),
        pytest.param("169.254.169.254", id="cloud metadata"),
        pytest.param("168.63.129.16", id="azure wire server"),
        pytest.param("100.64.0.1", id="shared address space"),
        pytest.param("198.18.0.1", id="benchmarking"),
        pytest.param("0.0.0.0", id="unspecified"),
        pytest.param("::", id="unspecified v6"),
        pytest.param("224.0.0.1", id="multicast"),
        pytest.param("ff02::1", id="multicast v6"),
        pytest.param("255.255.255.255", id="broadcast"),
        pytest.param("fe80::1", id="link-local"),
        pytest.param("fe80::1%eth0", id="link-local with zone"),
        pytest.param("fc00::1", id="unique local"),
        pytest.param("fec0::1", id="site-local"),
        pytest.param("::ffff:127.0.0.1", id="mapped loopback"),
        pytest.param("::ffff:10.0.0.1", id="mapped private"),
        pytest.param("64:ff9b::7f00:1", id="NAT64 loopback"),
        pytest.param("64:ff9b::a00:1", id="NAT64 private"),
        pytest.param("64:ff9b:1::a00:1", id="local NAT64"),
        pytest.param("2002:7f00:1::1", id="6to4 loopback"),
        pytest.param("2002:c0a8:101::1", id="6to4 private"),
        pytest.param("2001:db8::1", id="documentation"),
        pytest.param("example", id="no address"),
    ],
)
def test_other_addresses_are_refused(address: str) -> None:
    """No door into the network the cache stands in."""
    with pytest.raises(AddressRefused):
        check_address(address)


def test_own_address_is_refused() -> None:
    """A public address of this very machine is no public service."""
    with pytest.raises(AddressRefused, match="our own"):
        check_address("1.1.1.1", own={"1.1.1.1"})
    with pytest.raises(AddressRefused, match="our own"):
        check_address("::ffff:1.1.1.1", own={"1.1.1.1"})


def test_one_bad_address_refuses_the_name() -> None:
    """A name that leads both ways is rebinding; of a good one each address may be connected to."""
    assert POLICY.judge(["1.1.1.1", "1.0.0.1", "1.1.1.1"]) == ("1.1.1.1", "1.0.0.1")
    with pytest.raises(AddressRefused):
        POLICY.judge(["1.1.1.1", "10.0.0.1"])
    with pytest.raises(AddressRefused, match="got none"):
        POLICY.judge([])


@pytest.mark.parametrize("address", ["100.64.0.1", "100.127.255.254", "::ffff:100.100.100.100", "64:ff9b::6464:6464"])
def test_shared_addresses_are_named(address: str) -> None:
    """A refusal of what Tailscale or a carrier has given says so."""
    with pytest.raises(AddressRefused, match=r"RFC 6598: of a carrier, or of Tailscale"):
        check_address(address)
    check_address("100.63.255.255")
    check_address("100.128.0.0")


@pytest.mark.parametrize("address", ["127.0.1.1", "::1", "10.0.0.2", "::ffff:10.0.0.2"])
def test_a_name_that_leads_back(address: str) -> None:
    """A registry whose name leads to this machine is named together with the mend."""
    check_elsewhere("registry.example", ["10.0.0.3", "1.1.1.1"], own={"10.0.0.2"})
    with pytest.raises(LoopDetected, match="on another machine, got our own"):
        check_elsewhere("registry.example", ["1.1.1.1", address], own={"10.0.0.2"})


def test_ports() -> None:
    """Tunnels to 443, plain HTTP to 80."""
    POLICY.check_port(443, encrypted=True)
    POLICY.check_port(80, encrypted=False)
    for port, encrypted in ((22, True), (80, True), (443, False), (8080, False)):
        with pytest.raises(AddressRefused, match=f"port {port} is not passed on"):
            POLICY.check_port(port, encrypted=encrypted)
    with pytest.raises(AddressRefused, match="tunnel=none"):
        AddressPolicy(frozenset(), tunnels=False).check_port(443, encrypted=True)


def test_exemptions_are_exact() -> None:
    """Host and port together, in any case; nothing that merely looks alike."""
    assert POLICY.is_exempt("Registry.Ollama.AI.", 443)
    assert POLICY.is_exempt("localhost", 8443)
    assert not POLICY.is_exempt("localhost", 443)
    assert not POLICY.is_exempt("x.registry.ollama.ai", 443)
