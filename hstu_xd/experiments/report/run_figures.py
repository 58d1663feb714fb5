"""Figures of runs: learning curves, and metrics by group of targets (domains, switch and stay)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hstu_xd.experiments.report.style import (
    FAINT,
    INK,
    Canvas,
    Image,
    colour,
    line_style,
    marker,
    short,
    spread_labels,
)
from hstu_xd.experiments.report.tables import metric_label, percent
from hstu_xd.experiments.run_folders import Run, Spread, VariantResult, is_number

LABEL_WIDTH = 16  # characters a line beside a curve
LABEL_HEIGHT = 0.14  # inches a line
FRAME_HEIGHT = 1.0  # inches of title, axis labels and foot around the axes
LONG = 8  # epochs from which the first quarter of a curve is cut off
ROW_HEIGHT = 0.17  # inches a variant in a dot plot
GROUP_GAP = 0.4  # rows between groups
MAX_ROWS = 72

Points = list[tuple[float, float]]


class Group(NamedTuple):
    """Targets that share a metric suffix, e.g. ``("books", "[books]", 120)``."""

    label: str
    suffix: str
    count: int | None


def learning_curves(
    runs: Sequence[Run], metrics: Sequence[str], places: Mapping[str, int], synthetic: bool
) -> list[Image]:
    """One figure a curve: training loss and validation metrics, by epoch.

    Args:
        runs: runs on the same data.
        metrics: what to draw: names of validation metrics, and "loss".
        places: variant name to its place in the report, which fixes its colour.
        synthetic: the data is synthetic.

    Returns:
        Figures of those curves that at least one run has a point of.
    """
    images = []
    for metric in metrics:
        curves = [(run, _points(run, metric)) for run in runs]
        curves = [(run, points) for run, points in curves if points]
        if curves:
            images.append(_curve_figure(metric, curves, places, synthetic))
    return images


def _points(run: Run, metric: str) -> Points:
    """Epoch and value; training rows are averaged over the epoch."""
    by_epoch: dict[float, list[float]] = {}
    for row in run.train if metric == "loss" else run.valid:
        if is_number(row.get(metric)):
            by_epoch.setdefault(row["epoch"], []).append(row[metric])
    return [(epoch, sum(v) / len(v)) for epoch, v in sorted(by_epoch.items())]


def _curve_figure(
    metric: str, curves: list[tuple[Run, Points]], places: Mapping[str, int], synthetic: bool
) -> Image:
    by_variant: dict[str, list[tuple[Run, Points]]] = {}
    for run, points in curves:
        by_variant.setdefault(run.variant, []).append((run, points))
    labels = {v: textwrap.wrap(short(v, 2 * LABEL_WIDTH + 10), LABEL_WIDTH) for v in by_variant}
    lines = sum(len(label) + 0.25 for label in labels.values())
    title = "Training loss" if metric == "loss" else f"Validation {metric_label(metric)}, %"
    canvas = Canvas(
        f"curve_{metric.replace('@', '_at_')}",
        title,
        synthetic=synthetic,
        height=max(2.9, FRAME_HEIGHT + LABEL_HEIGHT * lines),
    )
    ax = canvas.ax
    ends = {
        variant: _draw_variant(ax, members, metric, places[variant])
        for variant, members in by_variant.items()
    }
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    cut = _zoom(ax, [points for _, points in curves], rising=metric != "loss")
    if metric != "loss":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    _label_ends(canvas, ends, labels, places)
    return canvas.finish(cut)


def _draw_variant(
    ax: Axes, members: list[tuple[Run, Points]], metric: str, place: int
) -> tuple[float, float]:
    """Draw a variant's seeds and their mean; returns the point that its label belongs to."""
    look = {"color": colour(place), "linestyle": line_style(place)}
    for run, points in members:
        single = len(members) == 1
        ax.plot(*zip(*points), lw=1.6 if single else 0.7, alpha=1 if single else 0.4, **look)
        best = (run.summary or {}).get("best_epoch")
        picked = [p for p in points if metric != "loss" and p[0] == best]
        # A line of one point would not show at all.
        for epoch, value in points if len(points) == 1 else picked:
            ax.plot([epoch], [value], marker=marker(place), ms=4, color=colour(place))
    # A mean over fewer seeds would jump where a run ends, so it stops with the shortest run;
    # runs that still train are left out of it as soon as others have finished.
    finished = [dict(points) for run, points in members if run.summary is not None]
    values = finished or [dict(points) for _, points in members]
    if len(values) > 1:
        shared = sorted(set.intersection(*map(set, values)))
        means = [sum(value[epoch] for value in values) / len(values) for epoch in shared]
        ax.plot(shared, means, lw=1.9, **look)
    return max((points[-1] for _, points in members), key=lambda point: point[0])


def _label_ends(
    canvas: Canvas,
    ends: Mapping[str, tuple[float, float]],
    labels: Mapping[str, list[str]],
    places: Mapping[str, int],
) -> None:
    """Name every line at its right end, apart from each other, with a leader in its colour."""
    ax = canvas.ax
    low, high = ax.get_ylim()
    line = LABEL_HEIGHT / (canvas.figure.get_figheight() - FRAME_HEIGHT)
    sizes = [line * (len(labels[variant]) + 0.25) for variant in ends]
    heights = spread_labels(
        [(y - low) / (high - low) for _, y in ends.values()], sizes, low=-0.02, high=1.02
    )
    for (variant, end), height in zip(ends.items(), heights):
        ax.annotate(
            "\n".join(labels[variant]),
            xy=end,
            xytext=(1.08, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=INK,
            linespacing=1.0,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour(places[variant]), "lw": 1.0,
                        "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 0},
        )  # fmt: skip


def _zoom(ax: Axes, curves: Sequence[Points], rising: bool) -> str:
    """Leave the steep first epochs of long curves out of sight; returns words for the caption."""
    longest = max(len(points) for points in curves)
    if longest < LONG:
        return ""
    # The last point of a short curve stays in sight too: its label points at it.
    settled = [value for points in curves for _, value in [*points[longest // 4 :], points[-1]]]
    margin = 0.08 * (max(settled) - min(settled))
    low, high = min(settled) - margin, max(settled) + margin
    if all(low <= value <= high for points in curves for _, value in points):
        return ""
    ax.set_ylim(low, high)
    return f"Earlier epochs lie {'below' if rising else 'above'} the part shown."


def grouped_dots(
    name: str,
    metric: str,
    by: str,
    groups: Sequence[Group],
    results: Sequence[VariantResult],
    places: Mapping[str, int],
    synthetic: bool,
) -> Image | None:
    """Test metric of every variant within every group: mean as a dot, spread as a line.

    Args:
        name: file stem.
        metric: e.g. ``hr@100``.
        by: what the groups are, for the title.
        groups: groups from top to bottom; those past what fits are left out with a note.
        results: variants.
        places: variant name to its place in the report.
        synthetic: the data is synthetic.

    Returns:
        The figure, or None where no run reports the metric for any group.
    """
    results = [result for result in results if result.metrics]
    groups = [g for g in groups if any(metric + g.suffix in r.metrics for r in results)]
    if not groups:
        return None
    rows_each = len(results) + 1 if len(results) > 1 else 1
    shown = groups[: max(1, MAX_ROWS // rows_each)]
    canvas = Canvas(
        name,
        f"{metric_label(metric)} {by}, test, %",
        synthetic=synthetic,
        height=1.0 + ROW_HEIGHT * (rows_each + (len(results) > 1) * GROUP_GAP) * len(shown),
    )
    ax = canvas.ax
    row = 0.0
    for group in shown:
        if len(results) > 1:
            row += GROUP_GAP if row else 0
            count = f"  {group.count:,} targets" if group.count is not None else ""
            ax.text(0.0, row, short(group.label, 30) + count, transform=ax.get_yaxis_transform(),
                    va="center_baseline", fontsize=8.5, fontweight="bold")  # fmt: skip
            row += 1
        for result in results:
            label = result.variant if len(results) > 1 else group.label
            value = result.metrics.get(metric + group.suffix)
            _draw_dot(ax, row, short(label, 26), value, places[result.variant])
            row += 1
    ax.set_ylim(row - 0.4, -0.7)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))
    left_out = len(groups) - len(shown)
    return canvas.finish(f"{left_out} smaller ones are in the table only." if left_out else "")


def _draw_dot(ax: Axes, row: float, label: str, value: Spread | None, place: int) -> None:
    beside = ax.get_yaxis_transform()
    ax.text(-0.02, row, label, transform=beside, ha="right", va="center_baseline", fontsize=8)
    if value is None:
        ax.text(1.02, row, "no targets", transform=beside, va="center", fontsize=8, color=FAINT)
        return
    if value.std is not None:
        ends = [value.mean - value.std, value.mean + value.std]
        ax.plot(ends, [row, row], color=colour(place), lw=1.4, solid_capstyle="butt")
    ax.plot([value.mean], [row], marker=marker(place), ms=5, color=colour(place))
    ax.text(1.02, row, percent(value.mean), transform=beside, va="center_baseline", fontsize=8.5)
