"""What the cache tells of itself is true: whether it can fetch, since when not and why, wherever one looks."""

import html
import re
import time
from collections.abc import Callable
from pathlib import Path

from pullthrough.core.humanize import size_text
from pullthrough.core.records import Name
from tests.e2e.conftest import MB, add_model, get, unique
from tests.e2e.test_cli import told
from tests.e2e.test_front import to_front
from tests.support.a2 import A2Client
from tests.support.origin import R2_HOST, REGISTRY_HOST, Origin
from tests.support.proxy import Proxy

SERVICES = {REGISTRY_HOST: "registry", R2_HOST: "blob host"}


def read(proxy: Proxy, target: str) -> tuple[int, str]:
    """The status of a page, and what a reader sees."""
    with to_front(proxy) as connection:
        status, _, body = get(connection, target)
    return status, html.unescape(re.sub("<[^>]*>", "", body.decode()))


def views(proxy: Proxy, state: str) -> list[str]:
    """Check that every place tells this state of both servers; the lines of it, which are the same everywhere."""
    status, ready = read(proxy, "/readyz")
    serving, fetching, *lines = ready.splitlines()
    up = state == "up"
    # What is stored is served, whatever upstream does.
    assert (status, serving, fetching) == (200, "serving: yes", f"fetching: {'yes' if up else 'no'}")
    assert [line.partition(f": {state} since ")[0] for line in lines] == [f"{r} {h}" for h, r in SERVICES.items()]
    deadline = time.monotonic() + 20
    # The page is looked at once a second for all who watch.
    while ("Health ready" in (page := read(proxy, "/")[1])) is not up and time.monotonic() < deadline:
        pass
    _, metrics = read(proxy, "/metrics")
    sums = told(proxy, "stats")
    assert ("Health ready" in page, "fetching the rest: no" in page) == (up, not up)
    assert sums["fetching"] == ("yes" if up else "no")
    for line, service in zip(lines, sums["services"], strict=True):
        assert line in page
        role, host = service["role"], service["host"]
        assert (SERVICES[host], service["state"], service["why"] in line) == (role, state, True)
        assert f'ollama_cache_upstream_up{{host="{host}",service="{role}"}} {float(up)}' in metrics
    return lines


def test_a_registry_that_is_down(origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """It is seen at the first look although nobody has pulled, and is up again with the first pull."""
    origin.stop()
    proxy = start_proxy(front=True)
    for line in views(proxy, "down"):
        assert re.search(r" since 20..-..-.. ..:..:.. UTC, localhost:\d+: Connection refused$", line)
    origin.start()
    model = add_model(origin, unique(MB))
    A2Client(proxy.url, proxy.ca_file, tmp_path / "first").pull(model.name)
    views(proxy, "up")
    assert any("registry registry.ollama.ai is up again" in line for line in proxy.output)
    deadline = time.monotonic() + 20
    while "registry registry.ollama.ai is up again, after" not in read(proxy, "/")[1]:
        assert time.monotonic() < deadline, "expected it among the events of the page"


def test_a_line_for_each_pull(origin: Origin, start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    """Who, which model, how much, from where and how long: one line for all parts of one client, logged and shown."""
    proxy = start_proxy(front=True)
    model = add_model(origin, unique(8 * MB))
    size = 8 * MB + origin.blob(model.config).size
    for name, source in (("cold", "upstream"), ("warm", "the cache")):
        proxy.forget_lines()
        A2Client(proxy.url, proxy.ca_file, tmp_path / name, min_part=MB // 2, max_part=MB // 2).pull(model.name)
        typed = Name.parse(str(model.name)).typed
        line = proxy.wait_for_line(f"127.0.0.1 pulled {typed}: ")
        assert re.search(rf": {re.escape(size_text(size))} from {source} in \d+\.\d s$", line)
        requests = [text for text in proxy.output if f"{model.layer[7:]}/data -> 206" in text]
        assert len(requests) >= 16
    assert len([text for text in proxy.output if " pulled " in text]) == 2
    deadline = time.monotonic() + 20
    while (page := read(proxy, "/")[1]).count(f"{typed}\n127.0.0.1\n") != 2 and time.monotonic() < deadline:
        pass
    assert re.search(r"\sfrom the cache\s", page) and re.search(r"\sfrom upstream\s", page)
