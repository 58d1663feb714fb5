"""Writes the report: reads runs and their data, draws, and puts the folder in place at once."""

from collections.abc import Sequence
from pathlib import Path

from hstu_xd.data.folder import check_output, replaced_folder
from hstu_xd.report.comparison import Comparison, compare_runs, group_by_data
from hstu_xd.report.page import GENERATOR, Section, page
from hstu_xd.report.runs import read_runs

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
