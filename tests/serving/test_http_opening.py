"""A service is ready whatever its log has: nothing of the events is read before somebody asks."""

import sqlite3
import time
from itertools import count
from pathlib import Path

import pytest
from log_cases import postgres_server
from service_client import Client, events, right, serving

from hstu_xd.serving.events import sqlite_log


def fill(client: Client, users: int) -> None:
    for number in range(users):
        assert client.append(*events(20, f"u{number}")).status_code == 200


def test_opening_a_file_costs_the_same_whatever_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, steps = sqlite3.connect, count()

    def counting(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        # Called for every instruction of SQLite's machine.
        connection.set_progress_handler(lambda: next(steps) < 0, 1)
        return connection

    def cost_of_opening(folder: Path) -> int:
        with monkeypatch.context() as watched:
            watched.setattr(sqlite_log.sqlite3, "connect", counting)
            before = next(steps)
            with serving(folder) as client:
                assert client.ask("GET", "/readyz").status_code == 200
                return next(steps) - before

    for name, users in (("few", 1), ("many", 50)):
        with serving(tmp_path / name) as client:
            fill(client, users)
    assert cost_of_opening(tmp_path / "few") == cost_of_opening(tmp_path / "many") > 0
    with serving(tmp_path / "many") as client:
        assert right(client, 20, "u49")


def test_opening_a_database_reads_none_of_its_events(tmp_path: Path) -> None:
    with postgres_server() as server:
        log = server.database()
        with serving(tmp_path, log=log) as client:
            fill(client, 5)

        def scans() -> int:
            """How often the events were looked at by services that have ended."""
            there = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hstu-xd'"
            deadline = time.monotonic() + 60
            # A connection counts what it has done before it is gone.
            while server.ask_sql(there, log) != [(0,)]:
                assert time.monotonic() < deadline
            ((found,),) = server.ask_sql(
                "SELECT coalesce(seq_scan, 0) + coalesce(idx_scan, 0) FROM pg_stat_user_tables "
                "WHERE schemaname = 'hstu_xd' AND relname = 'events'",
                log,
            )
            return found

        before = scans()
        with serving(tmp_path, log=log) as client:
            assert client.ask("GET", "/readyz").status_code == 200
        opened = scans()
        with serving(tmp_path, log=log) as client:
            assert right(client, 20, "u4")
        assert before == opened < scans()
