"""What each file held and was taken for, so that a user can see it and files can be compared."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.sources import Source
from hstu_xd.data.times import EARLIEST, LATEST, date_of
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

DAY = 86_400
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SAMPLE = 1000


class FileFacts:
    """Counts of one file, gathered a batch at a time.

    Attributes:
        source: the file.
        events: number of events.
        first: the earliest second; None without events.
        last: the latest second.
        whole_days: whether every time is the start of a day.
        digest: equal for equal events in any order; 0 unless kept.
        skipped: faulty lines left out.
        empty: lines without user, item and time.
        has_empty_last_field: whether the last field of some line is empty, or missing.
    """

    def __init__(self, source: Source, *, keep_digest: bool) -> None:
        self.source = source
        self.events = 0
        self.first: int | None = None
        self.last = 0
        self.whole_days = True
        self.digest = 0
        self.skipped = 0
        self.empty = 0
        self.has_empty_last_field = False
        self._keep_digest = keep_digest

    def add(
        self, user_hash: "pl.Series", item_hash: "pl.Series", seconds: NDArray[np.int64]
    ) -> None:
        """Count a batch."""
        if not len(seconds):
            return
        self.events += len(seconds)
        lowest = int(seconds.min())
        self.first = lowest if self.first is None else min(self.first, lowest)
        self.last = max(self.last, int(seconds.max()))
        if not self._keep_digest:
            return
        if self.whole_days:
            # Most logs are done with by a few of their times.
            self.whole_days = not (seconds[:_SAMPLE] % DAY).any() and not (seconds % DAY).any()
        mixed = seconds.view(np.uint64) * _GOLDEN
        mixed += item_hash.to_numpy()
        mixed *= user_hash.to_numpy() | np.uint64(1)
        self.digest = (self.digest + int(mixed.sum())) % (1 << 64)

    @property
    def reading(self) -> str:
        """What the file was taken to be."""
        source = self.source
        domain = "" if source.domain is None else f", domain {source.domain!r}"
        order = "" if source.order is None else f", ties by {source.order.meaning}"
        if source.time.is_dated:
            times = source.time.meaning
        else:
            times = "numbers that are no dates in any unit, kept as seconds"
        return f"{source.form}; {source.roles}{domain}; times are {times}{order}"


def describe_readings(files: Sequence[FileFacts]) -> list[str]:
    """Say what the files were taken to be, those that were taken for the same in one line."""
    lines = []
    for reading, group in groupby(files, key=lambda facts: facts.reading):
        alike = list(group)
        names = str(alike[0].source.path)
        if len(alike) > 1:
            names += f" and {len(alike) - 1:,} more"
        events = sum(facts.events for facts in alike)
        span = ""
        if first := [facts.first for facts in alike if facts.first is not None]:
            ends = min(first), max(facts.last for facts in alike)
            dated = alike[0].source.time.is_dated
            low, high = (date_of(end) if dated else str(end) for end in ends)
            span = f" from {low} to {high}"
        empty = sum(facts.empty for facts in alike)
        left = f", {empty:,} without user, item and time left out" if empty else ""
        lines.append(f"read {names} as: {reading}; {events:,} events{span}{left}")
    return lines


def check_agreement(files: Sequence[FileFacts], warn: Callable[[str], object]) -> None:
    """Compare the files of a log with one another.

    Raises:
        InputError: the times of one file are dates and those of another are not.
    """
    files = [facts for facts in files if facts.events]
    dated = next((facts for facts in files if facts.source.time.is_dated), None)
    other = next((facts for facts in files if not facts.source.time.is_dated), None)
    if dated is not None and other is not None:
        raise InputError(
            f"{other.source.path}: its times ({other.first} to {other.last}) are no dates, those "
            f"of {dated.source.path} are ({date_of(dated.first or 0)} to {date_of(dated.last)}); "
            "events of the two cannot be ordered. Mend one of them, or say with --time-unit what "
            "all times are"
        )
    for facts in files:
        odd = facts.source.time.is_dated and facts.source.time.low == 0
        if odd and facts.first is not None and (facts.first < EARLIEST or facts.last >= LATEST):
            warn(
                f"{facts.source.path}: times from {date_of(facts.first)} to {date_of(facts.last)} "
                "reach beyond 1990 to 2100; check the column and its unit"
            )
    days = next((facts for facts in files if facts.whole_days), None)
    clock = next((facts for facts in files if not facts.whole_days), None)
    if days is not None and clock is not None and days.events > 1 and days.source.time.is_dated:
        warn(
            f"{days.source.path} has dates without a time of day, {clock.source.path} with one: "
            "within a day all events of the first come before those of the second"
        )
    known: dict[tuple[int, int], FileFacts] = {}
    for facts in files:
        twin = known.setdefault((facts.events, facts.digest), facts)
        if twin is not facts:
            warn(
                f"{twin.source.path} and {facts.source.path} hold the same {facts.events:,} "
                "events; leave one out"
            )
