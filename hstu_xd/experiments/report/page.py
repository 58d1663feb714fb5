"""Write the report: read runs and their data, draw, and put the folder in place at once.

Around the sections stand the page's head, style sheet and banner, and the protocol in words.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from hstu_xd.experiments.report.html_tables import swatch
from hstu_xd.experiments.report.section import Section
from hstu_xd.experiments.report.shared_data import Comparison, compare_runs, group_by_data
from hstu_xd.experiments.report.style import PALETTE
from hstu_xd.experiments.run_folders import read_runs
from hstu_xd.files import check_output, replaced_folder
from hstu_xd.version import __version__

GENERATOR = '<meta name="generator" content="hstu-xd report">'
HERE = Path(__file__).parent
# The same hues as in the figures' light palette, lightened for a dark page.
DARK_PALETTE = (
    "#b0b6a4",
    "#7a78ff",
    "#ff603a",
    "#34e7a6",
    "#c85cb6",
    "#ffb400",
    "#b8f0ff",
    "#9a776c",
)

PROTOCOL = (
    "Leave-one-out by time: of every user's history the last event is the test target, the one "
    "before it the validation target; the model reads what lies before the target.",
    "The epoch is picked on validation and the test is read once.",
    "The domain of the next event is part of the request, so every model is told it. Candidates "
    "are all items of that domain, without those the user has seen already, except the target; "
    "all variants rank the same candidates.",
    "Ties of scores count against the target.",
    "HR@k is the share of targets ranked at most k, NDCG@k the mean of 1 / log2(rank + 1) over "
    "those (0 for the others), MRR the mean of 1 / rank.",
    "A target follows a switch when its domain differs from that of the event just before it; "
    "otherwise it stays.",
    "Events of a user with the same timestamp are ordered by a hash of user and item, never by "
    "domain, item number or place in the file, which would leak the next domain.",
    "Mean and sample standard deviation are taken over seeds; differences are absolute, in "
    "percentage points.",
)


def page(sections: Sequence[Section]) -> str:
    """Write the whole page as HTML that refers to nothing outside itself."""
    runs = [run for section in sections for run in section.comparison.runs]
    places = sections[0].places
    key = "".join(f"<li>{swatch(place)}{escape(v)}</li>" for v, place in places.items())
    synthetic = [section.comparison for section in sections if section.comparison.synthetic]
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        css=_style_sheet(),
        title=escape(_title(sections)),
        banner=_banner([one.data_name for one in synthetic]) if synthetic else "",
        subtitle=f"{_count(len(runs), 'run')}, {_count(len(places), 'variant')}, seeds "
        + escape(", ".join(dict.fromkeys(str(run.seed) for run in runs))),
        key=key,
        sections="\n".join(_section(section, len(sections) > 1) for section in sections),
        protocol="\n".join(f"<li>{escape(line)}</li>" for line in PROTOCOL),
        version=escape(__version__),
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _title(sections: Sequence[Section]) -> str:
    names = dict.fromkeys(section.comparison.data_name for section in sections)
    return f"Cross-domain recommendation on {', '.join(names)}"


def _banner(names: Sequence[str]) -> str:
    return (
        '<p class="banner"><b>Synthetic data.</b> '
        f"{escape(', '.join(names))} was made by a generator that plants cross-domain structure; "
        "these numbers say nothing about real users.</p>"
    )


def _section(section: Section, several: bool) -> str:
    one = section.comparison
    label = " (synthetic)" if one.synthetic else ""
    heading = f'<h1 class="data">Data: {escape(one.data_name)}{label}</h1>' if several else ""
    return f"<section>{heading}\n{section.html()}\n</section>"


def _style_sheet() -> str:
    text = (HERE / "page.css").read_text(encoding="utf-8")
    return Template(text).substitute(light=_series(PALETTE), dark=_series(DARK_PALETTE)) + "".join(
        f"\n.s{i} {{ background: var(--series-{i}); }}" for i in range(len(PALETTE))
    )


def _series(palette: Sequence[str]) -> str:
    return " ".join(f"--series-{i}: {value};" for i, value in enumerate(palette))


PAGE = "index.html"


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    force: bool = False,
    allow_mixed_data: bool = False,
    data: Path | None = None,
) -> Path:
    """Compare runs in one self-contained HTML page, with every figure beside it as a PNG.

    Args:
        paths: run folders, or folders of run folders; the first run's variant is what the others
            are compared with.
        out: folder to write.
        force: replace an existing report.
        allow_mixed_data: give runs on different data a section each instead of refusing.
        data: the prepared store, if it is no longer where the runs were trained from.

    Returns:
        Path of the page.

    Raises:
        InputError: no run at a path, unreadable files, runs on different data, or an existing
            output folder.
    """
    check_output(out, force=force, ours=is_report, kind="report", parts=(PAGE, "*.png"))
    groups = group_by_data(read_runs(paths), allow_mixed_data)
    comparisons = [compare_runs(group, data) for group in groups]
    sections = _draw(comparisons)
    with replaced_folder(out) as folder:
        for section in sections:
            for image in section.images:
                (folder / f"{image.name}.png").write_bytes(image.png)
        (folder / PAGE).write_text(page(sections), encoding="utf-8")
    return out / PAGE


def is_report(folder: Path) -> bool:
    """Whether a folder holds a page written by this module."""
    index = folder / PAGE
    if not index.is_file():
        return False
    with index.open("rb") as stream:
        return GENERATOR.encode() in stream.read(2000)


def _draw(comparisons: Sequence[Comparison]) -> list[Section]:
    variants = (result.variant for one in comparisons for result in one.results)
    places = {variant: place for place, variant in enumerate(dict.fromkeys(variants))}
    return [
        Section.draw(one, places, prefix=f"data{i}_" if len(comparisons) > 1 else "")
        for i, one in enumerate(comparisons, start=1)
    ]
