"""The process of the service: it listens, and on SIGTERM finishes the requests it has taken.

Its connections bound what a client may send in a head, how long a request may take to arrive, and
how long an answer may take to be read.
"""

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hstu_xd.errors import InputError
from hstu_xd.serving.http.app import build_app
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.swaps import Swaps

# Bytes of a request's first line and headers, and of whatever else is not its body.
MOST_HEAD = 1 << 16
# Seconds that a request may take to arrive as a whole.
ARRIVES_WITHIN = 20.0
# Seconds that a client may leave an answer unread, and seconds between two looks.
READS_WITHIN, _LOOK = 20.0, 0.5
# Seconds that a worker which has taken a connection leaves the next to others: for each that it
# has, and at most. Clients that open one for every request come no faster than it lets them in.
_PAUSE, _MOST_PAUSE = 0.00025, 0.002
# Bytes that are parsed at once. The shortest request has 16 bytes, so that this bounds how many
# requests of one connection wait.
_SLICE = 1024


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, which by itself takes any amount of anything and waits for ever.

    A head that is too large is answered with 431, a request that does not arrive in time with 408;
    then the connection is closed. While a request waits for the answer to the one before it,
    nothing is read. A client that leaves answers unread is cut off. Between requests uvicorn's own
    limit holds.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head = 0
        # What came and is not parsed yet: at most what the transport reads at once.
        self._held = bytearray()
        self._arriving = False
        # The request that is being answered; uvicorn's ``cycle`` is the last one that came.
        self._answered: Any = None
        self._late: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self.flow = _PausedFlow(transport, lambda: bool(self._held))
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._rest()
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._held.clear()
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._held += data
        self._parse()

    def on_message_begin(self) -> None:
        """Expect a request; the parser calls this method and the following ones."""
        super().on_message_begin()
        self._arriving = True
        self._expect()

    def on_headers_complete(self) -> None:
        """Stop counting: the head is whole."""
        self._head = 0
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        """Take some of the body, which the application bounds."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop waiting: the request is whole."""
        self._head = 0
        self._arriving = False
        self._rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, and with what came after it."""
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        self._watch()
        if self._held and not self.pipeline:
            self.loop.call_soon(self._go_on)

    def pause_writing(self) -> None:
        """Wait until the client reads; called by the transport."""
        super().pause_writing()
        self._watch()

    def _parse(self) -> None:
        """Parse what is held until a request has to wait for the one before it."""
        while self._held and not self.pipeline and not self.transport.is_closing():
            some = bytes(self._held[:_SLICE])
            del self._held[:_SLICE]
            self._head += len(some)
            super().data_received(some)
            if self._head > MOST_HEAD:
                self._refuse(
                    b"431 Request Header Fields Too Large",
                    b"the request's head has more than %d bytes; send less" % MOST_HEAD,
                )
        if self.transport.is_closing():
            self._held.clear()
        elif self._held:
            # Time counts against the client only while its request is read.
            self._rest()
            self.flow.pause_reading()
        elif self._late is None and (self._arriving or self._idle()):
            self._expect()

    def _go_on(self) -> None:
        """Parse what was held, then read on; who asks for a body that is long reads on itself."""
        self._parse()
        if not self._held and not self.pipeline and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def _idle(self) -> bool:
        """Return whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

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

    def _watch(self) -> None:
        """Look from time to time whether the client reads, as long as there is something to."""
        if self._look is None and self.transport.get_write_buffer_size():
            self._unread_since = time.monotonic()
            self._look = self.loop.call_later(min(_LOOK, READS_WITHIN), self._look_again)

    def _look_again(self) -> None:
        self._look = None
        if not self.transport.get_write_buffer_size():
            return
        if time.monotonic() - self._unread_since >= READS_WITHIN:
            self.transport.abort()
        else:
            self._look = self.loop.call_later(min(_LOOK, READS_WITHIN), self._look_again)

    def _refuse(self, status: bytes, error: bytes) -> None:
        """Say why, unless another answer is under way, and close."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        arriving = cycle is not None and cycle.more_body and not cycle.response_started
        if self._idle() or (arriving and not self.pipeline):
            body = b'{"error":"%s"}' % error
            head = (
                b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
            )
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self._watch()
        self.transport.close()


class _PausedFlow(FlowControl):
    """Flow of a connection that reads nothing as long as something is held.

    uvicorn resumes reading whenever the present request asks for its body.
    """

    def __init__(self, transport: asyncio.Transport, holds: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._holds = holds

    def resume_reading(self) -> None:
        """Read on, unless there is something to parse first."""
        if not self._holds():
            super().resume_reading()


_log = logging.getLogger(__name__)

# Seconds that an idle connection is kept open.
_KEEP_ALIVE = 75
# Seconds that connections may take to close once all requests are answered, and that uvicorn and
# the session may take after that. With the time of draining this is 8 s: the process itself takes a
# while to end where the machine is busy.
_CLOSING, _ENDING = 1.0, 1.0


class _Door(asyncio.AbstractServer):
    """Takes the connections of a socket one at a time, so that whoever else listens has its share.

    An event loop by itself takes all that wait at once: of several processes one would have all
    connections that a client opens together, and the others none.

    After each it stays away for a moment, the longer the more it has, and others who have fewer
    come first.

    Args:
        sock: that listens.
        make: makes what handles a connection.
        pause: seconds to stay away, asked after each.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        pause: Callable[[], float],
    ) -> None:
        self._loop, self._sock, self._make = asyncio.get_running_loop(), sock, make
        self._pause = pause
        self._entering: set[asyncio.Task[Any]] = set()
        self._later: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._open()

    def close(self) -> None:
        """Take no more."""
        self._loop.remove_reader(self._sock)
        if self._later is not None:
            self._later.cancel()

    async def wait_closed(self) -> None:
        """Wait for those that are being taken."""
        await asyncio.gather(*self._entering, return_exceptions=True)

    def _open(self) -> None:
        self._loop.add_reader(self._sock, self._take)

    def _take(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # Another process was faster, or the client has gone.
        except OSError as error:
            _log.warning("no connection can be taken: %s; trying again in a second", error)
            self._stay_away(1.0)
            return
        connection.setblocking(False)
        # Head and body of an answer are two writes, of which the second does not wait.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        entering = self._loop.create_task(
            self._loop.connect_accepted_socket(self._make, connection)
        )
        self._entering.add(entering)
        entering.add_done_callback(self._entering.discard)
        if pause := self._pause():
            self._stay_away(pause)

    def _stay_away(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._later = self._loop.call_later(seconds, self._open)


class Server(uvicorn.Server):
    """uvicorn, but a signal first drains: requests are refused while the accepted ones finish.

    Args:
        service: to serve.
        swaps: puts other models in place.
        announce: told when requests are taken.
        shared: whether other processes listen on the same socket.
    """

    def __init__(
        self, service: Service, swaps: Swaps, announce: Callable[[], None], *, shared: bool = False
    ) -> None:
        config = uvicorn.Config(
            build_app(service, swaps),
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            # What a client does wrong is its own affair, not a line of the log.
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=_CLOSING + _ENDING,
        )
        super().__init__(config)
        self._service, self._announce, self._shared = service, announce, shared
        self._drain_until = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup([])

        def connection() -> asyncio.Protocol:
            return BoundedConnection(self.config, self.server_state, self.lifespan.state)

        self.servers = [_Door(sock, connection, self._pause) for sock in sockets or ()]
        self._announce()

    def _pause(self) -> float:
        """Return how long others who listen are to have the next connection to themselves."""
        taken = len(self.server_state.connections)
        return min(_MOST_PAUSE, (1 + taken) * _PAUSE) if self._shared else 0.0

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop; uvicorn calls this ten times a second."""
        service = self._service
        if service.draining and not service.active:
            self.should_exit = True
        elif service.draining and time.monotonic() > self._drain_until:
            _log.warning("%d requests did not finish in time", service.active)
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections: those that have nothing to finish at once, the others soon."""
        loop = asyncio.get_running_loop()
        cut = loop.call_later(0.0 if self.force_exit else _CLOSING, self._cut)
        await super().shutdown(sockets)
        cut.cancel()
        self._cut()
        # Requests end by themselves where their connection is gone.
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_ENDING)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at once where Ctrl-C comes after it.

        SIGTERM comes to a worker twice where all processes of a service get it, as systemd sends
        it: from there, and from the process that watches.
        """
        if self._service.draining:
            if sig == signal.SIGINT:
                self.should_exit = self.force_exit = True
            return
        self._drain_until = time.monotonic() + self._service.settings.drain_seconds
        self._service.draining = True

    def _cut(self) -> None:
        """End what clients hold up, and what nobody waits for any more."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self._service.abandon()


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


def serve(
    service: Service,
    sock: socket.socket,
    swaps: Swaps,
    announce: Callable[[], None],
    *,
    shared: bool = False,
) -> None:
    """Serve until a signal comes, then finish what was taken and close the log.

    SIGHUP reloads the run.
    """
    server = Server(service, swaps, announce, shared=shared)
    signal.signal(signal.SIGHUP, lambda which, frame: swaps.reload())
    # What is loaded by now stays. Each full collection would look through all of it, and hold up
    # every request meanwhile.
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets=[sock])
    finally:
        if not service.stop(_ENDING):
            _log.warning("the session did not end in time; what was accepted is in the log")
