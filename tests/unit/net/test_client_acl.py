"""client_acl: who may read what."""

import ipaddress
from itertools import product

import pytest

from pullthrough.core.digest import Digest
from pullthrough.net.address_policy import SHARED
from pullthrough.net.client_acl import ClientPolicy, Decision, Evidence, Vouchers, credential_key, decide, is_shared

DIGEST = Digest("ab" * 32)


@pytest.mark.parametrize(("public", "listed", "vouched"), list(product((False, True), repeat=3)))
def test_decision_table(public: bool, listed: bool, vouched: bool) -> None:
    """A listing proves nothing about a private blob, nor publicness anything about a repository."""
    granted = decide(Evidence(public=public, listed=listed, vouched=vouched)) is Decision.GRANT
    assert granted == (vouched or (public and listed))


def test_vouchers_expire_and_are_personal() -> None:
    """Upstream's yes is for one credential, one pair and a minute."""
    vouchers = Vouchers(lifetime_s=60)
    mine, yours = credential_key("Bearer a"), credential_key("Bearer b")
    vouchers.add(mine, "host", "repo", DIGEST, now=0)
    assert vouchers.holds(mine, "host", "repo", DIGEST, now=59)
    assert not vouchers.holds(mine, "host", "repo", DIGEST, now=60)
    assert not vouchers.holds(yours, "host", "repo", DIGEST, now=1)
    assert not vouchers.holds(mine, "host", "other", DIGEST, now=1)
    assert not vouchers.holds(mine, "other", "repo", DIGEST, now=1)
    assert not vouchers.holds(mine, "host", "repo", Digest("cd" * 32), now=1)


def test_vouchers_are_bounded() -> None:
    """The oldest are forgotten first; the latest one counts always."""
    vouchers = Vouchers(lifetime_s=60, limit=3)
    keys = [credential_key(str(number)) for number in range(5)]
    for second, key in enumerate(keys):
        vouchers.add(key, "host", "repo", DIGEST, now=second)
    assert [vouchers.holds(key, "host", "repo", DIGEST, now=5) for key in keys] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("peer", "admitted"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("192.168.7.7", True),
        ("10.0.0.1", True),
        ("172.31.255.255", True),
        ("172.32.0.0", False),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("::ffff:192.168.0.1", True),
        ("203.0.113.9", True),
        ("203.0.114.9", False),
        ("1.1.1.1", False),
        ("2606:4700::1", False),
        ("nonsense", False),
    ],
)
def test_default_clients(peer: str, admitted: bool) -> None:
    """Private ranges, loopback and the networks that this machine is on."""
    policy = ClientPolicy(("private", "local"))
    assert policy.admits(peer, local=(ipaddress.ip_network("203.0.113.0/24"),)) is admitted


def test_networks_of_this_machine_count_where_they_are_named() -> None:
    """Only with the word `local`, and only as long as they are given."""
    here = (ipaddress.ip_network("203.0.113.0/24"), ipaddress.ip_network("2001:db8::/64"))
    assert ClientPolicy(("local",)).admits("2001:db8::7", local=here)
    assert not ClientPolicy(("local",)).admits("2001:db8::7")
    assert not ClientPolicy(("private",)).admits("203.0.113.9", local=here)


def test_shared_addresses_are_admitted_by_number_only() -> None:
    """What Tailscale gives, a carrier gives to strangers: neither word covers it."""
    assert not ClientPolicy(("private", "local")).admits("100.101.102.103")
    assert ClientPolicy((SHARED,)).admits("100.101.102.103")
    assert [is_shared(peer) for peer in ("100.64.0.1", "::ffff:100.127.0.1", "100.128.0.1", "fd7a::1", "x")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_client_networks_and_any() -> None:
    """A list admits what it lists, `any` everybody."""
    policy = ClientPolicy((ipaddress.ip_network("192.0.2.0/25"),))
    assert (policy.admits("192.0.2.1"), policy.admits("192.0.2.200"), policy.admits("127.0.0.1")) == (
        True,
        False,
        False,
    )
    assert ClientPolicy(("any",)).admits("1.1.1.1")
