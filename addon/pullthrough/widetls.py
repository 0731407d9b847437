"""Take a whole piece out of TLS at once.

mitmproxy takes what was encrypted in portions of 64 KiB, and each of them goes up through every layer of the
connection, which costs more than encrypting it. Invariant: the same bytes in the same order. Knows no HTTP.
"""

from typing import Final

from mitmproxy.proxy import commands, layer
from mitmproxy.proxy.layers import ClientTLSLayer
from OpenSSL import SSL

PORTION: Final = 1 << 20
"""More than a piece of the stream layer with its records."""


class WideTLSLayer(ClientTLSLayer):
    """mitmproxy's layer for TLS with a client, with larger portions."""

    def tls_interact(self) -> layer.CommandGenerator[None]:
        while True:
            try:
                data = self.tls.bio_read(PORTION)
            except SSL.WantReadError:
                return
            yield commands.SendData(self.conn, data)


def widen(top: layer.Layer | None) -> None:
    """Make the layers for TLS with a client, from `top` down, of our kind, which has no state of its own."""
    while top is not None:
        if type(top) is ClientTLSLayer:
            top.__class__ = WideTLSLayer
        top = getattr(top, "child_layer", None)
