"""The model that answers, with all that depends on it: one thing, which is replaced as a whole."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import Scorer
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.events.event_log import EventLog
from hstu_xd.serving.http.arrivals import Arrivals
from hstu_xd.serving.http.histories import Histories, Items, Rebuilds
from hstu_xd.serving.http.settings import ServiceSettings
from hstu_xd.serving.retrieval import ItemIndex
from hstu_xd.serving.session import EncoderSession
from hstu_xd.serving.stores import StateStore
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import open_data, read_run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Served:
    """What is served.

    Attributes:
        name: of the run.
        model: trained, on the CPU.
        window: longest history that is read, in events.
        prepared: earlier histories, if any.
        scorer: what ranks items; None: dot products.
        exclude_seen: whether items of a user's history are left out, unless a request says.
    """

    name: str
    model: CrossDomainHSTU
    window: int
    prepared: InteractionStore | None
    scorer: Scorer | None = None
    exclude_seen: bool = True

    @classmethod
    def from_run(
        cls, run: Path, settings: ServiceSettings, *, allow_imports: bool = False
    ) -> "Served":
        """Load what a run folder holds.

        Raises:
            InputError: not a run folder, modules that it may not import, or a store that is damaged
                or of other data.
        """
        return cls._load(run, _prepared(run, settings), allow_imports)

    def next_from_run(
        self, run: Path, settings: ServiceSettings, *, allow_imports: bool = False
    ) -> "Served":
        """Load a run that is to take this one's place, with the store that it was trained on.

        Raises:
            InputError: as :meth:`from_run`, or earlier histories that are served now are not there.
        """
        if self.prepared is None:
            prepared = _prepared(run, replace(settings, data=None))
        else:
            prepared = open_data(run, verify=settings.verify_data)
        return self._load(run, prepared, allow_imports)

    @classmethod
    def _load(cls, run: Path, prepared: InteractionStore | None, allow_imports: bool) -> "Served":
        trained = load_trained(run, allow_imports=allow_imports)
        return cls(
            run.resolve().name,
            trained.model,
            trained.model.window,
            prepared,
            trained.scorer,
            trained.protocol.exclude_seen,
        )


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
        served: the model and what is known of users.
        log: of the service.
        settings: of the service.
        rebuilds: the service's count of states that were made anew; None: it begins.

    Attributes:
        name: of the run, with the beginning of the fingerprint of its states.
        served: the model.
        catalog: of the model.
        items: of the catalogue.
        histories: what states are rebuilt from.
        arrivals: which events are taken.
    """

    def __init__(
        self,
        served: Served,
        log: EventLog,
        settings: ServiceSettings,
        rebuilds: Rebuilds | None = None,
    ) -> None:
        self.served, self._states = served, settings.states
        self.catalog: DomainCatalog = served.model.catalog
        self.items = Items(self.catalog)
        self.histories = Histories(log, self.catalog, self.items, served.prepared, rebuilds)
        self.arrivals = Arrivals(self.histories, log, self.items, settings.writes)
        # All sessions share one index: of millions of items it takes long to build.
        self._index = ItemIndex(served.model, settings.states.retrieval, served.scorer)
        version = fingerprint(served.model, served.window, torch.float32).hex()
        self.name = f"{served.name} {version[:12]}"

    def session(self, store: StateStore | None) -> EncoderSession:
        """Make a session over a store, or without one."""
        return EncoderSession(
            self.served.model,
            window=self.served.window,
            max_bytes=self._states.max_bytes,
            history=self.histories.all_of,
            store=store,
            versions=self.histories,
            retrieval=self._index,
        )

    def warm_up(self) -> None:
        """Answer an unknown user once, because the first call takes longer than later ones."""
        session = EncoderSession(
            self.served.model, window=self.served.window, retrieval=self._index
        )
        domains = range(self.catalog.num_domains)
        session.recommend([""] * len(domains), domains, 1)

    def changes_from(self, old: "LiveModel") -> Changes:
        """Compare the catalogue with that of the model before.

        Raises:
            InputError: a domain is gone, or none of a domain's items is left.
        """
        before, after = old.items.domains_by_token(), self.items.domains_by_token()
        kept = {token for token, domain in before.items() if after.get(token) == domain}
        left = {before[token] for token in kept}
        inhabited = set(before.values())
        for name in old.catalog.domain_names:
            if name not in self.catalog.domain_names:
                raise InputError(
                    f"{self.name} has no domain {name!r}, which {old.name} serves; train with all "
                    "of its domains, or start the service anew"
                )
            if name in inhabited and name not in left:
                raise InputError(
                    f"{self.name} has none of the items that {old.name} has in domain {name!r}; "
                    "serve a run of the same catalogue, or start the service anew"
                )
        changes = Changes(self.name, old.name, len(before) - len(kept), len(after) - len(kept))
        if changes.items_left:
            _log.warning(
                "%d of %d items have left with %s; their events are skipped",
                *(changes.items_left, len(before), self.name),
            )
        return changes


def _prepared(run: Path, settings: ServiceSettings) -> InteractionStore | None:
    if not settings.use_data:
        if settings.data is not None:
            raise InputError(f"--data {settings.data} with --no-data; drop one of them")
        if settings.verify_data:
            raise InputError("--verify with --no-data; drop one of them")
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
