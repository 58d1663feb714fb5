"""Figures of a prepared log: domain transitions, history lengths, cost ratio, domain sizes.

What they show is not in the manifest of the log, so it is computed here from the store.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hstu_xd.data.filters import domain_counts
from hstu_xd.data.statistics import TransitionEntropy, transition_entropy
from hstu_xd.data.store import InteractionStore
from hstu_xd.experiments.report.style import ACCENT, FAINT, INK, ON_ACCENT, Canvas, Image, short
from hstu_xd.experiments.report.tables import percent


@dataclass(frozen=True)
class DataStats:
    """What the report draws of a store with U users and D domains.

    Attributes:
        domain_names: D names.
        events: (D,) int64, events of each domain.
        lengths: (U,) int64, history lengths.
        deltas: (U,) float64, sum_d (s_d / S)^2 of each user, 1/D..1; 0 for a user without events.
        transitions: (D, D) int64, how often an event of the row's domain is followed by one of
            the column's domain, within users.
    """

    domain_names: list[str]
    events: NDArray[np.int64]
    lengths: NDArray[np.int64]
    deltas: NDArray[np.float64]
    transitions: NDArray[np.int64]

    @property
    def mean_delta(self) -> float:
        """Mean over users that have events."""
        return float(self.deltas[self.lengths > 0].mean())

    @property
    def switch_share(self) -> float:
        """Share of neighbouring events that lie in different domains; 0 without neighbours."""
        total = int(self.transitions.sum())
        return 1 - int(self.transitions.trace()) / total if total else 0.0

    @property
    def entropy(self) -> TransitionEntropy:
        """Bits that the domain of the next event is uncertain by."""
        return transition_entropy(self.transitions)

    @property
    def largest_share(self) -> float:
        """Share of the events that lie in the largest domain; 0 without events."""
        return int(self.events.max()) / max(int(self.events.sum()), 1)


def measure(store: InteractionStore) -> DataStats:
    """Read all events of a store once, in blocks of users.

    Raises:
        InputError: the store's catalogue cannot be read.
    """
    num_domains = store.num_domains
    lengths = np.diff(store.offsets)
    deltas = np.zeros(len(lengths))
    events = np.zeros(num_domains, np.int64)
    transitions = np.zeros(num_domains * num_domains, np.int64)
    item_domain = store.catalog.item_domains.numpy()
    for block in domain_counts(store.offsets, store.item_ids, item_domain, num_domains):
        sizes = np.maximum(lengths[block.users, None], 1)
        deltas[block.users] = np.square(block.counts / sizes).sum(axis=1)
        events += block.counts.sum(axis=0)
        user, domain = np.divmod(block.cell, num_domains)
        same_user = user[1:] == user[:-1]
        pairs = (domain[:-1] * num_domains + domain[1:])[same_user]
        transitions += np.bincount(pairs, minlength=num_domains * num_domains)
    return DataStats(
        store.domain_names,
        events,
        lengths,
        deltas,
        transitions.reshape(num_domains, num_domains),
    )


MAX_DOMAINS = 20
SKEWED = 20  # longest over median history from which lengths are drawn on a log axis
BINS = 40


def data_figures(stats: DataStats, synthetic: bool) -> list[Image]:
    """All figures of a log."""
    return [
        domain_sizes(stats, synthetic),
        transitions(stats, synthetic),
        history_lengths(stats, synthetic),
        cost_ratio(stats, synthetic),
    ]


def _largest_domains(stats: DataStats) -> tuple[list[list[int]], list[str]]:
    """Domain ids by falling size as groups of one, the small ones of many as one last group."""
    order = [int(d) for d in np.argsort(-stats.events, kind="stable")]
    kept = order if len(order) <= MAX_DOMAINS else order[: MAX_DOMAINS - 1]
    groups, names = [[d] for d in kept], [stats.domain_names[d] for d in kept]
    if len(kept) < len(order):
        groups.append(order[len(kept) :])
        names.append(f"{len(order) - len(kept)} others")
    return groups, names


def domain_sizes(stats: DataStats, synthetic: bool) -> Image:
    """Interactions of each domain as bars, largest first."""
    groups, names = _largest_domains(stats)
    sizes = [int(stats.events[group].sum()) for group in groups]
    total = max(sum(sizes), 1)
    canvas = Canvas(
        "domain_sizes",
        "Interactions by domain",
        synthetic=synthetic,
        height=max(1.4, 0.9 + 0.22 * len(sizes)),
    )
    ax = canvas.ax
    ax.barh(range(len(sizes)), sizes, height=0.68, color=ACCENT)
    for row, (name, size) in enumerate(zip(names, sizes)):
        beside = ax.get_yaxis_transform()
        ax.text(
            -0.02, row, short(name, 18), transform=beside, ha="right", va="center", fontsize=8.5
        )
        ax.text(1.02, row, f"{size:,}  {percent(size / total)} %", transform=beside, va="center",
                fontsize=8.5)  # fmt: skip
    ax.set_ylim(len(sizes) - 0.4, -0.6)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    ax.grid(axis="y", visible=False)
    return canvas.finish()


def _compact(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g} {unit}"
    return f"{value:g}"


def transitions(stats: DataStats, synthetic: bool) -> Image:
    """Heat map: of the events that follow one of the row's domain, the share in each domain."""
    groups, names = _largest_domains(stats)
    counts = np.array([[stats.transitions[np.ix_(a, b)].sum() for b in groups] for a in groups])
    # The last row tells how far the others are from no dependence at all.
    table = np.vstack([counts, counts.sum(axis=0, keepdims=True)]).astype(np.float64)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    size = len(groups)
    cell = min(0.5, 2.9 / size)
    canvas = Canvas(
        "transitions",
        "Domain of the next event, by domain, %",
        synthetic=synthetic,
        height=1.5 + cell * (size + 1.3),
    )
    _heat_map(canvas.ax, shares, [*names, "any domain"])
    return canvas.finish(
        "Rows are the domain of an event, columns that of the event after it; each row sums to "
        f"100\u00a0%. {percent(stats.switch_share)}\u00a0% of neighbouring events switch domain."
    )


def _heat_map(ax: Axes, shares: NDArray[np.float64], names: list[str]) -> None:
    """Cells over the page's background by opacity; the last row stands apart."""
    rows, columns = shares.shape
    top = max(float(shares.max()), 1e-9)
    digits = 2 if columns <= 6 else 1 if columns <= 9 else 0
    for i, j in np.ndindex(rows, columns):
        y = i + 0.3 if i == rows - 1 else float(i)
        alpha = 0.03 + 0.97 * shares[i, j] / top
        ax.add_patch(Rectangle((j + 0.02, y + 0.02), 0.96, 0.96, color=ACCENT, lw=0, alpha=alpha))
        if columns <= 12:
            ax.text(j + 0.5, y + 0.5, f"{100 * shares[i, j]:.{digits}f}", ha="center", va="center",
                    fontsize=7.5, color=ON_ACCENT if alpha > 0.75 else INK)  # fmt: skip
    for i, name in enumerate(names):
        y = i + 0.8 if i == rows - 1 else i + 0.5
        ax.text(-0.12, y, short(name, 14), ha="right", va="center", fontsize=8.5)
    for j, name in enumerate(names[:-1]):
        upright = columns <= 4
        ax.text(j + 0.5, -0.15, short(name, 11 if upright else 14), ha="center", va="bottom",
                fontsize=8.5, rotation=0 if upright else 90)  # fmt: skip
    ax.set_xlim(0, columns)
    ax.set_ylim(rows + 0.3, 0)
    ax.set_axis_off()


def history_lengths(stats: DataStats, synthetic: bool) -> Image:
    """Histogram of events a user."""
    lengths = stats.lengths[stats.lengths > 0]
    canvas = Canvas("history_lengths", "Events a user", synthetic=synthetic)
    ax = canvas.ax
    median, mean, longest = float(np.median(lengths)), float(lengths.mean()), int(lengths.max())
    shortest = int(lengths.min())
    skewed = longest > SKEWED * median
    if skewed:
        edges = np.unique(np.round(np.geomspace(shortest, longest + 1, BINS + 1)))
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        width = max(1, -(-(longest + 1 - shortest) // BINS))
        edges = np.arange(shortest, longest + width + 1, width)
    _histogram(ax, lengths, edges)
    ax.set_xlabel("events" + (" (log scale)" if skewed else ""))
    _mark(ax, median, f"median {median:g}")
    return canvas.finish(f"Mean {mean:.1f}, median {median:g}, longest {longest:,}.")


def cost_ratio(stats: DataStats, synthetic: bool) -> Image:
    """Histogram of sum_d (s_d / S)^2 over users."""
    deltas = stats.deltas[stats.lengths > 0]
    canvas = Canvas("cost_ratio", "Cost ratio delta over users", synthetic=synthetic)
    _histogram(canvas.ax, deltas, np.linspace(0, 1, BINS + 1))
    canvas.ax.set_xlim(0, 1)
    canvas.ax.set_xlabel("delta")
    _mark(canvas.ax, stats.mean_delta, f"mean {stats.mean_delta:.3f}")
    balanced = 1 / len(stats.domain_names)
    return canvas.finish(
        "Pairs that attention inside domains visits, as a share of all pairs: sum over domains of "
        f"(events in the domain / events)^2. 1 = one domain, {balanced:.3f} = evenly spread over "
        f"all {len(stats.domain_names)}. Mean {stats.mean_delta:.3f}."
    )


def _histogram(ax: Axes, values: NDArray, edges: NDArray) -> None:
    counts, edges = np.histogram(values, bins=edges)
    ax.bar(edges[:-1], counts, width=np.diff(edges) * 0.94, align="edge", color=ACCENT, lw=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("users")


def _mark(ax: Axes, x: float, label: str) -> None:
    """Draw a labelled vertical line; the label sits above the axes so that no bar hides it."""
    ax.axvline(x, color=FAINT, lw=1, ls=(0, (3, 2)))
    ax.text(x, 1.01, label, transform=ax.get_xaxis_transform(), ha="center", va="bottom",
            fontsize=8.5)  # fmt: skip
