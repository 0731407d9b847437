"""TLS of the connections that are served from threads: which certificate is shown, and how.

Invariant: a context is never changed once a connection has used it; a renewed leaf makes another one, and connections
of the former one go on.
"""

from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL

from pullthrough.pki.authority import Leaf

HTTP_1_1: Final = b"http/1.1"
_ENABLE_PARTIAL_WRITE: Final = 1
"""SSL_MODE_ENABLE_PARTIAL_WRITE (openssl/ssl.h): with it SSL_write returns after each record of 16 KiB."""


def new_context(leaf: Leaf) -> SSL.Context:
    """Return a server's context for the leaf: TLS 1.2 and later, HTTP/1.1, sessions resumed by tickets."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    context.clear_mode(_ENABLE_PARTIAL_WRITE)
    # Tickets hold a session at the client; with a cache of OpenSSL's own 20,000 of them would be held here.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_session_id(b"ollama-cache")
    context.set_alpn_select_callback(_select_protocol)
    certificate, *chain = x509.load_pem_x509_certificates(leaf.pem)
    context.use_certificate(certificate)
    for issuer in chain:
        context.add_extra_chain_cert(issuer)
    context.use_privatekey(load_pem_private_key(leaf.pem, None))  # type: ignore[arg-type]  # an EC key, as Leaf says
    return context


def _select_protocol(_: SSL.Connection, offered: list[bytes]) -> Any:
    return HTTP_1_1 if HTTP_1_1 in offered else SSL.NO_OVERLAPPING_PROTOCOLS


class TlsContext:
    """The context that new connections get. `renew` it before the first connection and with each new leaf."""

    def __init__(self) -> None:
        self._current: SSL.Context | None = None

    @property
    def current(self) -> SSL.Context:
        """The newest one."""
        assert self._current is not None
        return self._current

    def renew(self, leaf: Leaf) -> None:
        """From now on show this leaf."""
        self._current = new_context(leaf)
