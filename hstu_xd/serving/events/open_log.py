"""The log of a name: a file, or the URL of a PostgreSQL database."""

from pathlib import Path

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.events.event_log import EventLog
from hstu_xd.serving.events.sqlite_log import SQLiteLog


def is_postgres(name: str | Path) -> bool:
    """Return whether a name is the URL of a PostgreSQL database."""
    return str(name).startswith(("postgresql://", "postgres://"))


def shown_log(name: str | Path) -> str:
    """Return what of a log's name may be printed: not the URL, which may have a password."""
    return "PostgreSQL" if is_postgres(name) else str(name)


def open_log(name: str | Path) -> EventLog:
    """Open the log of a name; it is made where it is not there.

    Args:
        name: a file, or ``postgresql://[USER[:PASSWORD]@]HOST[:PORT]/DATABASE``.

    Raises:
        InputError: another kind of URL, or not a log of this hstu-xd.
        HstuXdError: psycopg is not installed.
        LogError: the log cannot be opened.
    """
    if is_postgres(name):
        try:
            from hstu_xd.serving.events.postgres_log import PostgresLog
        except ModuleNotFoundError as error:
            raise HstuXdError(
                'psycopg is not installed; pip install "hstu-xd[postgres]", or give --events a file'
            ) from error
        return PostgresLog(str(name))
    if isinstance(name, str) and "://" in name:
        raise InputError(
            "--events has another kind of URL; a file or postgresql://HOST:PORT/DATABASE is needed"
        )
    return SQLiteLog(Path(name))
