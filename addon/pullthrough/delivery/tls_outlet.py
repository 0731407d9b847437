"""TLS on a client's socket that a thread owns, even if the first bytes of the handshake were read before.

Invariant: as in `outlets`. Reads and writes block, at most until the connection's `deadline`, when `stop` is called.
"""

import contextlib
import math
import os
import socket
import struct
import time
from typing import Final

from OpenSSL import SSL

from pullthrough.delivery.outlets import CLIENT_STALL_S, FIRST, ROOM, Buffers, ClientGone, fill
from pullthrough.delivery.socket_polling import is_gone, readable, writable

STALL_S: Final = 1.0
"""How long a write waits for room before the memory of its piece is given back."""
GOODBYE_S: Final = 2.0
"""How long a client may take to see the end of what was sent."""
Bytes = bytes | bytearray | memoryview

_READ: Final = 64 << 10


class TlsOutlet:
    """TLS on a client's socket, which is ours: OpenSSL reads and writes it itself."""

    def __init__(self, sock: socket.socket, buffers: Buffers, early: bytes = b"") -> None:
        """`early` is what somebody else has read of the handshake."""
        sock.setblocking(True)
        # Not settimeout: that makes the descriptor non-blocking, and OpenSSL would return from each write at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(STALL_S), 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.sent = 0
        self.deadline = math.inf
        """When the present work must be done, see `byte_threads`."""
        self._buffers = buffers
        self._early = early
        self._tls: SSL.Connection | None = None
        self._held = b""
        self._stopped = ""

    # --- the handshake

    def greet(self, data: bytes) -> None:
        """Send bytes unencrypted, before the handshake."""
        try:
            self.sock.sendall(data)
        except OSError:
            raise self._gone from None

    def handshake(self, context: SSL.Context) -> None:
        """SSL.Error where the client does not want what we show, or says what is no TLS."""
        if self._early:
            self._begin_handshake(context)
        else:
            self._tls = SSL.Connection(context, self.sock)
            self._tls.set_accept_state()
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except (SSL.SysCallError, SSL.WantReadError, SSL.WantWriteError, SSL.ZeroReturnError):
            raise self._gone from None

    def _begin_handshake(self, context: SSL.Context) -> None:
        """Have OpenSSL read the early bytes from a socket pair, whose descriptor then becomes the client's socket."""
        near, far = socket.socketpair()
        with near, far:
            for end in (near, far):
                end.setblocking(False)
            try:
                far.sendall(self._early)
            except BlockingIOError:
                # No hello is as long as that.
                raise self._gone from None
            self._tls = SSL.Connection(context, near)
            self._tls.set_accept_state()
            try:
                # OpenSSL has consumed the early bytes once it wants more.
                with contextlib.suppress(SSL.WantReadError):
                    self._tls.do_handshake()
            finally:
                with contextlib.suppress(BlockingIOError):
                    self.greet(far.recv(_READ))
            os.dup2(self.sock.fileno(), near.fileno(), inheritable=False)
            self.sock.close()
            self.sock = socket.socket(fileno=near.detach())

    @property
    def server_name(self) -> str | None:
        """SNI (RFC 6066 section 3), None where the client gave none."""
        assert self._tls is not None
        name = self._tls.get_servername()
        return name.decode("latin-1") if name is not None else None

    # --- reading

    def readable(self, timeout_s: float) -> bool:
        """Return whether `read` has something, or the end, within the time."""
        assert self._tls is not None
        return self._tls.pending() > 0 or readable(self.sock, timeout_s)

    def read(self, timeout_s: float = CLIENT_STALL_S) -> bytes:
        """Return what has come; waits for the first byte. b"" when the client has ended, or is shut out for saying
        nothing.
        """
        self.deadline = time.monotonic() + timeout_s
        assert self._tls is not None
        try:
            return self._tls.recv(_READ)
        except (SSL.Error, OSError):
            return b""
        finally:
            self.deadline = math.inf

    def is_gone(self) -> bool:
        return is_gone(self.sock)

    # --- writing

    def hold(self, data: bytes) -> None:
        """Hold bytes back to send them with the next ones, see `flush`."""
        self._held += data

    def flush(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._write_all(held)

    def put(self, data: bytes | bytearray) -> None:
        self.flush()
        # To SSL_write(3), zero bytes are an error.
        if data:
            self._write_all(data)
            self.sent += len(data)

    def put_file(self, descriptor: int, start: int, stop: int) -> None:
        if len(self._held) > ROOM:
            self.flush()
        size = FIRST
        while start < stop:
            count = min(size, stop - start)
            self._put_piece(descriptor, start, count)
            self.sent += count
            start += count
            size = self._buffers.size

    def _put_piece(self, descriptor: int, start: int, count: int) -> None:
        self.deadline = time.monotonic() + CLIENT_STALL_S
        while not self._try_piece(descriptor, start, count):
            # SSL_write(3) must get the same bytes again, though not at the same address.
            writable(self.sock, None)
        self._held = b""
        self.deadline = math.inf

    def _try_piece(self, descriptor: int, start: int, count: int) -> bool:
        held = len(self._held)
        buffer = self._buffers.take()
        try:
            buffer[:held] = self._held
            fill(descriptor, buffer[held : held + count], start)
            return self._write(buffer[: held + count])
        finally:
            self._buffers.give(buffer)

    def _write_all(self, data: Bytes) -> None:
        self.deadline = time.monotonic() + CLIENT_STALL_S
        while not self._write(data):
            writable(self.sock, None)
        self.deadline = math.inf

    def _write(self, data: Bytes) -> bool:
        """Return whether all of it was taken; if not, it is to be tried again with the same bytes."""
        assert self._tls is not None
        try:
            self._tls.send(data)
        except (SSL.WantWriteError, SSL.WantReadError):
            return False
        except (SSL.Error, OSError):
            raise self._gone from None
        return True

    # --- the end

    def stop(self, why: str = "") -> None:
        """Shut the connection down, from any thread: blocked calls return."""
        self._stopped = self._stopped or why
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def say_goodbye(self) -> None:
        """End what is sent, by FIN and never by a reset, which would cost an Ollama client what it has so far."""
        self.deadline = until = time.monotonic() + GOODBYE_S
        with contextlib.suppress(SSL.Error, OSError):
            if self._tls is not None:
                self._tls.shutdown()
            self.sock.shutdown(socket.SHUT_WR)
            # A reset is what the kernel sends for bytes that nobody has read.
            while (left := until - time.monotonic()) > 0 and readable(self.sock, left) and self.sock.recv(_READ):
                pass

    def close(self) -> None:
        """Let go of the socket."""
        self._tls = None
        self.sock.close()

    @property
    def _gone(self) -> ClientGone:
        return ClientGone(self._stopped or "client disconnected")
