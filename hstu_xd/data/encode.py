"""Streams sources into integer arrays: one code a user, one a catalogue item, moments."""

import csv
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_xd.data.error_location import (
    checked_events,
    first_fault,
    one_line,
    raise_first_fault,
    raise_item_in_two_domains,
)
from hstu_xd.data.event_fields import EventFields, numbered
from hstu_xd.data.ids import (
    LONGEST_ID,
    TokenDictionary,
    check_domain_characters,
    missing_as_text,
    number_tokens,
    odd_ids,
    repeated,
    tidy,
)
from hstu_xd.data.known_ids import KnownIds, MergedIds
from hstu_xd.data.reading import FileFacts
from hstu_xd.data.sources import Source
from hstu_xd.data.sources.base import FIELD
from hstu_xd.data.times import Moments, order_events
from hstu_xd.data.token_bytes import TokenBytes
from hstu_xd.errors import InputError

if TYPE_CHECKING:
    import polars as pl

# Seeds of polars' hash, which only tells tokens apart while a log is read: nothing of it is stored.
USER_SEED, ITEM_SEED, DOMAIN_SEED = 1, 2, 3
# What polars makes of a list, an object, a truth value and half of a surrogate pair in JSON.
_DOUBTFUL = r"^(\[|\{|true$|false$)|\x00"
_DOUBTFUL_LETTERS = ("[", "{", "true", "false", "\x00")


@dataclass
class Events:
    """All events of a log in no particular order, numbered so that input order leaves no trace.

    Attributes:
        users: (U,) user tokens, sorted.
        items: columns item and domain, sorted by (domain, item); I rows.
        user: (n,) int32, row of ``users``.
        item: (n,) int32, row of ``items``.
        time: (n,) int64, numbers that order the events of a user; seconds unless ``moments`` says
            otherwise.
        moments: how seconds follow from ``time``.
        fields: of the events, in the order of ``user``; None where none were asked for.
    """

    users: "pl.Series"
    items: "pl.DataFrame"
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    moments: Moments = field(default_factory=Moments)
    fields: EventFields | None = None

    def release(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Hand over user, item and time and keep none of them, so that memory can be reused."""
        user, item, time = self.user, self.item, self.time
        self.user, self.item, self.time = user[:0].copy(), item[:0].copy(), time[:0].copy()
        return user, item, time


@dataclass(frozen=True)
class IdOptions:
    """What is done with ids and with lines that cannot be read.

    Attributes:
        exact: keep ids as they are written, spaces and decimals included.
        prefix_items: put the domain before every item's id.
        skip_faulty: leave out faulty lines instead of refusing the log.
    """

    exact: bool = False
    prefix_items: bool = False
    skip_faulty: bool = False


def read_events(
    sources: Sequence[Source],
    options: IdOptions | None = None,
    *,
    tell: Callable[[str], object] = lambda note: None,
) -> Events:
    """Read every source once.

    Args:
        sources: the files.
        options: what is done with ids and faulty lines.
        tell: takes notes on what was changed or read otherwise than usual.

    Raises:
        InputError: a faulty line, an item in two domains, or no event at all.
    """
    events, _ = read_log(sources, options or IdOptions(), tell=tell)
    return events


def read_log(
    sources: Sequence[Source],
    options: IdOptions,
    *,
    tell: Callable[[str], object],
    known: KnownIds | None = None,
) -> "tuple[Events, EventReader]":
    """Read every source once; also return the reader, which knows what each file held.

    Where ids of a store are known, users and items of the events are those of both.
    """
    reader = EventReader(sources, options, tell, known)
    for source in sources:
        reader.read(source)
    return reader.finish(), reader


class EventReader:
    """Codes in order of first sight; :meth:`finish` renumbers them by token.

    Attributes:
        facts: what each file held, in the order of the sources.
        skipped: number of faulty lines left out.
        faulty_lines: CSV text of file, line and problem of each of them.
        merged: ids of the store and of the logs, where a store goes on and all is read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        options: IdOptions,
        tell: Callable[[str], object],
        known: KnownIds | None = None,
    ) -> None:
        self.sources = sources
        self.options = options
        self.tell = tell
        self.known = known
        self.merged: MergedIds | None = None
        self.users, self.items = TokenDictionary(), TokenDictionary()
        if known is not None:
            user, item = _hashes()
            tables = known.users.to_frame("user").select(user), known.as_read.select(item)
            with ThreadPoolExecutor(2) as pool:
                hashes = (table.to_series().to_numpy() for table in tables)
                self.users, self.items = pool.map(TokenDictionary, hashes)
        self.user: list[NDArray[np.int32]] = []
        self.item: list[NDArray[np.int32]] = []
        self.seconds: list[NDArray[np.int64]] = []
        self.nanoseconds: list[NDArray[np.int32] | None] = []
        self.order: list[tuple[NDArray[np.int64], NDArray[np.int32] | None]] = []
        self.fields: list[pl.DataFrame] = []
        self.facts: list[FileFacts] = []
        self.skipped = 0
        self.faulty_lines = io.StringIO()
        self._has_unused_tokens = False

    def read(self, source: Source) -> None:
        """Encode one source, slowly where the fast way cannot read it or may not refuse it.

        Raises:
            InputError: a faulty line.
        """
        import polars as pl

        self.facts.append(FileFacts(source, keep_digest=len(self.sources) > 1))
        if self.options.skip_faulty or source.only_records:
            self._read_slowly(source)
            return
        columns = (
            *(self.user, self.item, self.seconds, self.nanoseconds, self.order, self.fields),
        )
        marks = [len(column) for column in columns]
        try:
            with ThreadPoolExecutor(1) as pool:
                for batch in source.batches(*_hashes()):
                    self._add(source, batch, pool)
        except (pl.exceptions.PolarsError, OSError) as error:
            # Such as NaN in JSON, which is none, in a key that nobody reads.
            for column, mark in zip(columns, marks, strict=True):
                del column[mark:]
            self.facts[-1] = FileFacts(source, keep_digest=len(self.sources) > 1)
            self._has_unused_tokens = True
            try:
                self._read_slowly(source)
            except pl.exceptions.PolarsError:
                raise InputError(
                    f"{source.path}: cannot be read as a log: {one_line(str(error))}"
                ) from error
            self.tell(
                f"{source.path}: read line by line, which takes longer: the fast reader refused "
                "something in it, such as NaN in JSON; every event is read"
            )
        if self.facts[-1].has_empty_last_field and source.may_have_short_lines():
            fault = first_fault(source)
            if fault is not None:
                raise fault

    def _read_slowly(self, source: Source) -> None:
        """Encode a source line by line; faulty lines are left out or refused.

        Raises:
            InputError: a faulty line.
        """
        writer = csv.writer(self.faulty_lines, lineterminator="\n")
        with ThreadPoolExecutor(1) as pool:
            for events, faults in checked_events(source):
                for record, problem in faults:
                    if not self.options.skip_faulty:
                        raise InputError(f"{source.at(record.line)}: {problem}")
                    self.skipped += 1
                    self.facts[-1].skipped += 1
                    writer.writerow([source.path, record.line, problem])
                if len(events):
                    self._add(source, events.with_columns(*_hashes()), pool)

    def _add(self, source: Source, batch: "pl.DataFrame", pool: ThreadPoolExecutor) -> None:
        import polars as pl

        if _has_nulls(batch):
            # An empty line is no event; a line that is empty in part is a fault.
            events = batch.filter(~pl.all_horizontal(pl.col("user", "item", "time").is_null()))
            self.facts[-1].empty += len(batch) - len(events)
            batch = events
            if _has_nulls(batch):
                raise_first_fault(source, reason="an id or a timestamp is empty")
        if "last" in batch.columns and batch["last"].null_count():
            self.facts[-1].has_empty_last_field = True
        seconds, nanoseconds = source.time.read(batch["time"])
        if seconds.null_count():
            raise_first_fault(source, reason="a timestamp is unreadable")
        if source.order is not None:
            order = source.order.read(batch["order"])
            if order.seconds.null_count():
                raise_first_fault(source, reason="a number that orders ties is unreadable")
            self.order.append((order.seconds.to_numpy(), order.nanoseconds))
        user = pool.submit(self.users.encode, batch["user_hash"], batch.select("user"))
        self.item.append(self.items.encode(batch["item_hash"], batch.select("item", "domain")))
        self.user.append(user.result())
        self.seconds.append(seconds.to_numpy())
        self.nanoseconds.append(nanoseconds)
        if source.fields:
            self.fields.append(
                batch.select(pl.col(FIELD + name).alias(name) for name in source.fields)
            )
        self.facts[-1].add(batch["user_hash"], batch["item_hash"], self.seconds[-1])

    def finish(self) -> Events:
        """Renumber users by token and items by (domain, token); release what found them.

        Raises:
            InputError: no event, an id of white space only, or an item in two domains.
        """
        import polars as pl

        if not sum(map(len, self.user)):
            files = ", ".join(str(source.path) for source in self.sources)
            left = f"{self.skipped:,} faulty lines" if self.skipped else "only a header"
            raise InputError(f"{files}: no events, {left}; give a log with events")
        users, user_ranks, items, item_ranks = self._numbered_ids()
        self.users = self.items = TokenDictionary()
        self.known = None
        with ThreadPoolExecutor(1) as pool:
            user_codes = pool.submit(renumber, self.user, user_ranks)
            item = renumber(self.item, item_ranks)
            time, moments = order_events(self.seconds, self.nanoseconds, self.order)
            user = user_codes.result()
        fields = numbered(pl.concat(self.fields)) if self.fields else None
        return Events(users, items, user, item, time, moments, fields)

    def _numbered_ids(
        self,
    ) -> "tuple[pl.Series, NDArray[np.int32], pl.DataFrame, NDArray[np.int32]]":
        """Sort all ids; return users, the row of each code, items, and the row of each code.

        Raises:
            InputError: an id of white space only, or an item in two domains.
        """
        users, items = self.users.tokens(), self.items.tokens()
        if self._has_unused_tokens:
            users, self.user = _used(users, self.user, self.users.num_known)
            items, self.item = _used(items, self.item, self.items.num_known)
        users, items = _with_columns(users, "user"), _with_columns(items, "item", "domain")
        for tokens in (users["user"], items["item"], items["domain"]):
            self._check(tokens)
        if self.known is not None:
            for look in self.known.looks:
                self._check_letters(look)
            if not self.options.exact:
                self.known.check_spellings(users["user"], items)
        users, items = self._tidied(users, items)
        check_domain_characters(items["domain"])
        users, user_ranks = number_tokens(users.select("user"))
        items, item_ranks = number_tokens(items.select("domain", "item"))
        shared = repeated(items["item"])
        if len(shared):
            raise_item_in_two_domains(self.sources, str(shared.min()))
        items = items.select("item", "domain")
        if self.known is None:
            return users["user"], user_ranks, items, item_ranks
        merged = self.merged = self.known.merge(users, items)
        user_ranks = np.concatenate([merged.old_users, merged.new_users[user_ranks]])
        item_ranks = np.concatenate([merged.old_items, merged.new_items[item_ranks]])
        return merged.users, user_ranks, merged.items, item_ranks

    def _check(self, tokens: "pl.Series") -> None:
        """Refuse ids that are blank, endless or no ids at all.

        Raises:
            InputError: names the line.
        """
        look = TokenBytes(tokens)
        too_long = look.lengths.max(initial=0) > LONGEST_ID
        self._check_letters(look)
        blank = not look.lengths.all()
        if not look.is_printed_ascii:
            blank = (tokens.str.strip_chars() == "").any()
        if too_long or blank:
            faults = (first_fault(source) for source in self.sources)
            state = f"is longer than {LONGEST_ID} bytes" if too_long else "is empty"
            reason = f"a {tokens.name} id {state}; mend it"
            raise next(filter(None, faults), InputError(reason))

    def _check_letters(self, look: TokenBytes) -> None:
        """Refuse what fast readers take for ids and what is none.

        In JSON a list or an object may stand where an id is asked for, and in text a return that
        ends no line; polars takes both.

        Raises:
            InputError: names the line.
        """
        returns = look.have("\r")
        odd = any(map(look.have, _DOUBTFUL_LETTERS)) and look.tokens.str.contains(_DOUBTFUL).any()
        if odd or returns:
            doubtful = (s for s in self.sources if returns or s.may_nest)
            for fault in filter(None, map(first_fault, doubtful)):
                raise fault

    def _tidied(
        self, users: "pl.DataFrame", items: "pl.DataFrame"
    ) -> "tuple[pl.DataFrame, pl.DataFrame]":
        """Make spellings of one id equal, and put the domain before items where asked for."""
        import polars as pl

        if not self.options.exact:
            user, notes = tidy(users["user"], "user")
            users = users.with_columns(user=user)
            for role in ("item", "domain"):
                column, more = tidy(items[role], role)
                items = items.with_columns(column.alias(role))
                notes += more
            for note in notes:
                self.tell(f"{note}; --exact-ids keeps ids as they are")
        if self.options.prefix_items:
            items = items.with_columns(item=pl.concat_str("domain", "item", separator=":"))
        return users, items


def _hashes() -> "tuple[pl.Expr, pl.Expr]":
    """Build the columns by which tokens are told apart.

    An item is told apart by its domain too, so that one in two domains shows as two items.
    """
    import polars as pl

    item = pl.col("item").hash(ITEM_SEED) ^ pl.col("domain").hash(DOMAIN_SEED)
    return pl.col("user").hash(USER_SEED).alias("user_hash"), item.alias("item_hash")


def _has_nulls(batch: "pl.DataFrame") -> bool:
    return any(
        batch[role].null_count()
        for role in ("user", "item", "domain", "time", "order")
        if role in batch.columns
    )


def _used(
    tokens: "pl.DataFrame", parts: list[NDArray[np.int32]], num_known: int
) -> "tuple[pl.DataFrame, list[NDArray[np.int32]]]":
    """Leave out tokens of a file whose fast reading was given up, but none of those known."""
    used = np.zeros(num_known + len(tokens), np.bool_)
    used[:num_known] = True
    for part in parts:
        used[part] = True
    ranks = np.cumsum(used, dtype=np.int32) - 1
    return tokens.filter(used[num_known:]), [ranks[part] for part in parts]


def _with_columns(tokens: "pl.DataFrame", *names: str) -> "pl.DataFrame":
    """Give a table without tokens the columns that it would have."""
    import polars as pl

    return tokens if tokens.width else pl.DataFrame(schema=dict.fromkeys(names, pl.String))


def doubts_of_ids(
    users: "pl.Series",
    items: "pl.DataFrame",
    count_users: Callable[[], NDArray[np.int64]],
    count_items: Callable[[], NDArray[np.int64]],
) -> list[str]:
    """Describe ids that look like missing values, or that may not be what they were.

    Args:
        users: distinct ids.
        items: columns item and domain, sorted by domain.
        count_users: counts the events of each user, which is done where one looks so.
        count_items: likewise.
    """
    domains = items["domain"].rle().struct
    sizes, names = domains.field("len").to_numpy(), domains.field("value")

    def count_domains() -> NDArray[np.int64]:
        return np.add.reduceat(count_items(), np.cumsum(sizes, dtype=np.int64) - sizes)

    user, item, domain = map(TokenBytes, (users, items["item"], names))
    found = (
        missing_as_text(user, count_users, "user"),
        missing_as_text(item, count_items, "item"),
        missing_as_text(domain, count_domains, "domain"),
    )
    odd = odd_ids(user, "user") + odd_ids(item, "item")
    return [text for text in found if text is not None] + odd


def renumber(parts: list[NDArray[np.int32]], ranks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Replace each code by its rank; empties ``parts`` to release memory."""
    # mode="clip" skips a check of bounds that costs as much as the look-up itself.
    return np.concatenate([ranks.take(parts.pop(0), mode="clip") for _ in range(len(parts))])
