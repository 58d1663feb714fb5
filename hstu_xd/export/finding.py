"""What a ranker's program is given, in words: which events of a history, and counts of them."""

from hstu_xd.ranking.histories import Levels
from hstu_xd.ranking.settings import RankingSettings


def how_to_find(settings: RankingSettings, levels: Levels, levels_file: str) -> dict[str, str]:
    """Describe how the inputs of a ranker's program are found in a user's history.

    Args:
        settings: of the run.
        levels: of its items.
        levels_file: has the node of every item on each level, a column a level.
    """
    told = {
        "history": "Only the user's events strictly before the time of the request count. Of two "
        "at the same time the one that stands later in the log is the later one.",
    }
    if settings.interest.kind != "none":
        hard = settings.search.kind == "hard"
        told["events"] = _hard(settings, levels, levels_file) if hard else _recent(settings)
    told["gaps"] = "The time of the request less that of the event, in seconds, so at least 1."
    if settings.interest.counts:
        told["counts"] = _counts(levels, levels_file)
    return told


def _recent(settings: RankingSettings) -> str:
    return f"The latest {settings.search.k} events, the latest first."


def _hard(settings: RankingSettings, levels: Levels, levels_file: str) -> str:
    search, names = settings.search, settings.search.levels or levels.names
    told = [
        f"For each candidate up to {search.k} events. An event matches at the first of the levels "
        f"{', '.join(names)} (columns of {levels_file}, see levels) at which it has the node of "
        "the candidate; -1 is no node and matches nothing. Those of the first level come first, "
        "then those of the next one, and on each level the latest first."
    ]
    if search.skip_recent:
        told.append(f"The latest {search.skip_recent} events of the user are left out of all that.")
    if search.scope == "target_domain":
        last = levels.names[-1]
        told.append(f"So are events whose node of {last!r} is not the candidate's.")
    limits = [f"{most} of {name}" for name, most in zip(names, search.quotas) if most]
    if limits:
        told.append(f"At most {', '.join(limits)} are taken, the latest; its others are left out.")
    if search.fill:
        told.append("Behind them come the latest that match nowhere, until there are as many.")
    return " ".join(told)


def _counts(levels: Levels, levels_file: str) -> str:
    return (
        f"{levels.counts_width} numbers for each candidate. First of each level (columns of "
        f"{levels_file}, see levels) ln(1 + n), where n of the user's events have the candidate's "
        "node. Then of each level max(0, ln(3650 / days) / ln(3650)), where days = seconds / 86400 "
        "since the latest of these events; 0 where there is none."
    )
