"""The layers of an outgoing connection: plain, TLS, or TLS within TLS.

Invariant: no call blocks; bytes are handed out in order, and a failure only after the bytes that came before it.
"""

import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Final, Protocol

READ: Final = 256 << 10
"""Bytes read at once unless the caller says otherwise."""


class Layer(Protocol):
    """Bytes in and out without blocking: None where a call would block, and `wants` says on what."""

    wants: int

    def read_into(self, buffer: memoryview) -> int | None:
        """Read what has come; 0 at the end. Raises OSError if the connection fails."""

    def write(self, data: memoryview) -> int | None:
        """Send what can be sent at once and return how much. Raises OSError if the connection fails."""


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
"""Held while records are read: threads doing so at once would pass the interpreter lock on at every record."""


class Tls:
    """TLS on the socket itself."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.wants = 0
        self.sock = sock
        self._problem: OSError | None = None
        """A failure that came after bytes, to be raised by the next read."""

    def read_into(self, buffer: memoryview) -> int | None:
        if self._problem is not None:
            raise self._problem
        # A call returns one record, of 16 KiB at most: all that have come are read in one go. Without an explicit size
        # the standard library computes the buffer's, which takes longer than the record.
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
        # What was accepted is sent before more is accepted.
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
        """Send what TLS has produced; False if not all of it could be sent."""
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
