"""One look for all figures, and a figure as PNG and as inline SVG that follows the page's theme."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

WIDTH = 4.0  # inches; 288 SVG units, so that a 360-pixel phone enlarges 8.5-point text a little
PNG_DPI = 200

INK = "#1b1f24"
FAINT = "#68707a"
GRID = "#dfe3e8"
ACCENT = "#2f63e4"
ON_ACCENT = "#fefefe"
# Chosen by search so that all pairs differ under protanopia, deuteranopia and tritanopia.
PALETTE = (
    "#6a705f",
    "#2f63e3",
    "#d42010",
    "#29a28f",
    "#85448f",
    "#ac9615",
    "#4aa6d6",
    "#4e320a",
)
# Past the palette colours repeat with another line style and marker.
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")

# The page's style sheet defines these for light and dark.
CSS_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    ACCENT: "--accent",
    ON_ACCENT: "--page",
} | {colour: f"--series-{i}" for i, colour in enumerate(PALETTE)}

_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Image:
    """A finished figure: file stem, title, caption (plain text), PNG bytes and inline SVG."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def colour(index: int) -> str:
    """Colour of the variant with this place in the report."""
    return PALETTE[index % len(PALETTE)]


def line_style(index: int) -> str:
    """Line style of the variant with this place in the report."""
    return LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]


def marker(index: int) -> str:
    """Marker of the variant with this place in the report."""
    return MARKERS[index // len(PALETTE) % len(MARKERS)]


class Canvas:
    """A figure being drawn.

    Args:
        name: file stem; also keeps the SVG's ids apart from other figures on the page.
        title: stands in the figure, so that the PNG can travel alone.
        synthetic: say so inside the figure.
        height: inches.
    """

    def __init__(self, name: str, title: str, *, synthetic: bool, height: float = 2.9) -> None:
        self.name = name
        self.title = title
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
        if synthetic:
            self.figure.supxlabel("synthetic data", x=0.988, ha="right", fontsize=8, color=FAINT)
        self.ax: Axes = self.figure.add_subplot()

    def finish(self, caption: str = "") -> Image:
        """Render the figure."""
        for text in self.figure.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)  # names may hold dollar signs
        # Lay out once, not once a file.
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")
        return Image(self.name, self.title, caption, self._png(), self._svg())

    def _png(self) -> bytes:
        buffer = io.BytesIO()
        self._save(buffer, "png", {"Software": None})
        return buffer.getvalue()

    def _svg(self) -> str:
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self._save(buffer, "svg", nothing)
        return _themed(buffer.getvalue().decode())

    def _save(self, buffer: io.BytesIO, form: str, metadata: dict) -> None:
        self.figure.savefig(
            buffer, format=form, dpi=PNG_DPI, transparent=form == "svg", metadata=metadata
        )


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and finish figures inside this context."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # Names may be in a script that the PNG's font lacks; the page's SVG shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _themed(svg: str) -> str:
    """Inline form of a matplotlib SVG: no prolog, no fixed size, theme colours as variables."""
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    # Names that differ only in their number would repeat across figures; nothing refers to them.
    body = re.sub(r'<g id="[A-Za-z][\w.]*_\d+">', "<g>", body)
    body = body.replace('xlink:href="#', 'href="#')
    for value, variable in CSS_VARIABLES.items():
        body = body.replace(value, f"var({variable})")
    body = body.replace("'DejaVu Sans'", "var(--font)")
    return f'<svg {view_box.group()} role="img">{body}'


def short(text: str, length: int = 22) -> str:
    """Shorten a name to one line of a figure, in its middle, as names differ at the end."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty)"
    if len(clean) <= length:
        return clean
    tail = (length - 2) // 2
    return f"{clean[: length - 2 - tail]}..{clean[-tail:]}"


def spread_labels(
    heights: Sequence[float], sizes: Sequence[float], low: float, high: float
) -> list[float]:
    """Move labels apart so that none overlap, each as close as possible to its place.

    Args:
        heights: wanted middles, any order.
        sizes: heights of the labels themselves, same unit.
        low: no label reaches below this, if there is room for all.
        high: no label reaches above this, if there is room for all.

    Returns:
        Middles in the order given.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # Measured from where it would lie in a gapless stack, every label may only stay or move up
    # with its place in the order: pool neighbours that violate this around their mean.
    stacked, pools = 0.0, list[list[float]]()
    middles = {}
    for i in order:
        middles[i] = stacked + sizes[i] / 2
        stacked += sizes[i]
        pools.append([heights[i] - middles[i]])
        while len(pools) > 1 and _mean(pools[-1]) < _mean(pools[-2]):
            pools[-2:] = [pools[-2] + pools[-1]]
    shifts = [_mean(pool) for pool in pools for _ in pool]
    placed = [0.0] * len(heights)
    for i, shift in zip(order, shifts):
        placed[i] = middles[i] + max(min(shift, high - stacked), low)
    return placed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
