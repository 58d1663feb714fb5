"""Tables of the page as HTML; every value is escaped here."""

from collections.abc import Sequence
from html import escape

from hstu_xd.report.runs import VariantResult
from hstu_xd.report.style import PALETTE
from hstu_xd.report.tables import Cell, compare, percent, points

Column = tuple[str, str]  # heading, metric


def comparison(
    results: Sequence[VariantResult], columns: Sequence[Column], places: dict[str, int]
) -> str:
    """Variants as rows, metrics in percent as columns; best in bold, difference to the first."""
    compared = [compare(results, metric) for _, metric in columns]
    rows = [
        [_variant_cell(result, places), *(_cell(column[i]) for column in compared)]
        for i, result in enumerate(results)
    ]
    return table(["variant", *(heading for heading, _ in columns)], rows)


def _variant_cell(result: VariantResult, places: dict[str, int]) -> str:
    return f"{swatch(places[result.variant])}{escape(result.variant)}"


def swatch(place: int) -> str:
    """A dot in a variant's colour; a square where the colours begin again."""
    shape = " again" if place >= len(PALETTE) else ""
    return f'<span class="swatch s{place % len(PALETTE)}{shape}"></span>'


def _cell(cell: Cell) -> str:
    if cell.mean is None:
        return '<span class="faint">&ndash;</span>'
    text = f"<b>{percent(cell.mean)}</b>" if cell.best else percent(cell.mean)
    if cell.std is not None:
        text += f' <span class="faint">&plusmn; {percent(cell.std)}</span>'
    if cell.difference is not None:
        look = "diff faint" if cell.within_spread else "diff"
        text += f' <span class="{look}">{_signed(cell.difference)}</span>'
    return text


def _signed(difference: float) -> str:
    return points(difference).replace("-", "&minus;")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on its own; the first column stays in sight.

    Args:
        headings: plain text.
        rows: cells as HTML that is escaped already.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
