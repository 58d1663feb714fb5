"""Groups of targets or candidates that a report looks at apart: domains, switches, goals, ..."""

from typing import NamedTuple

from hstu_xd.evaluation.protocol import COLD, RANKING
from hstu_xd.evaluation.ranking import QUARTERS, UNSEEN, history_group
from hstu_xd.experiments.report.run_figures import Group
from hstu_xd.experiments.report.shared_data import Comparison


class Breakdown(NamedTuple):
    """One way to look at groups.

    Attributes:
        stem: how the names of its figures begin.
        by: what the groups are, for the titles of figures.
        heading: of its part of the page.
        words: what a reader should know, before the figures.
        groups: from top to bottom.
        folded: whether its tables are folded away, one a metric.
    """

    stem: str
    by: str
    heading: str
    words: str
    groups: list[Group]
    folded: bool = False


def breakdowns(one: Comparison) -> list[Breakdown]:
    """Return the ways to look at runs of one kind."""
    ranking = one.runs[0].kind == RANKING
    what = "candidate" if ranking else "target"
    domains = [Group(name, f"[{name}]", _num_targets(one, name)) for name in one.domains]
    by_domain = Breakdown(
        "domains", "by domain", f"By domain of the {what}", "", domains, folded=True
    )
    return [by_domain, *(_of_ranking(one) if ranking else [_switches(one), *_cold(one)])]


def _switches(one: Comparison) -> Breakdown:
    labels = {"switch": "after a switch", "stay": "no switch"}
    return Breakdown(
        "switch",
        "after a switch or not",
        "Switch and stay targets",
        "A target follows a switch when its domain differs from that of the event just before it; "
        "otherwise it stays. ",
        [Group(label, f"[{name}]", _num_targets(one, name)) for name, label in labels.items()],
    )


def _cold(one: Comparison) -> list[Breakdown]:
    """Show targets without an event that trains beside all, where models tell them apart."""
    count = _num_targets(one, COLD)
    if count is None or COLD in one.domains:
        return []
    return [
        Breakdown(
            "cold",
            "of cold targets",
            "Targets that training never met",
            "They are ranked by the features of the item alone (xd_item.features). ",
            [
                Group("all targets", "", _num_targets(one)),
                Group("never met in training", f"[{COLD}]", count),
            ],
        )
    ]


def _of_ranking(one: Comparison) -> list[Breakdown]:
    goals = [Group(name, f"[{name}]", None) for name in one.runs[0].info["goals"]]
    history = [Group(f"{name} history", f"[{history_group(name)}]", None) for name in QUARTERS]
    unseen = Group("unseen candidates", f"[{UNSEEN}]", None)
    return [
        Breakdown("goals", "by goal", "By goal of the request", "", goals),
        Breakdown(
            "history",
            "by history",
            "By length of the history, and candidates never met before",
            "Histories are parted at the quarters of those of the training requests; an unseen "
            "candidate has no event that trains. ",
            [*history, unseen],
        ),
    ]


def _num_targets(one: Comparison, group: str = "") -> int | None:
    name = f"count[{group}]" if group else "count"
    counts = (result.metrics.get(name) for result in one.results)
    return next((round(count.mean) for count in counts if count is not None), None)
