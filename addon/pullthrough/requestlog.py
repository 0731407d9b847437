"""One line per answered request, the same whichever port it came to.

Invariant: query strings are cut: they may be capabilities. Knows what a line looks like and nothing of how it came
about.
"""

import logging

_log = logging.getLogger(__name__)


def log_answer(client: str, method: str, target: str, status: int, cache: str) -> None:
    """A request that was answered at once."""
    _log.info("%s %s %s -> %d %s", client, method, _path(target), status, cache)


def log_transfer(
    client: str, method: str, target: str, status: int, cache: str, *, sent: int, seconds: float, problem: str
) -> None:
    """A body has been sent; `problem` is why it ended before its time, "" if it did not."""
    short = f", short: {problem}" if problem else ""
    _log.info(
        "%s %s %s -> %d, %d bytes in %.2f s%s; %s",
        client,
        method,
        _path(target),
        status,
        sent,
        seconds,
        short,
        cache,
    )


def _path(target: str) -> str:
    return target.partition("?")[0]
