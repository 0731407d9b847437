"""Send a reader's bytes to a client of the blob server, by sendfile where the system has it.

Invariant: a body is sent whole, or stops short of its Content-Length and the caller ends the connection with FIN
(server/download.go: an unexpected EOF keeps progress, a reset does not). Descriptors are used by offset only, as
several clients share one. Knows no registry and no request.
"""

import asyncio
import errno
import io
import os
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from pullthrough import platform
from pullthrough.errors import CacheError
from pullthrough.reader import CLIENT_STALL_S, WAIT_S, FileSpan, Memory, Pending, Reader, read_span

SPAN: Final = 16 << 20
"""Bytes per call: small enough that a client which takes them slowly is not taken for one that takes none. Each call
costs Python a quarter of a millisecond."""
PIECE: Final = 1 << 20
"""Bytes that are in memory at once where the disk must be waited for, or sendfile is none."""


@dataclass
class Sending:
    """How a body fares; as it stands, should the sending be cancelled."""

    sent: int = 0
    problem: str = "cut off"
    """Why it ended before its time; "" when it did not."""
    stalled: bool = False
    """The client takes nothing: there is no use in saying goodbye."""


async def send(request: web.BaseRequest, response: web.StreamResponse, reader: Reader, sending: Sending) -> None:
    """Send all that `reader` has behind the head of `response`, which has been sent ("prepared").

    No error of the client, the network or the reader is raised: `sending` tells.
    """
    try:
        while not reader.done:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError
            piece = await reader.next(SPAN, WAIT_S)
            if isinstance(piece, Pending):
                continue
            async with asyncio.timeout(CLIENT_STALL_S):
                sending.sent += await _send_piece(request, response, reader, piece)
        sending.problem = ""
    except ConnectionError:
        sending.problem = "client disconnected"
    except TimeoutError:
        sending.problem, sending.stalled = f"client took no byte for {CLIENT_STALL_S:.0f} s", True
    except (CacheError, OSError) as error:
        sending.problem = str(error)


async def _send_piece(
    request: web.BaseRequest, response: web.StreamResponse, reader: Reader, piece: FileSpan | Memory
) -> int:
    if isinstance(piece, Memory):
        await response.write(piece.data)
        return len(piece.data)
    try:
        # Without sendfile: Windows, and file systems that cannot. asyncio's own fallback reads by the file's position.
        if not (hasattr(os, "sendfile") and await _send_file(request, piece)):
            for start in range(piece.start, piece.stop, PIECE):
                part = FileSpan(piece.descriptor, start, min(start + PIECE, piece.stop))
                await response.write(await read_span(part))
    except OSError as error:
        # What the network does to a connection is no fault of the file.
        if not isinstance(error, ConnectionError | TimeoutError) and error.errno in (None, errno.EIO):
            reader.on_unreadable()
        raise
    return piece.stop - piece.start


async def _send_file(request: web.BaseRequest, span: FileSpan) -> bool:
    """Whether the span was sent; False before its first byte if that cannot be done here."""
    size = span.stop - span.start
    for start in range(span.start, span.stop, PIECE):
        stop = min(start + PIECE, span.stop)
        if platform.read_cached(span.descriptor, stop - 1, 1) is None:
            # sendfile would wait for the disk on the event loop: the bytes are brought into the page cache first.
            await asyncio.to_thread(platform.read_at, span.descriptor, start, stop - start)
    # Until nothing waits in the transport's own buffer, see `Door.connection_made`.
    await request.writer.drain()
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError
    with io.FileIO(span.descriptor, closefd=False) as file:
        try:
            sent = await asyncio.get_running_loop().sendfile(transport, file, span.start, size, fallback=False)
        except asyncio.SendfileNotAvailableError:
            return False
    if sent != size:
        raise OSError(f"expected {size} bytes at {span.start}, got {sent}: the file is shorter")
    return True
