"""Clients come, go, give up and come back while the source misbehaves: for a minute, or for SOAK_S seconds."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import MB, Model, add_model, unique
from tests.e2e.test_pull import assert_complete
from tests.support.a2 import A2Client
from tests.support.goclient import Aborted
from tests.support.origin import Fault, Mode, Origin
from tests.support.proxy import Proxy

SECONDS = float(os.environ.get("SOAK_S", "60"))
CLIENTS = 5
SETTLE_S = 45.0
"""Longer than a recording that everybody has left stays open."""

BRIEF_S = 4.0


def open_files(proxy: Proxy) -> int:
    return len(list(Path(f"/proc/{proxy.pid}/fd").iterdir()))


def threads(proxy: Proxy) -> int:
    return len(list(Path(f"/proc/{proxy.pid}/task").iterdir()))


def tasks(proxy: Proxy) -> list[str]:
    """What recordings and readers have running, by the dump that mitmproxy makes on SIGUSR1."""
    proxy.forget_lines()
    os.kill(proxy.pid, signal.SIGUSR1)
    proxy.wait_for_line("Tasks")
    proxy.wait_for_line("*" * 40, count=2)
    dump = "\n".join(proxy.output)
    section = dump[dump.rindex("\nTasks\n") :]
    assert "renew leaves" in section, section
    ours = re.compile(r"\b(?:begin|hash|flush|fetch|close|relay|obtain source|collapsed)\b")
    return [line for line in section.splitlines() if ours.search(line)]


def wait_until(claim: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in that time."""
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.5)
    return claim()


@pytest.mark.timeout(SECONDS + 180)
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("seconds", [BRIEF_S, pytest.param(SECONDS, marks=pytest.mark.long)], ids=["brief", "long"])
def test_soak(
    origin: Origin,
    start_proxy: Callable[..., Proxy],
    new_client: Callable[..., A2Client],
    tmp_path: Path,
    seconds: float,
) -> None:
    """No wrong byte, no pull that fails, and afterwards no more files, threads or memory than before."""
    proxy = start_proxy()
    chance = random.Random(1)
    models = [add_model(origin, unique(chance.randrange(MB, 8 * MB))) for _ in range(4)]
    origin.rate_per_connection = 4 * MB
    for model in models[:1]:
        new_client(proxy).pull(model.name)
        proxy.wait_for_line(model.recorded)
    files, begun = open_files(proxy), time.monotonic()
    problems: list[str] = []
    counts = {"pulls": 0, "aborts": 0, "faults": 0}
    early_mib: list[float] = []

    def faults(layer: str) -> Fault:
        mode = chance.choice([Mode.RESET, Mode.TRUNCATE, Mode.DROP, Mode.STATUS, Mode.CONTENT_RANGE, Mode.NO_LENGTH])
        options = {"status": chance.choice([429, 500, 503])} if mode is Mode.STATUS else {}
        if mode in (Mode.RESET, Mode.TRUNCATE):
            options = {"after": chance.randrange(200_000)}
        return Fault(mode, digest=layer, times=chance.randrange(1, 4), **options)

    def live(number: int) -> None:
        own = random.Random(number)
        while time.monotonic() - begun < seconds and not problems:
            try:
                if own.random() < 0.3:
                    models[own.randrange(len(models))] = add_model(origin, unique(own.randrange(MB, 8 * MB)))
                model: Model = own.choice(models)
                if own.random() < 0.5:
                    origin.faults.append(faults(model.layer))
                    del origin.faults[:-20]
                    counts["faults"] += 1
                folder = tmp_path / f"soak{number}-{counts['pulls']}-{counts['aborts']}-{own.random()}"
                if own.random() < 0.4:
                    with_abort = new_client(proxy, directory=folder, abort_after=own.randrange(1, MB))
                    try:
                        with_abort.pull(model.name)
                    except Aborted:
                        counts["aborts"] += 1
                client = new_client(proxy, directory=folder)
                client.pull(model.name)
                assert_complete(client, model)
                client.blob_path(model.layer).unlink()
                counts["pulls"] += 1
            except Exception as error:
                problems.append(f"client {number}: {error!r}")

    workers = [threading.Thread(target=live, args=(number,)) for number in range(CLIENTS)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.5)
        if time.monotonic() - begun > 0.75 * seconds and not early_mib:
            early_mib.append(proxy.rss_mib())
    for worker in workers:
        worker.join()
    assert problems == []
    assert counts["pulls"] > seconds / 10
    assert counts["aborts"] > 0
    assert counts["faults"] > 0
    if seconds == BRIEF_S:
        return
    assert proxy.rss_mib() - early_mib[0] < 20
    assert wait_until(lambda: open_files(proxy) <= files + 2, SETTLE_S), (
        f"{files} files before, {open_files(proxy)} now"
    )
    assert tasks(proxy) == []
    # Pools of disk and hash threads, SQLite's writer and the resolver's are made once and stay; those that ask end.
    assert wait_until(lambda: threads(proxy) <= 24, SETTLE_S), f"{threads(proxy)} threads"
    print(counts, f"{early_mib[0]:.0f} MiB, {proxy.rss_mib():.0f} MiB, {threads(proxy)} threads")
