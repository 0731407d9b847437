"""The log for programs: what a pull leaves in it."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import MB, add_model, to_registry, unique
from tests.support.a2 import A2Client
from tests.support.origin import Origin
from tests.support.proxy import Proxy


@pytest.mark.long
def test_json(origin: Origin, start_proxy: Callable[..., Proxy], new_client: Callable[..., A2Client]) -> None:
    """Each line is an object, each request and recording has one, with the same fields; no secret is in any."""
    proxy = start_proxy(ollama_cache_log="json")
    model = add_model(origin, unique(2 * MB))
    new_client(proxy).pull(model.name)
    with to_registry(proxy) as connection:
        connection.request("POST", "/v2/library/x/blobs/uploads/?secret=1", [("Authorization", "Bearer secret")]).read()
    for blob in model.blobs:
        proxy.wait_for_line(f'"recorded {blob[7:19]}')
    proxy.stop()
    lines: list[dict[str, Any]] = [json.loads(line) for line in proxy.output if "Loading script" not in line]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    requests = [line for line in lines if line.get("event") == "request"]
    kinds = [(line["method"], re.split("/[^/]*$", line["path"])[0].rpartition("/")[2]) for line in requests]
    assert kinds.count(("GET", "manifests")) == 1
    assert kinds.count(("HEAD", "blobs")) == kinds.count(("GET", "blobs")) == len(model.blobs)
    assert kinds.count(("POST", "uploads")) == 1
    common = {"client", "method", "path", "status", "outcome", "cache_status"}
    assert all(common <= line.keys() for line in requests)
    bodies = [line for line in requests if "bytes" in line]
    assert sum(line["bytes"] for line in bodies) == 2 * MB + origin.blob(model.config).size
    assert all(line["problem"] == "" and line["seconds"] >= 0 for line in bodies)
    recordings = {line["digest"]: line for line in lines if line.get("event") == "recording"}
    assert recordings.keys() == set(model.blobs)
    layer = recordings[model.layer]
    assert (layer["result"], layer["bytes"], layer["fetched"], layer["problem"]) == ("stored", 2 * MB, 2 * MB, "")
    assert not [line for line in proxy.output if "secret" in line or "access=" in line or "X-Amz-" in line]


def test_debug(start_proxy: Callable[..., Proxy]) -> None:
    """What only a developer wants to read comes when it is asked for, and mitmproxy's own does not come with it."""
    for level in ("debug", "info"):
        proxy = start_proxy(ollama_cache_log_level=level)
        proxy.stop()
        assert any("event loop lag: " in line for line in proxy.output) == (level == "debug")
        assert not [line for line in proxy.output if "asyncio" in line or "selector" in line]
