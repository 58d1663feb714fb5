"""Finds the user, item, domain and time columns of a file by option or by usual names."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

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
EXAMPLES = {"user": "user_id", "item": "item_id", "domain": "domain", "time": "timestamp"}


@dataclass(frozen=True)
class ColumnOptions:
    """The names given by ``--user-col`` and its siblings; None where the option was not given."""

    user: str | None = None
    item: str | None = None
    domain: str | None = None
    time: str | None = None

    def named(self, role: str) -> str | None:
        """Return the option's value for a role."""
        return getattr(self, role)


def find_column(
    path: Path, header: Sequence[str], role: str, options: ColumnOptions, *, line: int | None
) -> int | None:
    """Position of the column that plays a role, or None when no usual name is there.

    Args:
        path: the file, for messages.
        header: the names of all columns.
        role: ``user``, ``item``, ``domain`` or ``time``.
        options: the names the user gave.
        line: the header's line number, for messages; None for files without lines.

    Raises:
        InputError: the option names a column that is not there, or the name occurs twice.
    """
    wanted = options.named(role)
    lowered = [name.strip().lower() for name in header]
    if wanted is not None:
        names = [wanted] if wanted in header else [wanted.lower()]
        pool = list(header) if wanted in header else lowered
    else:
        names, pool = list(ALIASES[role]), lowered
    for name in names:
        if pool.count(name) > 1:
            where = path if line is None else f"{path}:{line}"
            raise InputError(f"{where}: column {name!r} occurs twice; give it one name each")
        if name in pool:
            return pool.index(name)
    if wanted is not None:
        raise missing_column(path, header, role, options, line=line)
    return None


def missing_column(
    path: Path, header: Sequence[str], role: str, options: ColumnOptions, *, line: int | None
) -> InputError:
    """Describe a role that no column plays: what there is, the nearest name, the option to use."""
    wanted = options.named(role) or EXAMPLES[role]
    originals = {name.strip().lower(): name for name in header}
    tries = [wanted, *ALIASES[role]] if options.named(role) is None else [wanted]
    close = (get_close_matches(name.lower(), originals, n=1, cutoff=0.6) for name in tries)
    near = next((originals[match[0]] for match in close if match), None)
    where = path if line is None else f"{path}:{line}"
    mend = f"--{role}-col {near or 'NAME'}"
    if role == "domain":
        mend += ", or give the file one domain as NAME=PATH"
    found = ", ".join(header) if header else "none"
    did_you_mean = f" (did you mean {near!r}?)" if near else ""
    return InputError(
        f"{where}: no {role} column {wanted!r}{did_you_mean}; the columns named there are: "
        f"{found}; use {mend}"
    )
