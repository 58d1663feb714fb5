"""Comparing variants: best, difference to the first, and the comparison as a Markdown table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hstu_xd.evaluation.protocol import METRICS
from hstu_xd.experiments.run_folders import VariantResult

# What people write in capitals; metrics of one's own keep their names.
_ACRONYMS = ("hr", "ndcg", "mrr", "auc", "gauc")
# Metrics that are no shares, and how far a value is from the best one.
_PLAIN: dict[str, Callable[[float], float]] = {
    "logloss": lambda value: value,
    "calibration": lambda value: abs(value - 1),
}
MISSING = "-"
# Cost of a variant -> head of its column, unit, format.
_COSTS = {
    "attention_pairs": ("pairs", 1, ",.0f"),
    "state_bytes": ("state KiB", 1024, ",.1f"),
    "seconds_per_step": ("s/step", 1, ".2f"),
}


@dataclass(frozen=True)
class Cell:
    """One metric of one variant beside the other variants.

    Attributes:
        mean: mean over seeds, a fraction; None when no run reports the metric.
        std: sample standard deviation over seeds, None for a single seed.
        best: the highest mean of several variants.
        difference: mean minus the first variant's mean; None for the first variant itself.
        within_spread: the difference is no larger than the larger of both spreads; None when
            neither variant has a spread.
    """

    mean: float | None
    std: float | None = None
    best: bool = False
    difference: float | None = None
    within_spread: bool | None = None


def compare(results: Sequence[VariantResult], metric: str) -> list[Cell]:
    """Cells of one metric, one a variant; the first variant is what the others differ from."""
    spreads = [result.metrics.get(metric) for result in results]
    known = [one.mean for one in spreads if one is not None]
    top = best_of(metric, known) if len(known) > 1 else None
    base = spreads[0] if spreads else None
    cells = []
    for i, one in enumerate(spreads):
        if one is None:
            cells.append(Cell(None))
            continue
        difference = within = None
        if i > 0 and base is not None:
            difference = one.mean - base.mean
            noise = [std for std in (one.std, base.std) if std is not None]
            within = abs(difference) <= max(noise) if noise else None
        cells.append(Cell(one.mean, one.std, one.mean == top, difference, within))
    return cells


def is_plain(metric: str) -> bool:
    """Whether a metric, of all or of a group, is no share and so no percentage."""
    return metric.partition("[")[0] in _PLAIN


def best_of(metric: str, values: Sequence[float]) -> float:
    """Return the best of at least one value: the largest of shares."""
    return min(values, key=_PLAIN[metric.partition("[")[0]]) if is_plain(metric) else max(values)


def heading(metric: str, unit: str = " %") -> str:
    """Name a metric with the unit that :func:`shown` gives shares."""
    return metric_label(metric) + ("" if is_plain(metric) else unit)


def shown(metric: str, value: float) -> str:
    """Write a metric in percent; one that is no share with four decimals."""
    return f"{value:.4f}" if is_plain(metric) else percent(value)


def shown_difference(metric: str, difference: float) -> str:
    """Write a difference of a metric in percentage points, or as it is."""
    return f"{difference:+.4f}" if is_plain(metric) else points(difference)


def percent(fraction: float) -> str:
    """Write a fraction as percent with two decimals, without the sign: 0.228 -> ``22.80``."""
    return f"{100 * fraction:.2f}"


def points(difference: float) -> str:
    """Write a difference of fractions in percentage points: 0.0041 -> ``+0.41``."""
    text = f"{100 * difference:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def metric_label(name: str) -> str:
    """``hr@100[switch]`` -> ``HR@100 [switch]``."""
    base, bracket, rest = name.partition("[")
    label = base.upper() if base.partition("@")[0] in _ACRONYMS else base
    return f"{label} {bracket}{rest}" if bracket else label


def markdown_table(
    results: Sequence[VariantResult],
    *,
    metrics: Sequence[str] = METRICS,
    synthetic: bool = False,
) -> str:
    """Write a Markdown table in percent: mean, spread over seeds, difference to the first variant.

    Where attention's pairs were counted, what a variant costs stands beside: pairs and state bytes
    of a user, seconds of a training step.

    Args:
        results: variants as :func:`hstu_xd.experiments.run_folders.aggregate` returns them.
        metrics: columns, e.g. ``("hr@100[switch]", "hr@100[stay]")``.
        synthetic: say above the table that the data is synthetic.

    Returns:
        The table, best means in bold, ending with a newline.

    Example:
        >>> rows = [{"variant": v, "seed": 1, "test": {"mrr": m}}
        ...         for v, m in (("hstu", 0.031), ("all", 0.034))]
        >>> from hstu_xd.experiments.run_folders import aggregate
        >>> print(markdown_table(aggregate(rows), metrics=["mrr"]), end="")
        | variant | seeds | MRR % |
        |---|---:|---:|
        | hstu | 1 | 3.10 |
        | all | 1 | **3.40** (+0.30) |
    """
    columns = [compare(results, metric) for metric in metrics]
    lines = ["Synthetic data.", ""] if synthetic else []
    heads = [escape(heading(metric)) for metric in metrics]
    counted = any("attention_pairs" in result.costs for result in results)
    costs = _COSTS if counted else {}
    heads += [head for head, _, _ in costs.values()]
    rows = []
    for i, result in enumerate(results):
        cells = [_markdown_cell(m, column[i]) for m, column in zip(metrics, columns, strict=True)]
        cells += [
            format(result.costs[name] / unit, form) if name in result.costs else MISSING
            for name, (_, unit, form) in costs.items()
        ]
        rows.append([escape(result.variant), str(len(result.seeds)), *cells])
    lines += markdown_lines(["variant", "seeds", *heads], rows)
    return "\n".join(lines) + "\n"


def markdown_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table of which the first column holds names and the others numbers."""
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _markdown_cell(metric: str, cell: Cell) -> str:
    if cell.mean is None:
        return MISSING
    text = shown(metric, cell.mean)
    text = f"**{text}**" if cell.best else text
    if cell.std is not None:
        text += f" \u00b1 {shown(metric, cell.std)}"
    if cell.difference is not None:
        text += f" ({shown_difference(metric, cell.difference)})"
    return text


def escape(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
