"""What answers in a registry's place (a captive portal, a web filter, a gateway), as last seen.

Invariant: an answer that `judged` hands on has the form of a registry's. What is remembered and logged is a status, a
media type and a length, and nothing of a page's text.
"""

import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from multidict import CIMultiDict
from yarl import URL

from pullthrough.core.access_log import SHOWN
from pullthrough.core.errors import Disagreement, NotTheRegistry
from pullthrough.upstream.data_stream import Errors, join
from pullthrough.upstream.reachability import Reachability
from pullthrough.upstream.refusals import described, is_page, is_refusal

_log = logging.getLogger(__name__)

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
HEAD_UNKNOWN: Final = frozenset({405, 501})
"""What a server may answer to HEAD although it answers GET."""
TOO_MANY_REQUESTS: Final = 429
_NOT_IMPLEMENTED: Final = 501
LOGGED_S: Final = 600.0
"""How often a line about the same kind of trouble is logged."""
KINDS: Final = 256
"""How many kinds are remembered with the time of their last line."""


@dataclass(frozen=True, slots=True)
class Response:
    """A control-plane response, its body decoded and its fields clean."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that answered in a registry's place."""

    when: float
    """Unix seconds."""
    what: str
    """Status and media type, or what did not agree."""


class Impostors:
    """What last answered in place of each registry, forgotten once the registry itself answers."""

    def __init__(self, registries: Collection[str], errors: Errors, reachability: Reachability) -> None:
        """`reachability` is told whether each answer came from the registry or from an impostor."""
        self.seen: dict[str, Trouble] = {}
        """By the registry's name."""
        self._registries = registries
        self._errors = errors
        self._reachability = reachability
        self._logged: dict[tuple[str, str], float] = {}

    @property
    def told(self) -> list[str]:
        """A line for each registry, for people."""
        return [f"something else answers in the place of {host}: {trouble.what}" for host, trouble in self.seen.items()]

    def judged(self, host: str, response: Response, *, head: bool = False) -> Response:
        """Return the response if it is the registry's own. Raises NotTheRegistry otherwise.

        429 and 5xx mean "not now" whoever sends them; their body is dropped unless it is the registry's. What something
        else answers to a HEAD is not remembered: a GET will tell.
        """
        status, fields = response.status, response.headers
        if status >= 400 and not is_refusal(status, fields, response.body, head=head):
            what = described(status, fields)
            waits = status == TOO_MANY_REQUESTS or status >= 500
            if head and (not waits or status == _NOT_IMPLEMENTED):
                raise NotTheRegistry(f"expected an answer of {host} to HEAD, got {what}")
            if not waits:
                raise self.displaced(host, what)
            self._remember(host, what)
            fields.pop("Content-Type", None)
            return replace(response, body=b"")
        leaves = status in REDIRECTS and not self._stays(host, fields.get("Location", ""))
        if is_page(fields) or (leaves and not head):
            raise self.displaced(host, described(status, fields))
        self.seen.pop(host, None)
        self._reachability.answered(host, status)
        return response

    def unjudged(self, host: str, response: Response) -> Response:
        """Return an answer that has no form to recognise a registry by. Any but a page shows that the host answers."""
        if not is_page(response.headers):
            self._reachability.answered(host, response.status)
        return response

    def displaced(self, host: str, what: str) -> NotTheRegistry:
        """Remember and count an answer that is not the registry's, and return the error for it."""
        self._remember(host, what)
        self._errors[NotTheRegistry] += 1
        return NotTheRegistry(f"something else answered in the place of {host}: {what}")

    def disagreeing(self, host: str, what: str, detail: str) -> Disagreement:
        """Remember and count an answer that contradicts what is known of the blob, and return the error for it.

        `what` is the kind of contradiction, which is remembered; `detail` is for this one message.
        """
        self._remember(host, what)
        self._errors[Disagreement] += 1
        return Disagreement(f"what {host} answers does not agree with what is known of the blob: {what}, {detail}")

    def _remember(self, host: str, what: str) -> None:
        now = time.time()
        self.seen[host] = Trouble(now, what)
        self._reachability.failed(host, f"something else answers in its place: {what}")
        logged = self._logged.pop((host, what), -math.inf)
        is_new = not 0 <= now - logged < LOGGED_S
        self._logged[host, what] = now if is_new else logged
        if len(self._logged) > KINDS:
            del self._logged[next(iter(self._logged))]
        if is_new:
            said = "%s: something else answered in the registry's place (%s); it proves nothing"
            _log.warning(said, host, what, extra=SHOWN)

    def _stays(self, host: str, location: str) -> bool:
        """Return whether a redirect leads back to the registry, or to another configured one."""
        there = URL(join(f"https://{host}", location), encoded=True)
        return there.scheme == "https" and there.host in (host, *self._registries)
