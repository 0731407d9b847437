"""What a connection's bytes pass through on their way out of this machine: nothing, TLS, or TLS within TLS.

Invariant: no call blocks; bytes are handed out in order, and a failure only behind those that came before it.
"""

import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Final, Protocol

READ: Final = 256 << 10
"""Bytes that are read at once where the caller has no wish of its own."""


class Layer(Protocol):
    """Bytes in and out without blocking: None where that would be needed, and `wants` says for what."""

    wants: int

    def read_into(self, buffer: memoryview) -> int | None:
        """Read what is there; 0 at the end. Raises OSError if the connection fails."""

    def write(self, data: memoryview) -> int | None:
        """Send what can be sent at once; says how much. Raises OSError if the connection fails."""


class Plain:
    """The socket itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.wants = 0
        self._sock = sock

    def read_into(self, buffer: memoryview) -> int | None:
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            self.wants = selectors.EVENT_READ
            return None

    def write(self, data: memoryview) -> int | None:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            self.wants = selectors.EVENT_WRITE
            return None


_TURN: Final = threading.Lock()
"""Held while records are read: threads that did so at once would hand the interpreter to each other at each of them."""


class Tls:
    """TLS on the socket itself."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.wants = 0
        self.sock = sock
        self._problem: OSError | None = None
        """For the next read: it came behind bytes."""

    def read_into(self, buffer: memoryview) -> int | None:
        if self._problem is not None:
            raise self._problem
        # A call returns one record, of 16 KiB at most: what there is of them is read in one go. The standard library
        # counts what the buffer holds, which takes longer than the record, unless it is told.
        filled, size, receive = 0, len(buffer), self.sock.recv_into
        try:
            with _TURN:
                while filled < size and (count := receive(buffer[filled:], size - filled)):
                    filled += count
        except ssl.SSLWantReadError:
            self.wants = selectors.EVENT_READ
            return filled or None
        except ssl.SSLWantWriteError:
            self.wants = selectors.EVENT_WRITE
            return filled or None
        except OSError as error:
            if not filled:
                raise
            self._problem = error
        return filled

    def write(self, data: memoryview) -> int | None:
        return self._do(lambda: self.sock.send(data))

    def handshake(self) -> int | None:
        """Go on with the handshake; 0 once it is done. Raises OSError if it fails."""
        return self._do(self._handshake)

    def _handshake(self) -> int:
        self.sock.do_handshake()
        return 0

    def _do(self, once: Callable[[], int]) -> int | None:
        try:
            return once()
        except ssl.SSLWantReadError:
            self.wants = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            self.wants = selectors.EVENT_WRITE
        return None


class InnerTls:
    """TLS within the TLS of a parent proxy."""

    def __init__(self, outer: Layer, context: ssl.SSLContext, host: str) -> None:
        self.wants = 0
        self._outer = outer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._buffer = memoryview(bytearray(READ))
        self._unsent = memoryview(b"")

    def read_into(self, buffer: memoryview) -> int | None:
        try:
            return self._do(lambda: self._tls.read(len(buffer), buffer))  # type: ignore[arg-type, return-value]
        except ssl.SSLZeroReturnError:
            return 0

    def write(self, data: memoryview) -> int | None:
        # What was taken is sent before more is taken.
        return self._do(lambda: self._tls.write(data)) if self._flush() else None

    def handshake(self) -> int | None:
        """Go on with the handshake; 0 once it is done. Raises OSError if it fails."""
        return self._do(self._handshake)

    def _handshake(self) -> int:
        self._tls.do_handshake()
        return 0

    def _do(self, once: Callable[[], int]) -> int | None:
        while True:
            try:
                result = once()
            except ssl.SSLWantReadError:
                if not self._flush():
                    return None
                count = self._outer.read_into(self._buffer)
                if count is None:
                    self.wants = self._outer.wants
                    return None
                if count:
                    self._incoming.write(self._buffer[:count])
                else:
                    self._incoming.write_eof()
            else:
                self._flush()
                return result

    def _flush(self) -> bool:
        """Send what TLS has to say; False if not all of it could be."""
        while self._unsent or self._outgoing.pending:
            self._unsent = self._unsent or memoryview(self._outgoing.read())
            count = self._outer.write(self._unsent)
            if count is None:
                self.wants = self._outer.wants
                return False
            self._unsent = self._unsent[count:]
        return True

    def flush(self) -> int | None:
        """Send what was written before."""
        return 0 if self._flush() else None
