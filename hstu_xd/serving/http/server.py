"""The process: listens, tells where, and on SIGTERM finishes what it has taken."""

import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from hstu_xd.errors import InputError
from hstu_xd.serving.http.app import build_app
from hstu_xd.serving.http.connection import BoundedConnection
from hstu_xd.serving.http.service import Service

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
        """Called ten times a second; returns whether to stop."""
        service = self._service
        if service.draining and not service.active:
            self.should_exit = True
        elif service.draining and time.monotonic() > self._drain_until:
            _log.warning("%d requests did not finish in time", service.active)
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops at once."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._drain_until = time.monotonic() + self._service.settings.drain_seconds
        self._service.draining = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to.

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
