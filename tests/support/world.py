"""A client, the cache's machine as its gateway, and an Internet: three network namespaces of one process.

A scenario is a function of a test module that takes a `World`. `play` runs it in a process of its own, whose main
thread is the client; the cache's process and the origin's sockets are made in their own namespaces, and every machine
has its own idea of what names mean. The product reaches the registry as it does in earnest: by name, at port 443.

Invariant: nothing of the machine that runs the tests is touched, and everything ends with the process. Needs root or
user namespaces; where something is missing the test is skipped with its name. Knows nothing of what the product does.
"""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from tests.support.origin import R2_HOST, REGISTRY_HOST, Origin
from tests.support.proxy import PROGRAM, Proxy

Machine = Literal["client", "cache", "internet"]

CLIENT: Final = "10.77.0.2"
CACHE: Final = "10.77.0.1"
REGISTRY: Final = "104.21.75.227"
CDN: Final = "172.64.66.1"
OTHER: Final = "1.1.1.1"
"""Public addresses, as the product and x/transfer demand; they exist in the world only."""
PUBLIC_NAMES: Final = {REGISTRY_HOST: REGISTRY, R2_HOST: CDN, "other.example": OTHER}

_LINKS: Final = f"""
ip netns add client
ip netns add internet
ip link add lan type veth peer name eth0 netns client
ip link add wan type veth peer name eth0 netns internet
ip link set lo up
ip addr add {CACHE}/24 dev lan
ip addr add 198.51.100.1/24 dev wan
ip link set lan up
ip link set wan up
ip -n client link set lo up
ip -n client addr add {CLIENT}/24 dev eth0
ip -n client link set eth0 up
ip -n client route add default via {CACHE}
ip -n internet link set lo up
ip -n internet addr add 198.51.100.2/24 dev eth0
ip -n internet link set eth0 up
ip -n internet addr add {REGISTRY}/32 dev lo
ip -n internet addr add {CDN}/32 dev lo
ip -n internet addr add {OTHER}/32 dev lo
ip route add default via 198.51.100.2
"""
REDIRECT: Final = {
    "nft": """
nft add table inet ollama_cache
nft add chain inet ollama_cache prerouting { type nat hook prerouting priority dstnat; }
nft add rule inet ollama_cache prerouting iifname lan tcp dport { 80, 443 } redirect to :8081
""",
    "iptables": """
iptables -t nat -A PREROUTING -i lan -p tcp -m multiport --dports 80,443 -j REDIRECT --to-ports 8081
""",
}
"""By program, as docs/gateway.md has it."""

_UNSHARE: Final = ("unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
_SKIPPED: Final = 77
"""The exit code of a process that lacks something; its last line says what."""


class Missing(Exception):
    """Something that the scenario needs is not there."""


def play(scenario: "Callable[[World], None]", folder: Path, *, timeout_s: float = 120.0) -> str:
    """Run a module's function in a world of its own; returns its output. Fails with it, or skips."""
    if sys.platform != "linux":
        pytest.skip("needs network namespaces, which only Linux has")
    for program in ("unshare", "mount", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"needs root or user namespaces: {probe.stderr.strip()}")
    name = f"{scenario.__module__}:{scenario.__name__}"
    done = subprocess.run(
        [*_UNSHARE, sys.executable, "-m", "tests.support.world", name, str(folder)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode == _SKIPPED:
        pytest.skip(done.stdout.strip().rpartition("\n")[2])
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


class World:
    """The three machines, with an origin at the registry's and the blob host's own addresses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        # Names of namespaces are files there; the mount is seen by this process and its children only.
        _run("mount -t tmpfs tmpfs /run")
        for line in _LINKS.strip().splitlines():
            _run(line)
        self._hosts = folder / "hosts"
        self.client_hosts({})
        _run(f"mount --bind {self._hosts} /etc/hosts")
        with self.at("internet"):
            self.origin = Origin(folder / "origin", registry=(REGISTRY, 443), cdn=(CDN, 443))
            self.origin.start()

    @contextlib.contextmanager
    def at(self, machine: Machine) -> Iterator[None]:
        """What this thread opens and starts meanwhile is on that machine, and stays there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = self._home if machine == "cache" else os.open(f"/run/netns/{machine}", os.O_RDONLY)
        try:
            os.setns(there, os.CLONE_NEWNET)
            yield
        finally:
            os.setns(before, os.CLONE_NEWNET)
            os.close(before)

    def client_hosts(self, names: Mapping[str, str]) -> None:
        """The client's hosts entries from now on; other names mean what they mean publicly."""
        self._hosts.write_text(_hosts(names))

    def redirect(self) -> None:
        """Have the cache's machine take what it forwards to ports 80 and 443 to port 8081."""
        tool = next((name for name in REDIRECT if shutil.which(name)), None)
        if tool is None:
            raise Missing("needs nft or iptables to redirect connections, found neither")
        with self.at("cache"):
            for line in REDIRECT[tool].strip().splitlines():
                _run(line)

    @contextlib.contextmanager
    def cache(self, *modes: str, hosts: Mapping[str, str] | None = None, **options: Any) -> Iterator[Proxy]:
        """The running cache, in these modes beside the regular one; `hosts` are entries of its own machine."""
        own_hosts = self.folder / "hosts-of-the-cache"
        own_hosts.write_text(_hosts(hosts or {}))
        bind = f'mount --bind {own_hosts} /etc/hosts && exec "$@"'
        chosen = [word for mode in ("regular", *modes) for word in ("--mode", mode)]
        proxy = Proxy(
            self.folder,
            program=("unshare", "--mount", "sh", "-c", bind, "sh", *PROGRAM, *chosen),
            ssl_verify_upstream_trusted_ca=self.origin.ca_file,
            **options,
        )
        with contextlib.ExitStack() as stack:
            with self.at("cache"):
                stack.enter_context(proxy)
            yield proxy

    def close(self) -> None:
        """Stop the origin."""
        self.origin.stop()


def _hosts(names: Mapping[str, str]) -> str:
    pairs = {"localhost": "127.0.0.1", **PUBLIC_NAMES, **names}
    return "".join(f"{address} {name}\n" for name, address in pairs.items())


def _run(line: str) -> None:
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"this system does not let us: {line}: {done.stderr.strip()}")


def main(name: str, folder: Path) -> int:
    """Play the scenario `module:function`; an exit code."""
    module, _, function = name.partition(":")
    scenario = getattr(importlib.import_module(module), function)
    try:
        world = World(folder)
        with contextlib.closing(world), world.at("client"):
            scenario(world)
    except Missing as missing:
        print(missing)
        return _SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
