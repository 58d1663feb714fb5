"""The model that answers, with all that depends on it: one thing, which is replaced as a whole."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RANKING
from hstu_xd.ranking.run import open_store
from hstu_xd.serving.events.event_log import EventLog
from hstu_xd.serving.http.arrivals import Arrivals
from hstu_xd.serving.http.engine import Engine, Session
from hstu_xd.serving.http.histories import Histories, Rebuilds
from hstu_xd.serving.http.ranking_engine import RankingEngine
from hstu_xd.serving.http.retrieval_engine import RetrievalEngine
from hstu_xd.serving.http.settings import ServiceSettings
from hstu_xd.serving.items import Items
from hstu_xd.serving.stores import StateStore
from hstu_xd.training.run_facts import kind_of, open_data, read_run

_log = logging.getLogger(__name__)


def load_engine(
    run: Path,
    settings: ServiceSettings,
    *,
    allow_imports: bool = False,
    replaces: Engine | None = None,
) -> Engine:
    """Load what a run folder holds, of either kind.

    Args:
        run: the folder.
        settings: of the service.
        allow_imports: whether the run may import modules of its own.
        replaces: what it is to take the place of; it is asked with the store that it was trained
            on then.

    Raises:
        InputError: not a run folder, modules that it may not import, a store that is damaged or of
            other data, earlier histories that are served now are not there, or a run of another
            kind than the one that it replaces.
    """
    kind = kind_of(read_run(run))
    if replaces is not None:
        settings = replace(settings, data=None)
        if kind != replaces.kind:
            raise InputError(
                f"{run.name} is a {kind} run, and {replaces.name} a {replaces.kind} run; name one "
                "of the same kind, or start the service anew"
            )
    if kind == RANKING:
        _check_data_options(settings)
        # Without histories, too: it has the levels of the items.
        store = open_store(run, settings.data, verify=settings.verify_data)
        prepared = store if settings.use_data else None
        return RankingEngine.from_run(run, store, prepared, settings.states)
    if replaces is not None and replaces.prepared is not None:
        prepared = open_data(run, verify=settings.verify_data)
    else:
        prepared = _prepared(run, settings)
    return RetrievalEngine.from_run(run, prepared, settings.states, allow_imports=allow_imports)


@dataclass(frozen=True)
class Changes:
    """What another model brings with it.

    Attributes:
        model: name of the new one.
        previous: name of the one before.
        items_left: items that the new one does not have, or has in another domain.
        items_new: items that it has and the one before did not.
    """

    model: str
    previous: str
    items_left: int
    items_new: int


class LiveModel:
    """A model, its catalogue, histories in its item ids, and which events it takes.

    Nothing of it changes once it is made; users' states are in sessions that it makes.

    Args:
        engine: the model and what is known of users.
        log: of the service.
        settings: of the service.
        rebuilds: the service's count of states that were made anew; None: it begins.

    Attributes:
        name: of the run, with the beginning of its version.
        engine: the model.
        catalog: of the model.
        items: of the catalogue.
        histories: what states are rebuilt from.
        arrivals: which events are taken.
    """

    def __init__(
        self,
        engine: Engine,
        log: EventLog,
        settings: ServiceSettings,
        rebuilds: Rebuilds | None = None,
    ) -> None:
        self.engine = engine
        self.catalog: DomainCatalog = engine.catalog
        self.items = Items(self.catalog)
        self.histories = Histories(log, self.catalog, self.items, engine.prepared, rebuilds)
        self.arrivals = Arrivals(self.histories, log, self.items, settings.writes)
        self.name = f"{engine.name} {engine.version[:12]}"

    def session(self, store: StateStore | None) -> Session:
        """Make a session over a store, or without one."""
        return self.engine.session(self.histories, store)

    def changes_from(self, old: "LiveModel") -> Changes:
        """Compare the catalogue with that of the model before.

        Raises:
            InputError: a domain is gone, none of a domain's items is left, or what the engine
                refuses.
        """
        self.engine.check_replaces(old.engine)
        changes = self.changes_to(old.name, old.catalog.domain_names, old.items.domains_by_token())
        if changes.items_left:
            _log.warning(
                "%d of %d items have left with %s; their events are skipped",
                *(changes.items_left, len(old.items), self.name),
            )
        return changes

    def changes_to(self, name: str, domains: Sequence[str], before: Mapping[str, str]) -> Changes:
        """Compare the catalogue with what another model's has.

        Args:
            name: of the other model.
            domains: that it has.
            before: its items, and the domain of each.

        Raises:
            InputError: a domain is not here, or none of a domain's items is.
        """
        after = self.items.domains_by_token()
        kept = {token for token, domain in before.items() if after.get(token) == domain}
        left = {before[token] for token in kept}
        inhabited = set(before.values())
        for domain in domains:
            if domain not in self.catalog.domain_names:
                raise InputError(
                    f"{self.name} has no domain {domain!r}, which {name} serves; train with all "
                    "of its domains, or start the service anew"
                )
            if domain in inhabited and domain not in left:
                raise InputError(
                    f"{self.name} has none of the items that {name} has in domain {domain!r}; "
                    "serve a run of the same catalogue, or start the service anew"
                )
        return Changes(self.name, name, len(before) - len(kept), len(after) - len(kept))


def _check_data_options(settings: ServiceSettings) -> None:
    if settings.use_data:
        return
    if settings.data is not None:
        raise InputError(f"--data {settings.data} with --no-data; drop one of them")
    if settings.verify_data:
        raise InputError("--verify with --no-data; drop one of them")


def _prepared(run: Path, settings: ServiceSettings) -> InteractionStore | None:
    _check_data_options(settings)
    if not settings.use_data:
        return None
    if settings.data is not None:
        return open_data(run, settings.data, verify=settings.verify_data)
    own = Path(read_run(run)["data"])
    if not settings.verify_data and _is_absent(own):
        _log.warning("serving without earlier histories: %s is not there; pass --data STORE", own)
        return None
    try:
        return open_data(run, verify=settings.verify_data)
    except InputError as error:
        raise InputError(f"{error}; or start without earlier histories: --no-data") from error


def _is_absent(folder: Path) -> bool:
    """Return whether nothing is there; what may not be looked at is not taken for that."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
