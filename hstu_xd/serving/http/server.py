"""The process of the service: it listens, and on SIGTERM finishes the requests it has taken.

Its connections bound what a client may send in a head, and how long a request may take to arrive.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hstu_xd.errors import InputError
from hstu_xd.serving.http.app import build_app
from hstu_xd.serving.http.service import Service

# Bytes of a request's first line and headers, and of whatever else is not its body.
MOST_HEAD = 1 << 16
# Seconds that a request may take to arrive as a whole.
ARRIVES_WITHIN = 20.0


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, which by itself takes heads of any size and waits for ever.

    A head that is too large is answered with 431, a request that does not arrive in time with 408;
    then the connection is closed. Between requests uvicorn's own limit holds.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head = 0
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, unless it is too much that is no body."""
        self._head += len(data)
        super().data_received(data)
        if self._head > MOST_HEAD:
            self._refuse(
                b"431 Request Header Fields Too Large",
                b"the request's head has more than %d bytes; send less" % MOST_HEAD,
            )

    def on_message_begin(self) -> None:
        """Expect a request; the parser calls this method and the following ones."""
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        """Stop counting: the head is whole."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take some of the body, which the application bounds."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop waiting: the request is whole."""
        self._head = 0
        self._rest()
        super().on_message_complete()

    def _expect(self) -> None:
        self._rest()
        self._late = self.loop.call_later(
            ARRIVES_WITHIN,
            self._refuse,
            b"408 Request Timeout",
            b"the request did not arrive within %d s; send it at once" % ARRIVES_WITHIN,
        )

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: bytes, error: bytes) -> None:
        """Say why, unless another answer is under way, and close."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        arriving = cycle is not None and cycle.more_body and not cycle.response_started
        if cycle is None or cycle.response_complete or (arriving and not self.pipeline):
            body = b'{"error":"%s"}' % error
            head = (
                b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
            )
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


_log = logging.getLogger(__name__)

# Seconds that an idle connection is kept open.
_KEEP_ALIVE = 75
# Seconds that connections may take to close once all requests are answered.
_CLOSING = 5


class Server(uvicorn.Server):
    """uvicorn, but a signal first drains: requests are refused while the accepted ones finish.

    Args:
        service: to serve.
        announce: told when requests are taken.
    """

    def __init__(self, service: Service, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            build_app(service),
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_CLOSING,
        )
        super().__init__(config)
        self._service, self._announce = service, announce
        self._drain_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._announce()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls this ten times a second."""
        service = self._service
        if service.draining and not service.active:
            self.should_exit = True
        elif service.draining and time.monotonic() > self._drain_until:
            _log.warning("%d requests did not finish in time", service.active)
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once at the second one."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._drain_until = time.monotonic() + self._service.settings.drain_seconds
        self._service.draining = True


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that clients can connect to.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port}: {error}; give another --host or --port") from error


def serve(service: Service, sock: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until a signal comes, then finish what was taken and close the log."""
    server = Server(service, announce)
    try:
        server.run(sockets=[sock])
    finally:
        service.stop()
