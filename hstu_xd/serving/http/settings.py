"""What the service is told when it starts, with the defaults of the command."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hstu_xd.cores import usable_cores
from hstu_xd.errors import InputError


def default_threads() -> int:
    """Return all cores but one: threads of PyTorch must not wait for the thread of HTTP."""
    return max(1, usable_cores() - 1)


def shown(store: str) -> str:
    """Return what of a store's name may be printed: of a URL, which may have a password, the kind.

    Args:
        store: see :class:`StateSettings`.
    """
    if "@" not in store and "//" not in store:
        return store
    kind, colon, _ = store.partition(":")
    return f"{kind}:..." if colon and "@" not in kind and "//" not in kind else "..."


@dataclass(frozen=True)
class QueueSettings:
    """Bounds of the queue in front of the session, and of its batches.

    Attributes:
        max_batch: jobs that are handled together.
        max_wait: seconds that a batch waits for more jobs once there is one.
        max_queue: jobs that wait, at most.
        max_delay: seconds that a job may be expected to wait; one more is refused beyond it.
    """

    max_batch: int = 32
    max_wait: float = 0.0
    max_queue: int = 1024
    max_delay: float = 0.1

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1:
            raise InputError(
                f"max_batch is {self.max_batch} and max_queue {self.max_queue}; at least 1 each"
            )
        if self.max_wait < 0 or self.max_delay <= 0:
            raise InputError(
                f"max_wait is {self.max_wait} s and max_delay {self.max_delay} s; at least 0, and "
                "more than 0"
            )


@dataclass(frozen=True)
class Limits:
    """Bounds of a single request.

    Attributes:
        max_body: bytes of a request's body.
        max_k: recommended items of a domain.
        max_events: events of a request.
        max_items: scored items of a request.
    """

    max_body: int = 1 << 20
    max_k: int = 1000
    max_events: int = 1000
    max_items: int = 1000


@dataclass(frozen=True)
class WriteSettings:
    """Which events are taken.

    Attributes:
        repeats: an event of a user, item and time that is known already counts again ("keep") or
            is dropped ("drop").
        unknown_items: an item that the catalogue does not have refuses the request, or its event
            only ("skip").
        max_clock_skew: seconds that an event may be ahead of the clock, and of the last prepared
            event.
    """

    repeats: Literal["keep", "drop"] = "keep"
    unknown_items: Literal["refuse", "skip"] = "refuse"
    max_clock_skew: float = 3600.0


@dataclass(frozen=True)
class StateSettings:
    """Where states of users are kept, and how they are read; events rebuild them at any time.

    Attributes:
        store: "memory", "sqlite:FILE" or "redis://...".
        ttl: seconds after it was last written that Redis keeps a state; None: for good.
        store_every: events of a user from one writing of its state to the next; the log has those
            that a stored state lacks.
        when_store_fails: "refuse" requests that need it, or "rebuild" states in memory until it is
            back.
        max_bytes: bound on the states in memory.
        threads: of PyTorch, for rebuilding long histories; None: :func:`default_threads`.
        retrieval: "exact" or "approximate", see :class:`hstu_xd.serving.retrieval.ItemIndex`.

    Raises:
        InputError: a lifetime for states that are not in Redis.
    """

    store: str = "memory"
    ttl: int | None = None
    when_store_fails: Literal["refuse", "rebuild"] = "refuse"
    max_bytes: int = 1 << 30
    threads: int | None = None
    retrieval: str = "exact"
    store_every: int = 8

    def __post_init__(self) -> None:
        if self.ttl is not None and not self.store.startswith(("redis", "unix")):
            raise InputError(
                f"ttl is {self.ttl} s, but the store is {shown(self.store)!r}; only Redis lets "
                "states expire: drop the one or change the other"
            )


@dataclass(frozen=True)
class LogSettings:
    """What is written to stderr, see :mod:`hstu_xd.serving.http.access_log`.

    Attributes:
        level: "info", "warning" or "error"; "info" adds a line for every request.
        format: "text", or "json": one object a line.
    """

    level: Literal["info", "warning", "error"] = "warning"
    format: Literal["text", "json"] = "text"


@dataclass(frozen=True)
class ServiceSettings:
    """Everything the service needs beside a trained run.

    Attributes:
        events: file of the event log, or postgresql://...
        data: prepared store with earlier histories; None: the run's own, where one is there.
        use_data: whether earlier histories are read at all.
        verify_data: compare the hash of every file of the store with its manifest first.
        token: what clients must present; None: nothing.
        drain_seconds: how long accepted requests may take once the service is to stop.
        root_path: prefix under which a proxy shows the service; empty: none.
        traces: URL that spans of requests are posted to, by OTLP; None: there are none.
    """

    events: Path | str
    data: Path | None = None
    use_data: bool = True
    verify_data: bool = False
    token: str | None = None
    drain_seconds: float = 5.0
    root_path: str = ""
    traces: str | None = None
    queue: QueueSettings = field(default_factory=QueueSettings)
    limits: Limits = field(default_factory=Limits)
    writes: WriteSettings = field(default_factory=WriteSettings)
    states: StateSettings = field(default_factory=StateSettings)

    def __post_init__(self) -> None:
        root = self.root_path
        if root and not re.fullmatch(r"(/[\w.~%-]+)+", root, re.ASCII):
            raise InputError(
                f"root_path is {root!r}; a path such as /recommendations is needed, with a slash "
                "before it and none after"
            )
