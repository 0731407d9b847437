"""The first of a name's addresses to answer, so that nobody waits for a dead one (RFC 8305).

Invariant: only the given addresses are tried, and no byte is sent to them.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

DELAY_S: Final = 0.25
"""How long an address has before the next is tried, too (RFC 8305 section 5: "Connection Attempt Delay")."""
TIMEOUT_S: Final = 10.0


async def first_to_answer(
    addresses: Iterable[str], port: int, *, delay_s: float = DELAY_S, timeout_s: float = TIMEOUT_S
) -> str | None:
    """Return the first address that accepts a TCP connection, which is closed again; None if none does in time."""
    trials: set[asyncio.Task[str]] = set()
    waiting = interleaved(list(addresses), version_of)
    loop = asyncio.get_running_loop()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while waiting or trials:
                    if waiting:
                        trials.add(loop.create_task(_try(waiting.pop(0), port), name="try an address"))
                    done, trials = await asyncio.wait(
                        trials, timeout=delay_s if waiting else None, return_when=asyncio.FIRST_COMPLETED
                    )
                    for trial in done:
                        if trial.exception() is None:
                            return trial.result()
    finally:
        for trial in trials:
            trial.cancel()
        await asyncio.gather(*trials, return_exceptions=True)
    return None


def interleaved[T](found: Sequence[T], family: Callable[[T], object]) -> list[T]:
    """Return the addresses with their families alternating, beginning with the first one's (RFC 8305 section 4)."""
    first = [each for each in found if family(each) == family(found[0])]
    others = [each for each in found if family(each) != family(found[0])]
    return [each for pair in itertools.zip_longest(first, others) for each in pair if each is not None]


async def _try(address: str, port: int) -> str:
    """Connect, and close again. Raises OSError."""
    family = socket.AF_INET if version_of(address) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    return address


def version_of(address: str) -> int:
    """Return 4 or 6."""
    return ipaddress.ip_address(address.partition("%")[0]).version
