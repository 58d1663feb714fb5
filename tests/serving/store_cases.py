"""Stores under test, and a real Redis for the tests that need one."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.serving.stores import MemoryStore, RedisStore, SQLiteStore, StateStore, StoreError

KINDS = ("memory", "sqlite", "redis")


@contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    """A real server on a socket in a folder of its own."""
    missing = [] if find_spec("redis") else ["redis-py"]
    program = shutil.which("redis-server")
    if missing or program is None:
        missing += [] if program else ["redis-server"]
        pytest.skip(f"no {' and no '.join(missing)} here: states in Redis are NOT covered")
    from redis import Redis, RedisError

    socket = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    server = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                Redis(unix_socket_path=str(socket)).ping()
                break
            except RedisError:
                time.sleep(0.02)
        yield socket
    finally:
        server.kill()
        server.wait()


def open_store(kind: str, folder: Path) -> StateStore:
    """The store of a kind in a folder; opened twice, it is the same one (but for memory)."""
    if kind == "memory":
        return MemoryStore()
    if kind == "sqlite":
        return SQLiteStore(folder / "states.sqlite")
    from redis import Redis

    return RedisStore(Redis(unix_socket_path=str(folder / "redis.sock")))


@contextmanager
def place(kind: str, folder: Path) -> Iterator[Path]:
    """A folder where stores of a kind can be opened."""
    if kind != "redis":
        yield folder
        return
    with redis_server(folder):
        yield folder


class Unsteady(MemoryStore):
    """A store that can go away."""

    gone = False
    failures = 0

    def get(self, users: Any) -> Any:
        self._check()
        return super().get(users)

    def put(self, writes: Any) -> Any:
        self._check()
        return super().put(writes)

    def delete(self, user: str) -> bool:
        self._check()
        return super().delete(user)

    def _check(self) -> None:
        if self.gone:
            self.failures += 1
            raise StoreError("the store is gone")
