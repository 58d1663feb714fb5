"""A connection that a client can neither fill without end nor hold without sending."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
        """Called by the parser, as are the following."""
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of the body, which the application bounds."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
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
