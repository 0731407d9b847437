"""Our own HTTP client towards registries and blob sources.

Invariant: every address that the client connects to is configured or public; every data response handed on has been
checked against the request (status, Content-Range, complete length, validator, encoding). Signed addresses and
credentials stay in memory and out of every message.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

import certifi
from yarl import URL

from pullthrough.config.parsers import is_address
from pullthrough.config.settings import Endpoint, Settings
from pullthrough.core.cdn_loop import CDN_LOOP, LoopGuard
from pullthrough.core.digest import Digest
from pullthrough.core.errors import (
    AddressRefused,
    Offline,
    SourceExpired,
    UnexpectedResponse,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    ValidatorChanged,
)
from pullthrough.core.fields import cleaned
from pullthrough.core.ranges import format_range
from pullthrough.net.address_policy import AddressPolicy, check_address
from pullthrough.net.proxy_env import ParentProxies, check_remote
from pullthrough.upstream.content_coding import decode
from pullthrough.upstream.data_client import Ask, DataResponse, Getting
from pullthrough.upstream.data_stream import (
    DataStream,
    Errors,
    Source,
    closing_on_error,
)
from pullthrough.upstream.dialer import CONNECT_S, Dialer
from pullthrough.upstream.impostors import REDIRECTS, TOO_MANY_REQUESTS, Impostors, Response
from pullthrough.upstream.reachability import OBJECT_STORE, Reachability
from pullthrough.upstream.refusals import REFUSAL_LIMIT, described, is_page, is_refusal
from pullthrough.upstream.resolver import AddressRules, Named
from pullthrough.upstream.response_checks import SOURCE_GONE, check_data, check_length, relayable

CONNECTIONS_PER_HOST: Final = 32
MAX_CONTROL_BODY: Final = 8 << 20
"""A manifest of a tensor model with 1000+ layers takes about 300 KiB."""

STALL_TIMEOUT_S: Final = 10.0
"""Half the time that the least patient clients in use wait for a byte would be 2.5 s, but a slow line needs more. Only
once a stalled slice is given up do other connections fetch it for the clients that wait behind it."""

PAUSES_S: Final = (0.1, 0.4)
"""Before the second and the third try of a control-plane request."""

DEADLINE_S: Final = 20.0
"""For all the work of one control-plane request, retries included: Ollama's probe gives up after 30 s."""

DENIED: Final = frozenset({401, 403, 404})
"""A registry's answers for "there is no such thing" and "not for you"."""

PRIVATE: Final = frozenset({401, 403})
"""The subset of DENIED that cannot mean that nothing is there."""

LOOP_DETECTED: Final = 508
"""A cache's answer to a request that it has seen before (RFC 5842 section 7.2): a retry would get the same."""

MAX_HOPS: Final = 5

_log = logging.getLogger(__name__)


class Upstream:
    """The client. `open` it inside the running loop, `close` it at the end."""

    def __init__(
        self,
        settings: Settings,
        *,
        trusted_ca: str | None = None,
        own_addresses: Callable[[], Collection[str]] = frozenset,
        own_ports: Callable[[], Collection[int]] = frozenset,
        parents: ParentProxies = ParentProxies(),  # noqa: B008 -- frozen
    ) -> None:
        """`trusted_ca` is a PEM file that replaces certifi's; `own_addresses` are this machine's, `own_ports` ours."""
        self.loop = LoopGuard(f"ollama-cache-{secrets.token_hex(8)}")
        self.errors = Errors()
        self._settings = settings
        self._parents = parents
        ways_out = {(proxy.host, proxy.port) for proxy in parents.all}
        self._policy = AddressPolicy(settings.named_hosts | ways_out, tunnels=True)
        self._own = own_addresses
        self._named = Named({(endpoint.host, endpoint.port) for endpoint in settings.upstream.values()})
        self._context = ssl.create_default_context(cafile=trusted_ca or certifi.where())
        self._is_open = False
        self._near: set[tuple[str, int]] = set()
        self._rules = AddressRules(
            self._policy, settings.intercepted, own_addresses, own_ports, self._named, self._near
        )
        self.dialer = Dialer(self._context, self._rules, parents, self.loop)
        """Opens connections for threads, under the same rules."""
        self._slots: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(CONNECTIONS_PER_HOST))
        self._down_until: dict[str, float] = {}
        self._control, self._data = Getting(self.dialer), Getting(self.dialer)
        self.reachability = Reachability(settings)
        self.impostors = Impostors(settings.registries, self.errors, self.reachability)

    async def open(self) -> None:
        """Allow requests."""
        self._is_open = True
        for getting in (self._control, self._data):
            getting.open()

    async def close(self) -> None:
        """Refuse further requests and close the idle connections."""
        self._is_open = False
        for getting in (self._control, self._data):
            getting.close()

    # --- whether a registry answers at all

    def down_until(self, host: str) -> float:
        """Return until when (monotonic seconds) the registry counts as down; 0 if it does not."""
        return self._down_until.get(host, 0.0)

    def is_up(self, host: str) -> bool:
        """Return whether the registry counts as up."""
        return self.down_until(host) <= time.monotonic()

    def mark_down(self, host: str, seconds: float) -> None:
        self._down_until[host] = time.monotonic() + seconds

    def admit(self, host: str, port: int) -> None:
        """Let a host of the fleet have any address; the option `offline` does not apply to it."""
        self._near.add((host, port))

    def slot(self, source: Source) -> asyncio.Semaphore:
        """Return the semaphore of the source's host, which all recordings share: first come, first served."""
        return self._slots[source.host]

    # --- control plane

    async def ask(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        """Send one request to a registry and return the response; redirects are handed on, not followed.

        Raises NotTheRegistry if the response does not look like a registry's, else as `converse` does.
        """
        response = await self._exchange(method, host, target, headers, timeout_s=timeout_s)
        return self.impostors.judged(host, response, head=method == "HEAD")

    async def converse(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        """Do what `ask` does for requests whose answers have no form to recognise a registry by.

        Raises UpstreamUnreachable, UpstreamTimeout or UnexpectedResponse (a body over MAX_CONTROL_BODY) if there is no
        usable answer.
        """
        response = await self._exchange(method, host, target, headers, timeout_s=timeout_s)
        return self.impostors.unjudged(host, response)

    async def knock(self, host: str) -> None:
        """Connect (with TLS) and hang up. Raises UpstreamUnreachable, UpstreamTimeout or AddressRefused."""
        with self.reachability.asking(host):
            await self._data.knock(self._settings.endpoint(host))
        self.reachability.answered(host)

    async def _exchange(
        self, method: str, host: str, target: str, headers: Mapping[str, str], *, timeout_s: float
    ) -> Response:
        url = self._settings.endpoint(host).origin + target

        async def once() -> Response:
            response = await self._request(self._control, url, headers, method)
            fields = cleaned(response.headers)
            if response.status >= 400:
                return Response(response.status, fields, await self._control.refusal(response, REFUSAL_LIMIT))
            with contextlib.closing(response):
                body = await self._control.text(response, MAX_CONTROL_BODY)
            if body is None:
                raise UnexpectedResponse(f"expected at most {MAX_CONTROL_BODY} bytes, got more")
            return Response(response.status, fields, body)

        response = await self._patiently(host, once, timeout_s)
        coding = response.headers.get("Content-Encoding", "identity")
        return replace(response, body=decode(response.body, coding, limit=MAX_CONTROL_BODY))

    async def obtain(
        self,
        host: str,
        repository: str,
        digest: Digest,
        headers: Mapping[str, str],
        *,
        asked: tuple[int, int] | None = None,
        timeout_s: float,
    ) -> tuple[Source, DataStream | None]:
        """Ask the registry for a blob. Return its source, and the body too if the registry serves it itself.

        Of such a body only `[asked)` is wanted. Raises UpstreamRefused with the registry's status if the registry
        refuses, NotTheRegistry if something else does.
        """
        target = f"/v2/{repository}/blobs/{digest}"
        url = self._settings.endpoint(host).origin + target
        if asked:
            headers = {**headers, "Range": format_range(*asked)}
        response = await self._patiently(host, lambda: self._request(self._control, url, headers), timeout_s)
        # The registry's public name: signatures are made for it, and redirects are relative to it.
        source = Source(f"https://{host}{target}", {k: v for k, v in headers.items() if k.lower() == "authorization"})
        if response.status < 400 and not is_page(response.headers):
            self.reachability.answered(host)
        if response.status == 200 or (asked and response.status in (206, 416)):
            with closing_on_error(response):
                if is_page(response.headers):
                    raise self.impostors.displaced(host, described(response.status, response.headers))
                extent = check_data(response.status, cleaned(response.headers), asked=asked, length=None)
                crew = self._control.crew
                return source, DataStream(response, crew, extent, self.errors, source, ranged=asked is not None)
        with contextlib.closing(response):
            fields = cleaned(response.headers)
            location = fields.get("Location")
            if response.status in REDIRECTS and location:
                response.skip()
                return source.moved(location), None
            if response.status >= 400:
                text = await self._control.refusal(response, REFUSAL_LIMIT)
                refusal = self.impostors.judged(host, Response(response.status, fields, text))
                raise UpstreamRefused(refusal.status, relayable(refusal.headers))
            raise UnexpectedResponse(f"expected 200, a redirect or a refusal, got {response.status}")

    async def _patiently[T: (Response, DataResponse)](
        self, host: str, once: Callable[[], Awaitable[T]], timeout_s: float
    ) -> T:
        """Return the registry's answer. Failed connections and 5xx are tried again, because clients do not retry HEAD
        and manifests.

        The time limit is for all tries together.
        """
        with self.errors.counted(), self.reachability.asking(host):
            async with within(timeout_s):
                for pause in PAUSES_S:
                    try:
                        response = await once()
                    except (UpstreamUnreachable, UpstreamTimeout) as error:
                        if isinstance(error, Offline) or not self._is_open:
                            raise
                    else:
                        if response.status < 500 or response.status == LOOP_DETECTED:
                            break
                        if isinstance(response, DataResponse):
                            response.close()
                    await asyncio.sleep(pause)
                else:
                    response = await once()
        if response.status >= 500 or response.status == TOO_MANY_REQUESTS:
            self.errors[UpstreamRefused] += 1
        self._down_until.pop(host, None)
        return response

    @staticmethod
    def source_at(host: str, target: str, location: str) -> Source:
        """Return the source that an answer to `target` points to; `location` may be relative."""
        return Source(f"https://{host}{target}").moved(location)

    # --- data plane

    async def open_range(
        self, source: Source, start: int, stop: int, *, expected_length: int | None, validator: str | None
    ) -> DataStream:
        """Return a checked response to a GET of `[start, stop)`.

        The stream is the whole blob from byte 0 if the source ignores Range. Raises SourceExpired if the address is no
        longer good, LengthContradicted if the blob's length is neither the expected one nor one of the source's
        `sizes`; UpstreamRefused (429, 5xx), UnexpectedResponse, UpstreamUnreachable or UpstreamTimeout.
        """
        with self.errors.counted():
            async with within(CONNECT_S + STALL_TIMEOUT_S):
                response, source = await self._follow(source, {"Range": format_range(start, stop)})
        with self.errors.counted(), closing_on_error(response):
            fields = cleaned(response.headers)
            if response.status in SOURCE_GONE:
                shaped = is_refusal(response.status, fields, await self._data.refusal(response, REFUSAL_LIMIT))
                what = "" if shaped else described(response.status, fields)
                raise SourceExpired(response.status, relayable(fields), what=what)
            extent = check_data(response.status, fields, asked=(start, stop), length=expected_length)
            if not source.near:
                check_length(extent.length, source.sizes)
            stream = DataStream(response, self._data.crew, extent, self.errors, source)
            if validator is not None and stream.validator != validator:
                raise ValidatorChanged(validator, stream.validator)
        return stream

    async def _follow(self, source: Source, headers: dict[str, str]) -> tuple[DataResponse, Source]:
        """Follow redirects; return the final response and its source."""
        for _ in range(MAX_HOPS + 1):
            response = await self._fetch(source, headers)
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or not location:
                return response, source
            response.skip()
            source = source.moved(location)
        raise UnexpectedResponse(f"expected at most {MAX_HOPS} redirects, got more")

    def _reach(self, url: str) -> str:
        """Return the address, its host replaced as `upstream` says. Raises AddressRefused for one we never ask."""
        parsed = URL(url, encoded=True)
        host, port = (parsed.host or "").rstrip("."), parsed.port or 0
        endpoint = self._settings.upstream.get(host)
        if endpoint is not None and parsed.is_default_port():
            return endpoint.origin + parsed.raw_path_qs
        if self._policy.is_exempt(host, port) or (host, port) in self._named.addresses | self._near:
            return url
        if parsed.scheme != "https":
            raise AddressRefused(f"expected an https address, got {parsed.scheme}://{host}")
        if is_address(host):
            check_address(host, own=self._own())
        elif self._parents.of(parsed.scheme, host, port):
            check_remote(host)
        return url

    async def _fetch(self, source: Source, headers: Mapping[str, str]) -> DataResponse:
        """Send a GET for blob bytes and return the response."""
        name = OBJECT_STORE if source.near else source.host
        url = self._reach(source.url)
        with self.reachability.asking(name):
            response = await self._request(self._data, url, {**source.headers, **headers})
        self.reachability.answered(name, response.status)
        return response

    async def _request(
        self, getting: Getting, url: str, headers: Mapping[str, str], method: str = "GET"
    ) -> DataResponse:
        """Return the response's head. Raises UpstreamUnreachable, UpstreamTimeout, or ValueError if `url` is none."""
        there = URL(url, encoded=True)
        if there.host is None or there.port is None:
            raise ValueError("no host")
        if self._settings.offline and (there.host, there.port) not in self._near:
            raise Offline("offline: upstream is not asked")
        if not self._is_open:
            raise UpstreamUnreachable("expected an open client, got a closed one")
        # CDN-Loop breaks no signature: those of R2 and CloudFront cover only the host and the query.
        fields = {"Accept-Encoding": "identity", **headers, CDN_LOOP: self.loop.extend(headers.get(CDN_LOOP))}
        endpoint = Endpoint(there.scheme, there.host, there.port)
        return await getting.get(Ask(endpoint, there.raw_path_qs, fields, STALL_TIMEOUT_S, method))


@contextlib.asynccontextmanager
async def within(timeout_s: float) -> AsyncIterator[None]:
    """Raise UpstreamTimeout if the block takes longer, and UnexpectedResponse for an address that cannot be used.

    The message does not quote the address, which may be signed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise UpstreamTimeout("no answer in time") from None
    except ValueError as error:
        raise UnexpectedResponse(
            f"expected an address that can be used, got one that cannot ({type(error).__name__})"
        ) from None
