"""Tables on what the paper of TAPE and DDSR leaves open: popularity, sharpness, order, skew.

They are made as plain text once, for the page and for a Markdown file beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as html_escape

from torch import Tensor

from hstu_xd.evaluation.paired import Difference
from hstu_xd.evaluation.protocol import RETRIEVAL
from hstu_xd.experiments.report.html_tables import table
from hstu_xd.experiments.report.model_lists import ModelLists, tape_pairs
from hstu_xd.experiments.report.shared_data import Comparison
from hstu_xd.experiments.report.tables import (
    MISSING,
    escape,
    markdown_lines,
    metric_label,
    percent,
    points,
)
from hstu_xd.experiments.run_folders import VariantResult, spread

CLEAR = "*"
_READING = (
    "Values are percentages, means over seeds; differences are percentage points with their "
    "standard error over the same users, which does not know of other seeds, and "
    f"{CLEAR} marks what is clear of zero (1.96 errors)."
)


@dataclass(frozen=True)
class TextTable:
    """A table with its words, as plain text.

    Attributes:
        heading: what it is about.
        words: what a reader should know.
        heads: of the columns.
        rows: the first cell of each names it.
    """

    heading: str
    words: str
    heads: list[str]
    rows: list[list[str]]

    def html(self) -> str:
        """Write it for the page."""
        rows = [[html_escape(cell) for cell in row] for row in self.rows]
        text = f"<h3>{html_escape(self.heading)}</h3>\n<p>{html_escape(self.words)}</p>\n"
        return text + (table(self.heads, rows) if rows else "")

    def markdown(self) -> str:
        """Write it as Markdown, with a heading of its own."""
        rows = [[escape(cell).replace(CLEAR, f"\\{CLEAR}") for cell in row] for row in self.rows]
        lines = markdown_lines([escape(head) for head in self.heads], rows) if rows else []
        words = self.words.replace(CLEAR, f"\\{CLEAR}")
        return "\n".join([f"### {self.heading}", "", words.rstrip(), "", *lines]).rstrip() + "\n"


def question_tables(one: Comparison) -> list[TextTable]:
    """Answer what runs on one log can answer of the open questions; nothing for ranking runs."""
    tables: list[TextTable] = []
    if one.runs[0].kind != RETRIEVAL:
        return tables
    if one.lists is not None:
        tables += [popularity_table(one.lists), lists_table(one.lists), sharpness_table(one.lists)]
    if one.stats is not None:
        tables.append(order_table(one))
    return tables


def popularity_table(lists: ModelLists) -> TextTable:
    """Metrics of the test targets by tenth of their popularity, each variant beside the first."""
    groups = lists.tenths.members()
    sizes = [int(members.sum()) for members in groups.values()]
    heads = ["metric, variant", *(f"{label} ({size:,})" for label, size in zip(groups, sizes))]
    hits = [f"hr@{k}" for k in lists.protocol.ks[-2:]]
    rows = []
    for metric in (*hits, *lists.protocol.headlines[1:]):
        rows += _beside_the_first(lists, metric, groups)
    return TextTable(
        "Popularity of the targets",
        "Test targets by how many events of their item train, the rarest first, with the number of "
        "targets. The groups are tenths of the targets, so that their errors are alike; targets of "
        "equally popular items stay together, so there may be fewer groups and of unequal size. "
        + _READING,
        heads,
        rows,
    )


def _beside_the_first(
    lists: ModelLists, metric: str, members: dict[str, Tensor]
) -> list[list[str]]:
    """Rows of one metric: every variant by group, then how far the others are from the first."""
    rows = []
    for variant in lists.ranked:
        means = lists.means(variant, members)
        cells = [percent(means[metric + group]) for group in members]
        rows.append([f"{metric_label(metric)} {variant}", *cells])
    for variant in list(lists.ranked)[1:]:
        found = lists.differences(lists.base, variant, members)
        cells = [_shown(found[metric + group]) for group in members]
        rows.append([f"{metric_label(metric)} {variant} minus {lists.base}", *cells])
    return rows


def lists_table(lists: ModelLists) -> TextTable:
    """Coverage, Gini coefficient and popularity of what is recommended to the test users."""
    ks = [k for k in lists.protocol.ks if k > 1] or list(lists.protocol.ks)
    names = [f"{what}@{k}" for k in ks for what in ("coverage", "gini", "popularity")]
    known = next(iter(lists.figures.values()))[0]
    names += [name for name in known if name.startswith(f"coverage@{ks[0]}[")]
    rows = [
        [variant, *(_over_seeds([found[name] for found in each], name) for name in names)]
        for variant, each in lists.figures.items()
    ]
    return TextTable(
        "What is recommended",
        "Of the best k of every test user, asked for the domain of the target: coverage@k is the "
        "share of the catalogue's items, or of a domain's, that is in a list at all; gini@k how "
        "unevenly the places of lists are spread over all items (0: all alike, towards 1: one item "
        "has all); popularity@k the mean percentile of a place, the share of the items of its "
        "domain that have fewer events that train, and half of those that have as many (50: drawn "
        "by lot). Coverage and popularity are percentages; \u00b1 is the standard deviation over "
        "seeds. As many lists of a variant are counted as there are test users, for each seed "
        "alone.",
        ["variant", *names],
        rows,
    )


def _over_seeds(values: Sequence[float], name: str) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return MISSING
    found = spread(known)
    shown = (lambda value: f"{value:.3f}") if name.startswith("gini") else percent
    return shown(found.mean) + (f" \u00b1 {shown(found.std)}" if found.std is not None else "")


def sharpness_table(lists: ModelLists) -> TextTable:
    """HR at the smallest k and MRR beside HR at the largest, and the share that is on top."""
    members = {"": lists.switches()[""]}
    low, high = lists.protocol.ks[0], lists.protocol.ks[-1]
    metrics = [f"hr@{low}", "mrr", f"hr@{high}"]
    rows = []
    for variant in lists.ranked:
        means = lists.means(variant, members)
        row = [variant]
        changes = {}
        if variant != lists.base:
            changes = lists.differences(lists.base, variant, members)
        for metric in metrics:
            row.append(percent(means[metric]))
            row.append(_shown(changes[metric]) if metric in changes else MISSING)
        share = means[f"hr@{low}"] / means[f"hr@{high}"] if means[f"hr@{high}"] else float("nan")
        rows.append([*row, percent(share) if math.isfinite(share) else MISSING])
    heads = ["variant"]
    for metric in metrics:
        heads += [metric_label(metric), f"minus {lists.base}"]
    return TextTable(
        "Ranking sharpness",
        f"Whether what is found within {high:,} is ranked on top as well: the last column is the "
        f"share of the hits within {high:,} that are within {low:,}. " + _READING,
        [*heads, f"HR@{low} in HR@{high} %"],
        rows,
    )


def order_table(one: Comparison) -> TextTable:
    """Entropy of the next domain, and what TAPE gains where nothing else differs."""
    assert one.stats is not None
    entropy, domains = one.stats.entropy, len(one.stats.domain_names)
    words = (
        f"Given the domain of the present event that of the next one is uncertain by "
        f"{entropy.conditional:.3f} bits, without it by {entropy.marginal:.3f} (at most "
        f"{math.log2(max(domains, 1)):.3f} with {domains} domains); "
        f"{percent(one.stats.switch_share)} % of neighbouring events switch domain. "
    )
    pairs = list(tape_pairs(one.runs))
    words += (
        _READING
        if pairs
        else "No two variants have all but TAPE in common, so its gain is not told."
    )
    rows = [row for without, with_tape in pairs for row in _tape_rows(one, without, with_tape)]
    hits = one.protocol.headlines
    heads = ["TAPE, targets", *map(metric_label, hits)]
    return TextTable("Order of domains, and TAPE", words, heads, rows)


def _tape_rows(one: Comparison, without: str, with_tape: str) -> list[list[str]]:
    metrics = one.protocol.headlines
    name = f"{with_tape} minus {without}"
    lists = one.lists
    if lists is None or not {without, with_tape} <= lists.ranked.keys():
        by_name = {result.variant: result for result in one.results}
        return [[name, *_plain_differences(by_name[without], by_name[with_tape], metrics)]]
    groups = lists.switches()
    found = lists.differences(without, with_tape, groups)
    return [
        [f"{name}{' ' if group else ''}{group}", *(_shown(found[m + group]) for m in metrics)]
        for group in groups
    ]


def _plain_differences(
    base: VariantResult, other: VariantResult, metrics: Sequence[str]
) -> list[str]:
    """Differences of means over seeds, where no errors over users are known."""
    cells = []
    for metric in metrics:
        known = metric in base.metrics and metric in other.metrics
        gain = other.metrics[metric].mean - base.metrics[metric].mean if known else None
        cells.append(MISSING if gain is None else points(gain))
    return cells


def logs_table(comparisons: Sequence[Comparison]) -> TextTable | None:
    """Put several logs side by side: their shape, and what each variant gains over the first.

    Returns:
        None for a single log, or where any has ranking runs, which are measured otherwise.
    """
    if len(comparisons) == 1 or any(one.runs[0].kind != RETRIEVAL for one in comparisons):
        return None
    rows = []
    protocol = comparisons[0].protocol
    for one in comparisons:
        shape = _shape(one)
        for variant, cells in _gains(one, protocol.headlines):
            rows.append([one.data_name, *shape, variant, *cells])
    return TextTable(
        "The logs side by side",
        "The share of the events in the largest domain, the cost ratio delta, the bits that the "
        "next domain is uncertain by given the present one and without it, and what each variant "
        "gains over the first one on the same log: attention pairs as a share of the first's, then "
        "metrics. " + _READING + " Without the models' lists no errors are known.",
        ["log", "users", "domains", "largest domain %", "delta", "H(next | present)", "H(next)",
         "switch %", "variant minus first", "pairs %", *map(metric_label, protocol.headlines)],
        rows,
    )  # fmt: skip


def _shape(one: Comparison) -> list[str]:
    users, delta = one.summary.get("users"), one.summary.get("delta")
    shape = [f"{users:,}" if isinstance(users, int) else MISSING, str(len(one.domains))]
    stats = one.stats
    told = f"{delta:.3f}" if isinstance(delta, float) else MISSING
    if stats is None:
        return [*shape, MISSING, told, MISSING, MISSING, MISSING]
    entropy = stats.entropy
    bits = [f"{entropy.conditional:.3f}", f"{entropy.marginal:.3f}"]
    return [*shape, percent(stats.largest_share), told, *bits, percent(stats.switch_share)]


def _gains(one: Comparison, metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return every variant but the first with its cost and its gains; one line where none is."""
    base, *others = one.results
    if not others:
        return [(MISSING, [MISSING] * (1 + len(metrics)))]
    found = []
    for other in others:
        pairs = [result.costs.get("attention_pairs") for result in (base, other)]
        share = percent(pairs[1] / pairs[0]) if pairs[0] and pairs[1] else MISSING
        lists = one.lists
        if lists is not None and {base.variant, other.variant} <= lists.ranked.keys():
            everyone = {"": lists.switches()[""]}
            gains = lists.differences(base.variant, other.variant, everyone)
            cells = [_shown(gains[m]) if m in gains else MISSING for m in metrics]
        else:
            cells = _plain_differences(base, other, metrics)
        found.append((f"{other.variant} minus {base.variant}", [share, *cells]))
    return found


def _shown(difference: Difference) -> str:
    """Write a difference in points with its standard error, and a star where it is clear."""
    error = difference.standard_error
    text = points(difference.mean) + ("" if error is None else f" \u00b1 {percent(error)}")
    return text + (f" {CLEAR}" if difference.is_clear else "")


def questions_file(comparisons: Sequence[Comparison]) -> str:
    """Write all tables of the open questions as Markdown; empty where there are none."""
    overview = logs_table(comparisons)
    parts = [overview.markdown()] if overview else []
    for one in comparisons:
        label = " (synthetic)" if one.synthetic else ""
        tables = [each.markdown() for each in question_tables(one)]
        parts += [f"## {escape(one.data_name)}{label}\n", *tables] if tables else []
    return "\n".join(parts)
