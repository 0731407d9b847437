"""Send a reader's bytes to a client of one of our aiohttp servers, from a thread, by sendfile where possible.

Invariant: a body is sent whole, or stops short of its Content-Length, `Sending.problem` says why, and the caller ends
the connection.
"""

import asyncio
import contextlib
import math
import socket

from aiohttp import web

from pullthrough.delivery import byte_sender
from pullthrough.delivery.byte_sender import LoopCalls, LoopReader, Sending
from pullthrough.delivery.byte_threads import ByteThreads
from pullthrough.delivery.outlets import PlainOutlet
from pullthrough.recording.reader import Reader


async def send(
    request: web.BaseRequest, response: web.StreamResponse, reader: Reader, sending: Sending, threads: ByteThreads
) -> None:
    """Send all bytes of `reader` after the head of `response`, which has been sent ("prepared").

    Errors of the client, the network or the reader are not raised: `sending` has them, even if this is cancelled.
    """
    sending.problem = "client disconnected"
    # Until nothing waits in the transport's own buffer, see `AcceptPolicy.connection_made`.
    with contextlib.suppress(ConnectionError):
        await request.writer.drain()
    if request.transport is None or request.transport.is_closing():
        return
    sending.problem = "cut off"
    body = _Body(request.transport.get_extra_info("socket").dup(), reader, sending, asyncio.get_running_loop())
    threads.start(body)
    try:
        await asyncio.shield(body.sent)
    except asyncio.CancelledError:
        # The thread uses the reader.
        body.stop()
        await body.sent
        raise


class _Body:
    """One body, as `byte_threads` serves it."""

    deadline = math.inf

    def __init__(self, sock: socket.socket, reader: Reader, sending: Sending, loop: asyncio.AbstractEventLoop) -> None:
        self.sent: asyncio.Future[None] = loop.create_future()
        self._calls = LoopCalls(loop)
        self._reader = LoopReader(reader, self._calls)
        self._out = PlainOutlet(sock)
        self._sending = sending

    def fileno(self) -> int:
        return self._out.sock.fileno()

    def run(self) -> bool:
        self._sending.problem = ""
        byte_sender.send(self._reader, self._out, self._sending)
        return False

    def stop(self) -> None:
        self._out.stop()

    def close(self) -> None:
        self._out.sock.close()
        self._calls.soon(self.sent.set_result, None)
