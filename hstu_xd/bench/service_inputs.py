"""What a service under load is given: a log of its own, perhaps a long one, and a run."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from hstu_xd.bench.cases import Case
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError

USERS, ITEMS_PER_DOMAIN = 300, 2000
# How names of users begin whom a log has from the start: behind all others, so that they are told
# from those who are under load.
EARLIER = "~earlier "
# Events of each of them, and events that are written at once.
_EACH, _AT_ONCE = 100, 5_000
# Seconds that Redis keeps a state: nothing of a measurement is left there for long.
_KEPT = 3600


@dataclass(frozen=True)
class Setup:
    """How a run is served.

    Attributes:
        name: of the row.
        workers: processes.
        events: URL of a PostgreSQL server; None: a file.
        store: of states, as serve takes it.
        apart: each process is a service of its own, which has its own users; else they share a
            socket, and any of them gets any user.
    """

    name: str
    workers: int
    events: str | None
    store: str = "memory"
    apart: bool = False

    @property
    def place_of_states(self) -> str:
        """Return what a row calls the store, whose name may have a password."""
        kind = self.store.partition(":")[0]
        return {"memory": "memory", "sqlite": "SQLite"}.get(kind, "Redis")

    @property
    def services(self) -> int:
        """Return how many services there are."""
        return self.workers if self.apart else 1

    @property
    def options(self) -> list[str]:
        """Return the options of each service, but for its log."""
        workers = self.workers // self.services
        options = ["--workers", str(workers), "--store", self.store]
        if self.place_of_states == "Redis":
            options += ["--store-ttl", str(_KEPT)]
        return options

    @contextmanager
    def log(self, folder: Path) -> Iterator[str]:
        """Give a log of its own, of which nothing is left in the end."""
        if self.events is None:
            yield str(folder / f"events-{secrets.token_hex(4)}.sqlite")
            return
        import psycopg

        url, database = urlsplit(self.events), f"hstu_xd_bench_{secrets.token_hex(4)}"
        query = f"?{url.query}" if url.query else ""
        try:
            with psycopg.connect(self.events, autocommit=True) as server:
                server.execute(f"CREATE DATABASE {database}")
                try:
                    yield f"{url.scheme}://{url.netloc}/{database}{query}"
                finally:
                    server.execute(f"DROP DATABASE {database} WITH (FORCE)")
        except psycopg.Error as error:
            raise HstuXdError(
                f"PostgreSQL: {str(error).strip()}; --events needs a server that may make databases"
            ) from error


def earlier_users(events: int) -> int:
    """Return how many users have so many events, see :func:`fill_log`."""
    return -(-events // _EACH)


def fill_log(name: str, catalog: DomainCatalog, events: int) -> None:
    """Write events of earlier users, 100 each but for the last, in the order of their times.

    Args:
        name: of the log, see :func:`hstu_xd.serving.events.open_log.open_log`.
        catalog: whose items they are of, in turns.
        events: how many.
    """
    from hstu_xd.serving.events.event_log import Event
    from hstu_xd.serving.events.open_log import open_log

    tokens = [catalog.token(item) for item in catalog.domain_items.tolist()]
    users, block = earlier_users(events), _AT_ONCE // _EACH
    log = open_log(name)
    for first in range(0, users, block):
        log.add(
            [
                Event(f"{EARLIER}{user}", tokens[(7 * user + number) % len(tokens)], number)
                for user in range(first, min(first + block, users))
                for number in range(min(_EACH, events - _EACH * user))
            ]
        )
    log.close()


def synthetic_run(folder: Path, case: Case) -> Path:
    """Write a run with every switch on and random weights, over a synthetic store."""
    from hstu_xd.data.store import InteractionStore
    from hstu_xd.data.synthetic import SynthOptions, synthesize
    from hstu_xd.model.hstu import CrossDomainHSTU
    from hstu_xd.training.checkpoint import MODEL_FILE, save_checkpoint
    from hstu_xd.training.distributed import World
    from hstu_xd.training.run_facts import lay_out
    from hstu_xd.training.settings import RunSettings, TrainSettings

    options = SynthOptions(
        users=USERS,
        domains=case.num_domains,
        items_per_domain=ITEMS_PER_DOMAIN,
        mean_length=max(5, case.seq_len),
    )
    synthesize(folder / "data", options)
    store = InteractionStore.open(folder / "data")
    encoder = {
        "num_blocks": case.layers,
        "num_heads": case.heads,
        "dqk": case.dqk,
        "dv": case.dv,
        "domain_mask": True,
        "tape": True,
        "ddsr": True,
        "target_domain_embedding": True,
        "target_view_heads": case.heads // 2,
    }
    train = TrainSettings(max_sequence_length=case.seq_len, item_embedding_dim=case.width)
    settings = RunSettings(encoder, train)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = CrossDomainHSTU(store.catalog, settings.encoder_settings(store.num_domains))
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    here = World(0, 1, torch.device("cpu"))
    lay_out(folder / "run", store, settings, model, "random weights", here)
    save_checkpoint(folder / "run" / MODEL_FILE, model.state_dict(), {})
    return folder / "run"
