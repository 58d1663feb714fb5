"""Finds the user, item, domain and time columns of a file by option or by usual names."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hstu_xd.data.sources.base import FIELD
from hstu_xd.data.times import is_date, is_number
from hstu_xd.errors import InputError

# Usual names of each role, best first; compared without case. "category" is left out on purpose:
# many logs have such a column that is no domain.
ALIASES = {
    "user": ("user_id", "user", "userid", "uid", "reviewerid", "reviewer_id", "visitorid"),
    "item": (
        *("item_id", "item", "itemid", "iid", "parent_asin", "asin", "product_id", "productid"),
        *("movie_id", "movieid", "video_id", "videoid"),
    ),
    "domain": ("domain", "domain_id", "domain_name", "domainid"),
    "time": ("timestamp", "time", "ts", "unixreviewtime", "unix_time", "event_time", "time_stamp"),
}
# Both stand in a review: of all variants of a product, and of one of them.
ONE_PRODUCT = ("parent_asin", "asin")
NEEDED = ("user", "item", "time")
EXAMPLES = {"user": "user_id", "item": "item_id", "domain": "domain", "time": "timestamp"}


@dataclass(frozen=True)
class ColumnOptions:
    """The names given by ``--user-col`` and its siblings; None where the option was not given.

    Attributes:
        order: of the column that breaks ties in time.
        names: of all columns of files without a header line, from ``--columns``.
        fields: of the columns that are kept as fields of the events, from ``--event-cols``.
    """

    user: str | None = None
    item: str | None = None
    domain: str | None = None
    time: str | None = None
    order: str | None = None
    names: tuple[str, ...] | None = None
    fields: tuple[str, ...] = ()

    def named(self, role: str) -> str | None:
        """Return the option's value for a role."""
        return role.removeprefix(FIELD) if role.startswith(FIELD) else getattr(self, role)


def find_column(
    path: Path, header: Sequence[str], role: str, options: ColumnOptions, *, line: int | None
) -> int | None:
    """Position of the column that plays a role, or None when no usual name is there.

    Args:
        path: the file, for messages.
        header: the names of all columns.
        role: ``user``, ``item``, ``domain`` or ``time``, or one of a field.
        options: the names the user gave.
        line: the header's line number, for messages; None for files without lines.

    Raises:
        InputError: the option names a column that is not there, the name occurs twice, or two
            columns have usual names.
    """
    wanted = options.named(role)
    lowered = [name.strip().lower() for name in header]
    if wanted is not None:
        names = [wanted] if wanted in header else [wanted.lower()]
        pool = list(header) if wanted in header else lowered
    else:
        names, pool = list(ALIASES.get(role, ())), lowered
    if wanted is not None and wanted not in lowered and _is_place(wanted, header):
        return int(wanted) - 1
    where = path if line is None else f"{path}:{line}"
    usual = [name for name in names if name in pool]
    if len(usual) > 1 and not {*usual} <= {*ONE_PRODUCT}:
        both = [header[pool.index(name)].strip() for name in usual[:2]]
        raise InputError(
            f"{where}: columns {both[0]!r} and {both[1]!r} may both be the {role}; say which with "
            f"--{role}-col {both[0]} or --{role}-col {both[1]}"
        )
    for name in usual:
        if pool.count(name) > 1:
            raise InputError(f"{where}: column {name!r} occurs twice; give it one name each")
        return pool.index(name)
    if wanted is not None:
        raise missing_column(path, header, role, options, line=line)
    return None


def _is_place(text: str, header: Sequence[str]) -> bool:
    """Tell whether a text is the number of a column, from 1."""
    return text.isascii() and text.isdigit() and 0 < int(text) <= len(header)


def looks_like_data(fields: Sequence[str]) -> bool:
    """Tell whether a first line is an event, not a header: no column is called like a number."""
    return any(is_number(field) or is_date(field) for field in fields)


def place_columns(
    path: Path, fields: Sequence[str], options: ColumnOptions, roles: Sequence[str]
) -> tuple[bool, dict[str, int]]:
    """Find the columns of a delimited file by its first line.

    Args:
        path: the file, for messages.
        fields: its first line.
        options: names or numbers the user gave.
        roles: those that are needed; ``domain`` and ``order`` may be missing.

    Returns:
        Whether the first line is a header, and the place of each role that was found.

    Raises:
        InputError: a file without names and without options that say which column is which.
    """
    is_data = looks_like_data(fields)
    header = fields
    if options.names is not None:
        if not is_data:
            raise InputError(
                f"{path}:1: the first line looks like names ({', '.join(fields)[:80]}); --columns "
                "is for files without a header line, use --user-col NAME and its siblings"
            )
        if len(options.names) != len(fields):
            raise InputError(
                f"{path}:1: {len(fields)} fields, but --columns names {len(options.names)}; name "
                "every column, those that are not needed too"
            )
        header = options.names
    places = {}
    for role in roles:
        wanted = options.named(role) or ""
        if is_data and options.names is None and _is_place(wanted, fields):
            places[role] = int(wanted) - 1  # though a field of the first event may be that number
            continue
        try:
            at = find_column(path, header, role, options, line=1)
        except InputError:
            if is_data and options.names is None:
                raise _headerless(path, fields) from None
            raise
        if at is not None:
            places[role] = at
    numbered = all(_is_place(options.named(role) or "", fields) for role in places)
    if is_data and options.names is None and (not numbered or not {*NEEDED} <= {*places}):
        known = {
            role: (*ALIASES.get(role, ()), (options.named(role) or "").lower()) for role in roles
        }
        named = {role for role in places if fields[places[role]].strip().lower() in known[role]}
        if not {*NEEDED} <= named:
            raise _headerless(path, fields)
        return True, places
    return not is_data, places


def _headerless(path: Path, fields: Sequence[str]) -> InputError:
    others = ["rating", *"-" * (len(fields) - 4)] if len(fields) > 3 else []
    example = ",".join(["user", "item", *others, "time"])
    return InputError(
        f"{path}:1: the first line looks like an event, not like names: "
        f"{', '.join(fields)[:80]}; name all {len(fields)} columns in their order, e.g. --columns "
        f"{example}, or say by number which is which: --user-col 1 --item-col 2 --time-col "
        f"{len(fields)}"
    )


def missing_column(
    path: Path, header: Sequence[str], role: str, options: ColumnOptions, *, line: int | None
) -> InputError:
    """Describe a role that no column plays: what there is, the nearest name, the option to use."""
    wanted = options.named(role) or EXAMPLES[role]
    aliases = ALIASES.get(role, ())
    originals = {name.strip().lower(): name for name in header}
    tries = [wanted, *aliases] if options.named(role) is None else [wanted]
    close = (get_close_matches(name.lower(), originals, n=1, cutoff=0.6) for name in tries)
    near = next((originals[match[0]] for match in close if match), None)
    where = path if line is None else f"{path}:{line}"
    is_field = role.startswith(FIELD)
    mend = f"{'--event-cols' if is_field else f'--{role}-col'} {near or 'NAME'}"
    if role == "domain":
        mend += ", or give the file one domain as NAME=PATH"
    found = ", ".join(header) if header else "none"
    did_you_mean = f" (did you mean {near!r}?)" if near else ""
    return InputError(
        f"{where}: no {'field' if is_field else role} column {wanted!r}{did_you_mean}; the columns "
        f"named there are: {found}; use {mend}"
    )
