"""What is known of every user: the prepared store's history, then what the log has on top."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.serving.events.event_log import Event, EventLog, Logged
from hstu_xd.serving.items import Items

_log = logging.getLogger(__name__)


@dataclass
class Rebuilds:
    """How often states were made anew, by all models of a service: it never falls.

    Attributes:
        count: readings of the events of a user who has some, to make a state or to add to one.
    """

    count: int = 0


class Histories:
    """Events by user: a session rebuilds states from them, and checks stored states by them.

    Args:
        log: of the service.
        catalog: of the model.
        items: of the same catalogue.
        prepared: store with earlier histories; None: there are none.
        rebuilds: where it is counted; None: a count of its own.

    Attributes:
        rebuilds: the count.
    """

    def __init__(
        self,
        log: EventLog,
        catalog: DomainCatalog,
        items: Items,
        prepared: InteractionStore | None = None,
        rebuilds: Rebuilds | None = None,
    ) -> None:
        self._log, self._catalog, self._items, self._prepared = log, catalog, items, prepared
        # The word tells states in which events of both counted twice from those without.
        self._origin = b""
        if prepared is not None:
            self._origin = b"merged " + repr(prepared.manifest["hashes"]).encode()
        self._unknown: set[str] = set()
        self._looked: dict[str, Logged] = {}
        self.rebuilds = rebuilds or Rebuilds()

    def look(self, users: Iterable[str]) -> None:
        """Read at once what the log has of users, for all that is asked of them until the next."""
        names = list(dict.fromkeys(users))
        self._looked = dict(zip(names, self._log.read(names, 1)))

    def versions(self, users: Iterable[str]) -> Mapping[str, bytes]:
        """Return the log's versions of users as they were looked at."""
        return {user: self._of(user).version for user in users}

    def all_of(self, user: Hashable) -> tuple[list[int], list[int]]:
        """Return item ids and times of a user's events, oldest first: a session's ``history``."""
        events = self._events(self._read(str(user)))
        self.rebuilds.count += bool(events)
        return [item for item, _ in events], [time for _, time in events]

    def last_of(self, user: str, limit: int) -> list[Event]:
        """Return a user's last events, oldest first."""
        events = self._events(self._read(user))[-limit:]
        return [Event(user, self._catalog.token(item), time) for item, time in events]

    def users(self, prefix: str, limit: int) -> list[str]:
        """Return the names of at most ``limit`` users, in order, that begin with a text."""
        earlier: list[str] = []
        start = prefix
        while self._prepared is not None:
            some = self._prepared.users_from(start, limit)
            logged = zip(some, self._log.read(some, 0))
            earlier += [name for name, known in logged if not known.restarted]
            if len(some) < limit or len(earlier) >= limit:
                break
            start = some[-1] + "\0"
        names = {*self._log.users_from(prefix, limit), *earlier}
        return sorted(name for name in names if name.startswith(prefix))[:limit]

    def forget(self, user: str) -> bool:
        """Remove a user from the log, hide the prepared history, and say whether one was there."""
        (logged,) = self._log.read([user], 1)
        known = bool(self._earlier(user, logged) or logged.events)
        if known:
            self._log.forget(user)
        return known

    def remove(self, event: Event) -> int:
        """Remove one event of a user, prepared or logged; returns how often it was there."""
        self.look([event.user])
        prepared = self.count_prepared(event)
        if not prepared and not self._log.count(event):
            return 0
        return max(prepared, self._log.remove(event, hide=bool(prepared)))

    def count_prepared(self, event: Event) -> int:
        """Return how often the prepared store has an event."""
        found = self._items.find(event.item)
        if found is None:
            return 0
        return self._earlier(event.user, self._of(event.user)).count((found, event.timestamp))

    def last_time(self, user: str) -> int | None:
        """Return the time of a user's last event; None without events."""
        logged = self._of(user)
        last = logged.events[-1:]
        if last and self._items.find(last[0].item) is None:
            # Its item left the catalogue: what counts is before it.
            return max((time for _, time in self._events(self._read(user))), default=None)
        earlier = self._earlier(user, logged)
        times = [event.timestamp for event in last] + [time for _, time in earlier[-1:]]
        return max(times, default=None)

    def last_prepared(self) -> int:
        """Return the time of the last prepared event of all users; 0 where there is none."""
        if self._prepared is None or not self._prepared.num_interactions:
            return 0
        # Some users may have no events; the place before the first one is then any event.
        return int(self._prepared.timestamps[self._prepared.offsets[1:] - 1].max())

    def present(self, user: str) -> bytes:
        """Return a user's version, see :class:`hstu_xd.serving.stored_states.Versions`."""
        return self._of(user).version + self._origin

    def following(self, user: str) -> bytes:
        """Return the version of a user's history after the next batch of events."""
        return self._log.upcoming + self._origin

    def _of(self, user: str) -> Logged:
        """Return what was looked at; of a user who was not, what there is now."""
        return self._looked.get(user) or self._log.read([user], 1)[0]

    def _read(self, user: str) -> tuple[str, Logged]:
        """Return the user with all that is logged."""
        return user, self._log.read([user])[0]

    def _events(self, known: tuple[str, Logged]) -> list[tuple[int, int]]:
        """Return (item id, timestamp) pairs of a user's events, oldest first.

        After a training on what the service has taken, the log and the prepared store have the
        same events; each counts as often as where it is more often.
        """
        earlier, logged = self._earlier(*known), self._logged(known[1])
        if not earlier or not logged:
            return earlier or logged
        both, new = Counter(earlier), []
        for event in logged:
            if both[event] > 0:
                both[event] -= 1
            else:
                new.append(event)
        events = earlier + new
        if new and new[0][1] < earlier[-1][1]:
            # They were logged by a service that did not know the earlier history.
            events.sort(key=lambda event: event[1])
        return events

    def _earlier(self, user: str, logged: Logged) -> list[tuple[int, int]]:
        """Return the same pairs of the prepared store, without those that were removed."""
        prepared = self._prepared
        index = None if prepared is None else prepared.find_user(user)
        if prepared is None or index is None or logged.restarted:
            return []
        items, times = prepared.history(index)
        events = list(zip(items.tolist(), times.tolist()))
        if not logged.hidden:
            return events
        return [
            (item, time)
            for item, time in events
            if (self._catalog.token(item), time) not in logged.hidden
        ]

    def _logged(self, logged: Logged) -> list[tuple[int, int]]:
        """Return the same pairs of the log, without items that the catalogue does not have."""
        known: list[tuple[int, int]] = []
        for event in logged.events:
            found = self._items.find(event.item)
            if found is not None:
                known.append((found, event.timestamp))
            elif event.item not in self._unknown:
                self._unknown.add(event.item)
                _log.warning(
                    "the catalogue has no item %r; its logged events are skipped", event.item
                )
        return known
