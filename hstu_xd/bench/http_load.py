"""Load on an HTTP service over raw sockets: as fast as it answers, or at a given rate."""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

# Connections of a load that does not wait for answers. When all are taken, further requests wait
# here, and this time counts as time of the answer.
_MOST_CONNECTIONS = 256
# Collections of garbage until one looks through all objects: more than there are.
_NEVER = 1 << 30


@dataclass(frozen=True)
class Call:
    """A request: a path, and a body to be posted or None to get.

    Attributes:
        path: with its query.
        body: as above.
        server: which of a load's servers is asked.
    """

    path: str
    body: dict[str, Any] | None = None
    server: int = 0

    def encode(self) -> bytes:
        """Return the bytes of the request in HTTP/1.1."""
        if self.body is None:
            return f"GET {self.path} HTTP/1.1\r\nhost: load\r\n\r\n".encode()
        body = json.dumps(self.body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass(frozen=True)
class Outcome:
    """The answer to a call, or its failure.

    Attributes:
        call: the call.
        status: status of HTTP; 0 where the connection broke.
        seconds: from the time the call was due to the end of its answer.
        answer: the body of the answer.
    """

    call: Call
    status: int
    seconds: float
    answer: bytes


class Load:
    """Calls servers on this machine and returns the outcome of every call.

    Args:
        ports: of the servers.
    """

    def __init__(self, *ports: int) -> None:
        self._ports = ports
        self._idle: list[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
        self._idle = [[] for _ in ports]

    def closed(
        self, draw: Callable[[], Call | None], *, seconds: float, connections: int
    ) -> list[Outcome]:
        """Send calls from connections that each wait for the answer before their next call.

        Args:
            draw: makes the next call, or None when there are no more.
            seconds: time after which no further call is sent.
            connections: number of connections.
        """

        async def run() -> list[Outcome]:
            until, outcomes = time.perf_counter() + seconds, []

            async def keep_asking() -> None:
                while time.perf_counter() < until and (call := draw()) is not None:
                    outcomes.append(await self._ask(call, time.perf_counter()))

            await asyncio.gather(*(keep_asking() for _ in range(connections)))
            self._close()
            return outcomes

        with _without_pauses():
            return asyncio.run(run())

    def open(
        self, draw: Callable[[], Call], *, rate: float, seconds: float, seed: int = 0
    ) -> list[Outcome]:
        """Send calls at random times, whether or not earlier ones are answered.

        Args:
            draw: makes the next call.
            rate: calls a second, on average.
            seconds: time after which no further call is sent; all answers are waited for.
            seed: seed of the random times.
        """
        gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds))

        async def run() -> list[Outcome]:
            tasks, room = [], asyncio.Semaphore(_MOST_CONNECTIONS)

            async def ask(call: Call, due: float) -> Outcome:
                async with room:
                    return await self._ask(call, due)

            start = time.perf_counter()
            for due in (start + gaps.cumsum()).tolist():
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.ensure_future(ask(draw(), due)))
            outcomes = await asyncio.gather(*tasks)
            self._close()
            return outcomes

        with _without_pauses():
            return asyncio.run(run())

    async def _ask(self, call: Call, due: float) -> Outcome:
        idle, port = self._idle[call.server], self._ports[call.server]
        try:
            if not idle:
                idle.append(await asyncio.open_connection("127.0.0.1", port))
            reader, writer = idle.pop()
            writer.write(call.encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            return Outcome(call, 0, time.perf_counter() - due, repr(error).encode())
        idle.append((reader, writer))
        return Outcome(call, int(head.split(b" ", 2)[1]), time.perf_counter() - due, answer)

    def _close(self) -> None:
        for idle in self._idle:
            for _, writer in idle:
                writer.close()
            idle.clear()


@contextmanager
def _without_pauses() -> Iterator[None]:
    """Collect only young garbage: of all outcomes it takes longer than any answer."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
