"""What all tests share: hypothesis profiles, and a guard that keeps every connection of the suite on loopback.

And where the files of a run lie.
"""

import ipaddress
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings

from pullthrough.runtime import whereabouts
from tests import doctor_faults, lies, security
from tests.faults import lines
from tests.gotchas import GOTCHAS, shown

settings.register_profile(
    "fast", max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

MEMORY: Final = Path("/dev/shm")
ROOM: Final = 4 << 30
"""Many times what the quick tests have on a disk at one time."""


def pytest_configure(config: pytest.Config) -> None:
    """Put the files of a quick run into memory, where it has the room: what they wait for is mostly the disk."""
    if config.option.markexpr == "not long" and "PYTEST_DEBUG_TEMPROOT" not in os.environ and is_roomy(MEMORY):
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)
    # A shell starts with Ctrl-C ignored what it puts into the background, and so would be what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run one worker more than there are processors: half of a test's time is waiting."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


def is_roomy(folder: Path) -> bool:
    """Whether a run may have its files there; some of them are programs."""
    try:
        runs_programs = not os.statvfs(folder).f_flag & os.ST_NOEXEC
        return runs_programs and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= ROOM
    except (AttributeError, OSError):
        # Only Linux has such a folder.
        return False


@pytest.fixture(autouse=True)
def only_own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A command that a test calls in its own process does not find the caches of other tests, nor this machine's."""
    nowhere = tmp_path_factory.getbasetemp() / "nowhere"
    monkeypatch.setattr(whereabouts, "SYSTEM", nowhere)
    monkeypatch.setattr(whereabouts, "SHARED", nowhere)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection of the test process to any other machine is an error."""
    for name in ("connect", "connect_ex"):
        connect = getattr(socket.socket, name)

        def guarded(sock: socket.socket, address: Any, connect: Any = connect) -> Any:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                host = ipaddress.ip_address(address[0])
                if not host.is_loopback:
                    raise AssertionError(f"expected a loopback address, got {address}")
            return connect(sock, address)

        monkeypatch.setattr(socket.socket, name, guarded)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix, the troubles and who gets what as far as they were run, the traps if all of them were."""
    reports = [
        report
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.getreports(outcome)
        if isinstance(report, pytest.TestReport)
    ]
    cells: dict[str, dict[str, str]] = {}
    ratios: dict[str, dict[str, str]] = {}
    lied: dict[str, dict[str, str]] = {}
    outcomes: dict[str, str] = {}
    answered: dict[security.Cell, int] = {}
    found: dict[tuple[str, str], str] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "matrix":
                client, state, word = value
                cells.setdefault(client, {})[state] = word if report.passed else report.outcome
            if name == "fault":
                trouble, situation, ratio = value
                ratios.setdefault(trouble, {})[situation] = f"{ratio:.3f}" + ("" if report.passed else " failed")
            if name == "lies":
                scene, walked = value
                lied[scene] = walked
            if name == "doctor":
                side, fault = value
                found[side, fault] = report.outcome
            if name == "security":
                answered.update((security.Cell(*cell), status) for cell, status in value)
        name = report.nodeid.removeprefix("tests/").partition("[")[0]
        if outcomes.get(name) != "failed":
            outcomes[name] = report.outcome
    if cells:
        states = list(dict.fromkeys(state for row in cells.values() for state in row))
        states.sort(key=["cold", "warm", "offline", "resumed", "concurrent"].index)
        width = max(map(len, cells))
        terminalreporter.section("compatibility")
        terminalreporter.write_line(f"{'':{width}}  " + "".join(f"{state:11}" for state in states))
        for client in sorted(cells):
            row = "".join(f"{cells[client].get(state, '-'):11}" for state in states)
            terminalreporter.write_line(f"{client:{width}}  {row}")
    if ratios:
        terminalreporter.section("upstream bytes / blob")
        for line in lines(ratios):
            terminalreporter.write_line(line)
    if lied:
        terminalreporter.section("lies that were walked and not believed")
        for line in lies.lines(lied):
            terminalreporter.write_line(line)
    if found:
        terminalreporter.section("what the doctor finds")
        for line in doctor_faults.lines(found):
            terminalreporter.write_line(line)
    if answered:
        terminalreporter.section(f"who gets what: {', '.join(security.CALLERS)}")
        for line in security.lines(answered):
            terminalreporter.write_line(line)
    if all(any(test in outcomes for test in gotcha.tests) for gotcha in GOTCHAS if gotcha.tests):
        terminalreporter.section("a cache must")
        for number, must, proof in shown(outcomes):
            terminalreporter.write_line(f"{number:2} {must}: {proof}")
