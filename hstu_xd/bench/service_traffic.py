"""What clients ask of a service under load, and whom: the one server, or that of their user."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hstu_xd.bench.http_load import Call, Load, Outcome
from hstu_xd.bench.service_inputs import EARLIER, USERS
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError

_TOP = 10
# Later than all events of a log, whatever its unit; events of the same time keep their order.
NOW = 2**44
# How often what is not measured is sent again to a busy service, and seconds in between.
_TRIES, _PAUSE = 20, 0.5
# How often all users are asked for before anything is measured, at most; and how often without a
# state that had to be made. Connections that do so.
_ROUNDS, _QUIET, _CONNECTIONS = 50, 3, 8


@dataclass(frozen=True)
class Answers:
    """What was recommended to users, one after the other.

    Attributes:
        found: by user the items and their scores.
        ms_median: of an answer.
    """

    found: dict[str, dict[str, float]]
    ms_median: float


class Traffic:
    """Calls about users: events and recommendations.

    Args:
        catalog: whose items and domains are drawn from.
        ports: of the servers; where there are several, each has its own users, as a proxy would
            send them.
    """

    def __init__(self, catalog: DomainCatalog, ports: Sequence[int]) -> None:
        self._catalog, self._ports = catalog, tuple(ports)
        self._random = random.Random(0)
        self._items = [catalog.token(item) for item in catalog.domain_items.tolist()]
        (outcome,) = self._ask_all([Call(f"/v1/users?limit={USERS}")])
        names = [n for n in json.loads(outcome.answer)["users"] if not n.startswith(EARLIER)]
        self.users = names or [f"user-{number}" for number in range(USERS)]

    def load(self) -> Load:
        """Make a load on the servers."""
        return Load(*self._ports)

    def draw(self) -> Call:
        """Draw the next call: an event of a user, or recommendations for a user."""
        user = self._random.choice(self.users)
        if self._random.random() < 0.5:
            item = self._random.choice(self._items)
            event = {"user": user, "item": item, "timestamp": NOW}
            return Call("/v1/events", {"events": [event]}, self._server(user))
        return self._recommend(user, self._random.choice(self._catalog.domain_names))

    def build_states(self) -> bool:
        """Ask for all users until no worker has a state left to make: nobody measures that.

        Returns:
            Whether it came to that; not where there is no room for all states.
        """
        domain, made, quiet = self._catalog.domain_names[0], -1.0, 0
        for _ in range(_ROUNDS):
            draw = partial(next, iter([self._recommend(u, domain) for u in self.users]), None)
            outcomes = self.load().closed(draw, seconds=600, connections=_CONNECTIONS)
            before, made = made, self._sum("hstu_xd_states_rebuilt_total")
            # One worker may have answered all users of a round; who was refused has no state yet.
            is_quiet = made == before and all(x.status == 200 for x in outcomes)
            quiet = quiet + 1 if is_quiet else 0
            if quiet == _QUIET:
                return True
        return False

    def answers(self, users: Sequence[str]) -> Answers:
        """Ask for recommendations of each user's domain, see :func:`domain_of`."""
        names = self._catalog.domain_names
        calls = [self._recommend(user, names[domain_of(user, self._catalog)]) for user in users]
        found = {}
        outcomes = self._ask_all(calls)
        for call, outcome in zip(calls, outcomes):
            (rows,) = json.loads(outcome.answer)["recommendations"]
            assert call.body is not None
            found[call.body["user"]] = {row["item"]: row["score"] for row in rows["items"]}
        return Answers(found, float(np.median([1e3 * outcome.seconds for outcome in outcomes])))

    def _server(self, user: str) -> int:
        return sum(user.encode()) % len(self._ports)

    def _recommend(self, user: str, domain: str) -> Call:
        """Ask for recommendations of a domain, items that the user has seen included."""
        body = {"user": user, "domains": [domain], "k": _TOP, "exclude_seen": False}
        return Call("/v1/recommend", body, self._server(user))

    def _sum(self, name: str) -> float:
        """Return a number of the service, of all servers and their workers."""
        call, count = Call("/metrics"), len(self._ports)
        outcomes = self._ask_all([replace(call, server=server) for server in range(count)])
        lines = [line for x in outcomes for line in x.answer.decode().splitlines()]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def _ask_all(self, calls: list[Call]) -> list[Outcome]:
        """Send calls one after the other, again where the service is busy; each must succeed."""
        return [_ask(self.load(), call) for call in calls]


def _ask(load: Load, call: Call) -> Outcome:
    for _ in range(_TRIES):
        (outcome,) = load.closed(partial(next, iter([call]), None), seconds=600, connections=1)
        if outcome.status == 200:
            return outcome
        if outcome.status != 503:
            break
        time.sleep(_PAUSE)
    raise HstuXdError(f"{call.path}: {outcome.status} {outcome.answer!r}")


def domain_of(user: str, catalog: DomainCatalog) -> int:
    """Choose a domain that has items, by the user's name."""
    sizes = catalog.domain_offsets.diff()
    filled = sizes.nonzero().flatten().tolist()
    return filled[sum(user.encode()) % len(filled)]
