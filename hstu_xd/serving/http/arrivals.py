"""Which events of a request are new, which were known already, and which are refused and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hstu_xd.errors import InputError
from hstu_xd.serving.events.event_log import Event, EventLog
from hstu_xd.serving.http.histories import Histories, Items
from hstu_xd.serving.http.settings import WriteSettings

# A number of seconds above it is in the year 5138 or later: it counts in a smaller unit.
_SECONDS_END = 10**11
# Seconds until 1990: nobody's events are older.
_EARLIEST = 631_152_000
_UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}
# Refused events that the error of a request names.
_NAMED = 3


@dataclass(frozen=True)
class Append:
    """Take events. Result: an :class:`Outcome`.

    Attributes:
        events: in order.
        keys: by which each is known when it comes again; None: it has none.
        partial: take the others where some are refused; else none are taken then.
    """

    events: Sequence[Event]
    keys: Sequence[str | None]
    partial: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of the events of a request.

    Attributes:
        accepted: indices of those that are new.
        repeated: how many were known already.
        refused: index of each of the others, and why.
    """

    accepted: Sequence[int]
    repeated: int
    refused: Sequence[tuple[int, str]]


@dataclass
class Arrived:
    """Events of a batch that were accepted and are not in the log yet, and keys that are known.

    Attributes:
        last: time of a user's last event.
        events: how often each event came.
        keys: the event of each user's key, those of the log included.
    """

    last: dict[str, int] = field(default_factory=dict)
    events: Counter[Event] = field(default_factory=Counter)
    keys: dict[tuple[str, str], Event] = field(default_factory=dict)

    def take(self, event: Event, key: str | None) -> None:
        """Add an event."""
        self.last[event.user] = event.timestamp
        self.events[event] += 1
        if key is not None:
            self.keys[event.user, key] = event

    def copy(self) -> "Arrived":
        """Return one that goes on by itself."""
        return Arrived(dict(self.last), Counter(self.events), dict(self.keys))


class Arrivals:
    """Judges events before anything changes.

    Args:
        histories: what is known of users.
        log: where keys and earlier events are.
        items: of the catalogue.
        settings: what is taken.
    """

    def __init__(
        self,
        histories: Histories,
        log: EventLog,
        items: Items,
        settings: WriteSettings,
    ) -> None:
        self._histories, self._log, self._items = histories, log, items
        self._settings = settings
        self._last_prepared = histories.last_prepared()
        # Stores that were prepared by earlier versions may count in smaller units.
        self._unit = 1
        while self._last_prepared > _SECONDS_END * self._unit:
            self._unit *= 1000

    def begin(self, jobs: Sequence[Append]) -> Arrived:
        """Look at the users and keys of a batch's requests, none of whose events has arrived."""
        self._histories.look(event.user for job in jobs for event in job.events)
        keys = [
            (event.user, key)
            for job in jobs
            for event, key in zip(job.events, job.keys)
            if key is not None
        ]
        return Arrived(keys=self._log.events_of_keys(keys))

    def judge(self, job: Append, arrived: Arrived) -> Outcome:
        """Sort the events of a request; those that are new are added to what has arrived.

        Raises:
            InputError: some are refused and the request does not take the others; nothing is added.
        """
        present = arrived.copy() if len(job.events) > 1 else arrived
        accepted: list[int] = []
        refused: list[tuple[int, str]] = []
        fatal: list[tuple[int, str]] = []
        for index, (event, key) in enumerate(zip(job.events, job.keys)):
            unknown = self._items.find(event.item) is None
            try:
                if self._is_new(event, key, present):
                    present.take(event, key)
                    accepted.append(index)
            except InputError as error:
                refused.append((index, str(error)))
                if not (unknown and self._settings.unknown_items == "skip"):
                    fatal.append(refused[-1])
        if fatal and not job.partial:
            raise InputError(_sentence(fatal))
        arrived.last, arrived.events, arrived.keys = present.last, present.events, present.keys
        return Outcome(accepted, len(job.events) - len(accepted) - len(refused), refused)

    def check_request(self, timestamp: int | None) -> None:
        """Refuse the time of a request that counts in another unit than the events.

        Raises:
            InputError: it does.
        """
        if timestamp is None:
            return
        latest = max(self._latest(), _SECONDS_END * self._unit)
        if timestamp > latest:
            raise InputError(self._too_late(timestamp))

    def _is_new(self, event: Event, key: str | None, arrived: Arrived) -> bool:
        """Return whether an event is to be taken; if not, it is known already.

        Raises:
            InputError: neither.
        """
        if key is not None:
            known = arrived.keys.get((event.user, key))
            if known is not None:
                if known.item and known != event:
                    raise InputError(
                        f"the id or Idempotency-Key came before with item {known.item!r} at "
                        f"{known.timestamp}, now with {event.item!r} at {event.timestamp}; give "
                        "every event its own"
                    )
                return False
        self._items.id_of(event.item)
        if event.timestamp > self._latest():
            raise InputError(self._too_late(event.timestamp))
        last = arrived.last.get(event.user)
        if last is None:
            last = self._histories.last_time(event.user)
        if last is None or event.timestamp > last:
            return True
        if self._is_known(event, arrived):
            return False
        if event.timestamp < last:
            raise InputError(
                f"user {event.user!r}: an event at {event.timestamp} after one at {last}; append "
                "events in order of time, or remove the later one if it is wrong (POST "
                "/v1/events/remove)"
            )
        return True

    def _is_known(self, event: Event, arrived: Arrived) -> bool:
        # What training has taken from the log counts once, even where repeats are kept.
        if self._histories.count_prepared(event):
            return True
        return self._settings.repeats == "drop" and bool(
            arrived.events[event] or self._log.count(event)
        )

    def _latest(self) -> float:
        """Time of the latest event that may be true."""
        now = max(self._log.now() * self._unit, self._last_prepared)
        return now + self._settings.max_clock_skew * self._unit

    def _too_late(self, timestamp: int) -> str:
        now, unit = round(self._log.now() * self._unit), _UNITS.get(self._unit, "another unit")
        text = f"timestamp {timestamp} is in the future: times are in {unit}, and it is {now} now; "
        for times in (10**3, 10**6, 10**9):
            if _EARLIEST * self._unit <= timestamp // times <= self._latest():
                text += f"it looks like a smaller unit, divide it by {times}"
                break
        else:
            text += "mend the clock or the time zone it comes from"
        return f"{text}, or start the service with a larger --max-clock-skew"


def _sentence(refused: Sequence[tuple[int, str]]) -> str:
    """Name the first of the refused events by their places in the request."""
    named = "; ".join(f"events.{index}: {error}" for index, error in refused[:_NAMED])
    more = len(refused) - _NAMED
    return f"{named}; and {more} more" if more > 0 else named
