"""What a client may do to a connection: heads without end, and requests that never come."""

import asyncio
import gc
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from service_client import serving

pytest.importorskip("uvicorn", reason="no uvicorn here: the HTTP service is NOT covered")

import uvicorn
from uvicorn.server import ServerState

from hstu_xd.serving.http import server
from hstu_xd.serving.http.server import MOST_HEAD, BoundedConnection, Server
from hstu_xd.serving.http.swaps import LocalSwaps

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


async def echo(_: Any, receive: Any, send: Any) -> None:
    """An application that answers with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        more = message["more_body"]
    answer = str(length).encode()
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def connected(talk: Talk, app: Any = echo) -> bytes:
    """What a client hears that talks to the application."""

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(app, lifespan="off", ws="none", log_level="critical")
        server = await loop.create_server(
            lambda: BoundedConnection(config, ServerState(), {}, loop), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            return await asyncio.wait_for(talk(reader, writer), 60)
        finally:
            writer.close()
            server.close()

    return asyncio.run(run())


def heard(sent: bytes) -> bytes:
    """What is answered until the connection is closed."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(sent)
        return await reader.read()

    return connected(talk)


def test_a_head_may_have_a_size_and_a_body_another() -> None:
    head = b"POST / HTTP/1.1\r\nconnection: close\r\ncontent-length: 1000000\r\nfill: "
    filled = head + b"a" * (MOST_HEAD - len(head) - 4) + b"\r\n\r\n"
    assert heard(filled + b"x" * 1_000_000).endswith(b"\r\n\r\n1000000")


class Wire(asyncio.Transport):
    """What a connection writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed, self.reads = b"", False, True

    def write(self, data: bytes) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nx: ",
        b"GET /",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nx: ",
    ],
    ids=["header", "path", "trailer"],
)
def test_a_head_without_end_is_refused(head: bytes) -> None:
    async def run() -> tuple[bytes, int]:
        config = uvicorn.Config(echo, lifespan="off", ws="none", log_level="critical")
        loop, wire = asyncio.get_running_loop(), Wire()
        connection = BoundedConnection(config, ServerState(), {}, loop)
        connection.connection_made(wire)
        connection.data_received(head)
        fed = 0
        while not wire.closed and fed < 1 << 24:
            connection.data_received(b"a" * 4096)
            fed += 4096
        connection.connection_lost(None)
        return wire.written, fed

    answer, fed = asyncio.run(run())
    assert MOST_HEAD - 4096 < fed <= MOST_HEAD + 4096
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert answer.endswith(b'{"error":"the request\'s head has more than 65536 bytes; send less"}')


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf"]
)
def test_a_request_that_does_not_come_is_not_waited_for(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ARRIVES_WITHIN", 0.1)
    answer = heard(sent)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert answer.endswith(b'{"error":"the request did not arrive within 0 s; send it at once"}')


@pytest.mark.parametrize(
    "begun", [b"GET / HTTP/1.1\r\nx: ", b"POST / HTTP/1.1\r\ncontent-length: 999\r\n\r\n"]
)
def test_nor_is_the_next_one_on_a_connection_that_was_kept(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dribbles in, so that the connection is never idle either."""
    monkeypatch.setattr(server, "ARRIVES_WITHIN", 0.525)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nhi")
        await reader.readuntil(b"\r\n\r\n2")
        writer.write(begun)
        answer = asyncio.ensure_future(reader.read())
        for _ in range(100):
            if (await asyncio.wait([answer], timeout=0.05))[0]:
                return answer.result()
            writer.write(b"a")
        answer.cancel()
        return b"nothing"

    assert connected(talk).startswith(b"HTTP/1.1 408 ")


def test_a_connection_stays_open_between_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ARRIVES_WITHIN", 1.0)
    request = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nhi"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        answers = b""
        for _ in range(2):
            writer.write(request)
            answers += await reader.readuntil(b"\r\n\r\n2")
            await asyncio.sleep(1.2)
        return answers

    assert connected(talk).count(b"HTTP/1.1 200 ") == 2


REQUEST = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\nhi"


def test_reading_stays_paused_while_requests_wait() -> None:
    """A client that sends requests faster than they are answered fills no memory."""

    answered = 0

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        nonlocal answered
        await echo(scope, receive, send)
        answered += 1

    async def run() -> None:
        config = uvicorn.Config(counted, lifespan="off", ws="none", log_level="critical")
        loop, wire = asyncio.get_running_loop(), Wire()
        connection = BoundedConnection(config, ServerState(), {}, loop)
        connection.connection_made(wire)
        sent = longest = 0
        while answered < 2000 or answered < sent:
            if wire.reads and sent < 5000:
                connection.data_received(REQUEST * 1000)
                sent += 1000
            # Reads are few, so that what waits is what was read at once and no more.
            assert sent - answered <= 2000
            longest = max(longest, len(connection.pipeline))
            await asyncio.sleep(0)
        assert 0 < longest < 100
        connection.connection_lost(None)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_requests_that_come_at_once_are_answered_in_order() -> None:
    bodies = [b"x" * (number * 37 % 3000) for number in range(300)]
    sent = b"".join(
        b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body) for body in bodies
    )
    last = b"POST / HTTP/1.1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    answers = heard(sent + last).split(b"HTTP/1.1 200 OK\r\n")[1:]
    found = [int(answer.rpartition(b"\r\n\r\n")[2]) for answer in answers]
    assert found == [*map(len, bodies), 0]


def test_a_head_in_one_write_has_the_same_bound() -> None:
    head = b"GET / HTTP/1.1\r\nfill: " + b"a" * (MOST_HEAD + 5000) + b"\r\n\r\n"
    assert heard(head).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("long", [True, False], ids=["one long answer", "many short ones"])
def test_a_client_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    monkeypatch.setattr(server, "READS_WITHIN", 0.3)
    answer = b"x" * (30_000_000 if long else 30_000)
    ended: list[str] = []

    async def talkative(_: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
        ended.append((await receive())["type"])

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * (1 if long else 1000))
        await asyncio.sleep(1.5)
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        try:
            while await reader.read(1 << 20):
                pass
        except ConnectionError:
            return b"cut off"
        return b"cut off" if reader.at_eof() else b""

    assert connected(talk, talkative) == b"cut off"
    assert len(ended) < 1000


def test_empty_lines_keep_no_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ARRIVES_WITHIN", 0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n2")
        writer.write(b"\r\n")
        return await reader.read()

    assert connected(talk).startswith(b"HTTP/1.1 408 ")


def test_the_service_has_such_connections(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        swaps = LocalSwaps(client.service, tmp_path)
        config = Server(client.service, swaps, lambda: None).config
        config.load()
        assert config.http_protocol_class is BoundedConnection
        assert config.ws_protocol_class is None


def test_collections_spare_what_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spared: list[int] = []
    monkeypatch.setattr(server.Server, "run", lambda *_, **__: spared.append(gc.get_freeze_count()))
    handler = signal.getsignal(signal.SIGHUP)
    with serving(tmp_path / "log") as client, socket.create_server(("127.0.0.1", 0)) as sock:
        try:
            swaps = LocalSwaps(client.service, tmp_path)
            server.serve(client.service, sock, swaps, lambda: None)
        finally:
            gc.unfreeze()
            signal.signal(signal.SIGHUP, handler)
    assert spared[0] > 10_000


class WatchedSocket(socket.socket):
    """Notes in which turn of the event loop each connection was taken from it."""

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.turn, self.taken = 0, list[int]()

    def accept(self) -> tuple[socket.socket, Any]:
        found = super().accept()
        self.taken.append(self.turn)
        return found


def test_connections_that_wait_are_taken_one_by_one(tmp_path: Path) -> None:
    """By itself an event loop takes all at once, and other workers on the socket have none."""
    count = 5
    with serving(tmp_path) as client, WatchedSocket() as listening, ExitStack() as opened:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = listening.getsockname()
        for _ in range(count):
            opened.enter_context(socket.create_connection(address))

        async def take_all() -> None:
            swaps = LocalSwaps(client.service, tmp_path)
            running = Server(client.service, swaps, lambda: None)
            running.config.load()
            running.lifespan = running.config.lifespan_class(running.config)
            await running.startup([listening])
            deadline = time.monotonic() + 60
            while len(listening.taken) < count or not running.server_state.connections:
                assert time.monotonic() < deadline
                listening.turn += 1
                await asyncio.sleep(0)
            await running.shutdown([listening])

        asyncio.run(take_all())
        assert len(set(listening.taken)) == count


def test_who_has_more_connections_leaves_the_next_to_others(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        swaps = LocalSwaps(client.service, tmp_path)

        def pause(connections: int, *, shared: bool = True) -> float:
            running = Server(client.service, swaps, lambda: None, shared=shared)
            running.server_state.connections = set(range(connections))  # type: ignore[arg-type]
            return running._pause()

        pauses = [pause(number) for number in range(4)]
        assert 0 < pauses[0] < pauses[1] < pauses[2] < pauses[3]
        # Clients that open one for every request are still let in, faster than they are answered.
        assert pause(10_000) <= 0.002
        # Nobody else would take it.
        assert pause(10_000, shared=False) == 0
