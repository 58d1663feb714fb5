"""What a hard search is asked for beside its candidates, checked once a call."""

from collections.abc import Mapping, Sequence

import numpy as np

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.search.found import check_count
from hstu_xd.search.runs import Ints

FILLS = ("none", "recent")
SCOPES = ("all", "target_domain")


class Request:
    """The options of a hard search; :meth:`hstu_xd.search.hard.HardIndex.search` tells of each.

    Attributes:
        k: how many events to find.
        levels: the levels that count, ascending.
        caps: (J,) int64, at most so many events of each level that counts.
        skip_recent: how many of the latest events are left out.
        fills: whether the latest events follow those that match.
        in_domain: whether only events of the candidate's domain count.
        domain: the domain's level.

    Raises:
        InputError: an unknown level, fill or scope, or a number that makes no sense.
    """

    def __init__(
        self,
        num_levels: int,
        k: int,
        levels: Sequence[int] | None,
        quotas: Mapping[int, int] | None,
        skip_recent: int,
        fill: str,
        scope: str,
    ) -> None:
        check_count(k)
        if skip_recent < 0:
            raise InputError(
                f"skip_recent is {skip_recent}; 0 leaves out none of the latest events"
            )
        _check_name("fill", fill, FILLS)
        _check_name("scope", scope, SCOPES)
        chosen = list(range(num_levels)) if levels is None else sorted(levels)
        if (
            not chosen
            or len(set(chosen)) < len(chosen)
            or not set(chosen) <= set(range(num_levels))
        ):
            raise InputError(
                f"levels are {levels}; some of 0..{num_levels - 1} are needed, each once"
            )
        for level, quota in (quotas or {}).items():
            if level not in chosen or quota < 0:
                raise InputError(
                    f"quotas hold {level}: {quota}; a level of {chosen} and a number of events "
                    "from 0 are needed"
                )
        self.k, self.skip_recent = k, skip_recent
        self.levels: Ints = np.array(chosen, np.int64)
        self.caps: Ints = np.array([min((quotas or {}).get(x, k), k) for x in chosen], np.int64)
        self.fills, self.in_domain = fill == "recent", scope == "target_domain"
        self.domain = num_levels - 1
        # Without either, what the lower levels collect decides which events have been met.
        self.is_filtered = bool(quotas) or self.in_domain


def _check_name(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(
            f"{name} is {value!r}; {' or '.join(known)} are known{did_you_mean(str(value), known)}"
        )
