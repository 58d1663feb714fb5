"""Events that come twice: counted, said, and dropped where that is asked for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.order import Histories
from hstu_xd.data.store_files import Log
from hstu_xd.errors import InputError

EXACT = "exact"
# From these shares on a user is warned; below they are printed in the summary.
MANY_REPEATS = 0.01
MANY_MET = 0.5
# Targets by their place from the end of a history, counted for so many users at once.
_TARGETS = {"test": 1, "valid": 2}
_BLOCK_USERS = 1 << 13


def parse_rule(text: str | None) -> int | None:
    """Read ``--drop-repeats``: ``exact``, or a number of seconds.

    Returns:
        The seconds within which an event repeats another, 0 for the same second; None for no rule.

    Raises:
        InputError: neither.
    """
    if text is None:
        return None
    if text == EXACT:
        return 0
    if not text.isascii() or not text.isdigit():
        raise InputError(
            f"--drop-repeats {text!r}: give exact (same user, item and second) or a number of "
            "seconds within which the same item of a user counts once"
        )
    return int(text)


def count_repeats(histories: Histories) -> int:
    """Count events equal to the one before in user, item and second."""
    user, item, time = histories.user, histories.item, histories.time
    same = time[1:] == time[:-1]
    same &= user[1:] == user[:-1]
    same &= item[1:] == item[:-1]
    return int(same.sum())


def drop_repeats(histories: Histories, window: int) -> Histories:
    """Drop events of the same user and item that follow a kept one within a window.

    Args:
        histories: sorted events.
        window: seconds; 0 drops what happens in the same second.

    Returns:
        The events left, in the same order.
    """
    order = np.lexsort((histories.time, histories.item, histories.user))
    user, item = histories.user[order], histories.item[order]
    time = histories.time[order]
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    # An event that is far from the one before is far from every kept one before. Between such
    # events, the first one after the window of the last kept one is kept next.
    keep = fresh
    keep[1:] |= time[1:] - time[:-1] > window
    heads = np.flatnonzero(keep)
    stops = np.append(heads[1:], len(order))
    while heads.size:
        reach = time[heads] + window
        after = first_after(time, heads, stops, reach)
        inside = after < stops
        heads, stops = after[inside], stops[inside]
        keep[heads] = True
    mask = np.zeros(len(order), np.bool_)
    mask[order[keep]] = True
    return Histories(histories.user[mask], histories.item[mask], histories.time[mask])


def first_after(
    time: NDArray[np.int64],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    reach: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the first place in each [start, stop) whose time lies after ``reach``, else stop.

    Times ascend within each range; all ranges are searched at once, by halving.
    """
    low, high = starts.copy(), stops.copy()
    while (open_ := low < high).any():
        middle = (low + high) // 2
        later = time[np.minimum(middle, len(time) - 1)] > reach
        high = np.where(open_ & later, middle, high)
        low = np.where(open_ & ~later, middle + 1, low)
    return low


def targets_met(log: Log) -> dict[str, Any]:
    """Count the targets of test and validation, and those the user had met before.

    A user of at least three events has both: the last event and the one before it.
    """
    counts = {name: {"targets": 0, "met_before": 0} for name in _TARGETS}
    for first in range(0, len(log.users), _BLOCK_USERS):
        offsets = log.offsets[first : first + _BLOCK_USERS + 1]
        item = log.item_ids[offsets[0] : offsets[-1]]
        ends, sizes = offsets[1:] - offsets[0], np.diff(offsets)
        has_targets = sizes >= 3
        for name, back in _TARGETS.items():
            # Ids begin with 1: 0 is nobody's item.
            wanted = np.where(has_targets, item.take(ends - back, mode="clip"), 0)
            met = item == np.repeat(wanted, sizes)
            # Every target finds itself, and what comes after it is no history.
            for last in range(1, back + 1):
                met[(ends - last)[has_targets]] = False
            owner = np.searchsorted(ends, np.flatnonzero(met), "right")
            counts[name]["targets"] += int(np.count_nonzero(has_targets))
            counts[name]["met_before"] += int(np.count_nonzero(np.diff(owner, prepend=-1)))
    return counts


def repeat_warnings(repeats: int, events: int, targets: dict[str, Any]) -> list[str]:
    """Say what repeats mean for the metrics where there are many."""
    found = []
    if repeats >= MANY_REPEATS * events:
        found.append(
            f"{repeats:,} of {events:,} events repeat the event before them (same user, item and "
            f"second): {repeats / events:.1%} of all targets are the last item of their own input; "
            "--drop-repeats exact drops them"
        )
    count, met = targets["test"]["targets"], targets["test"]["met_before"]
    if met and met >= MANY_MET * count:
        found.append(
            f"{met:,} of {count:,} test targets are items their user had before; they count as "
            "misses unless xd_evaluate.exclude_seen = False lets models recommend such items"
        )
    return found
