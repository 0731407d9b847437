"""Network errors in words for people.

Invariant: the words are the system's and TLS's own, without error numbers and without anything that a peer sent.
"""

import os
import socket
import ssl


def worded(error: Exception) -> str:
    """Return the reason of a failed connection, such as "Connection refused"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError | socket.gaierror) and error.errno:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)
