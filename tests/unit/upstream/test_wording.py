"""wording: reasons for people."""

import errno
import socket
import ssl

import pytest

from pullthrough.upstream.wording import worded


def untrusted() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1000)")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"), "Connection refused"),
        (OSError(errno.ENETUNREACH, "?"), "Network is unreachable"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (untrusted(), "its certificate is not accepted: self-signed certificate"),
        (ssl.SSLError(1, "[SSL] wrong version number"), "[SSL] wrong version number"),
        (OSError("several"), "several"),
        (ValueError("no number"), "no number"),
    ],
)  # fmt: skip
def test_worded(error: Exception, text: str) -> None:
    """No numbers, no addresses; TLS's error number is none of the system's."""
    assert worded(error) == text
