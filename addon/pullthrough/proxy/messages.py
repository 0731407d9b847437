"""Conversion of mitmproxy's messages to our values and back.

Invariant: a response has the Content-Length that it is given, whatever its body.
"""

from collections.abc import Iterable

from mitmproxy import http
from mitmproxy.proxy.mode_specs import RegularMode, ReverseMode, UpstreamMode

from pullthrough.registry.messages import Request


def has_body(request: http.Request) -> bool:
    """Return whether a body follows the head."""
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def is_reverse(flow: http.HTTPFlow) -> bool:
    """Return whether the client takes us for the server, because of a hosts entry; the blob host need not have one."""
    return isinstance(flow.client_conn.proxy_mode, ReverseMode)


def is_to_proxy(flow: http.HTTPFlow) -> bool:
    """Return whether the client has connected to a port that is a proxy's."""
    return isinstance(flow.client_conn.proxy_mode, RegularMode | UpstreamMode)


def request_of(flow: http.HTTPFlow, host: str) -> Request:
    """Return the flow's request, as one to `host`."""
    reverse = is_reverse(flow)
    return Request(
        flow.request.method,
        flow.request.scheme,
        host,
        flow.request.path,
        {name.lower(): value for name, value in flow.request.headers.items()},
        blobs=f"{flow.request.scheme}://{host}" if reverse else None,
        inline=reverse,
        client=flow.client_conn.peername[0],
        tunnelled=flow.request.scheme == "https" and isinstance(flow.client_conn.proxy_mode, RegularMode),
    )


def response_of(status: int, headers: Iterable[tuple[str, str]], body: bytes, length: int) -> http.Response:
    """Return a response with these fields and Content-Length: `length`."""
    # Encoded as they were decoded, so that a registry's fields come out byte for byte.
    fields = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in headers]
    response = http.Response.make(status, body, http.Headers(fields))
    # After the body: setting content writes its own length, which is wrong for HEAD and for streamed bodies.
    response.headers["Content-Length"] = str(length)
    return response
