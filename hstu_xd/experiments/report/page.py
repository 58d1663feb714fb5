"""Write the report: read runs and their data, draw, and put the folder in place at once.

The page is one HTML file: head, style sheet and banner, the protocol in words, and one section of
figures, tables and words for every comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template

from hstu_xd.evaluation.protocol import RANKING, RETRIEVAL
from hstu_xd.experiments.report.breakdowns import Breakdown, breakdowns
from hstu_xd.experiments.report.data_figures import data_figures
from hstu_xd.experiments.report.html_tables import (
    commands,
    comparison,
    runs_table,
    shared_settings,
    swatch,
    table,
    variants_table,
)
from hstu_xd.experiments.report.open_questions import (
    logs_table,
    question_tables,
    questions_file,
)
from hstu_xd.experiments.report.run_figures import Group, grouped_dots, learning_curves
from hstu_xd.experiments.report.shared_data import (
    Comparison,
    compare_runs,
    group_by_data,
    measured_by,
)
from hstu_xd.experiments.report.style import PALETTE, Image, house_style
from hstu_xd.experiments.report.tables import compare, heading, metric_label, percent, points
from hstu_xd.experiments.run_folders import read_runs
from hstu_xd.files import check_output, replaced_folder
from hstu_xd.version import __version__

MAX_TABLE_GROUPS = 100
DOTS = "Dots are means, lines their standard deviation over seeds."


@dataclass(frozen=True)
class Section:
    """A comparison with its figures drawn; ``places`` fixes the variants' colours page-wide."""

    comparison: Comparison
    places: dict[str, int]
    curves: list[Image]
    groups: list[tuple[Breakdown, list[Image]]]
    data: list[Image]

    @classmethod
    def draw(cls, one: Comparison, places: dict[str, int], prefix: str = "") -> "Section":
        """Draw all figures; file names begin with ``prefix``."""

        def named(images: Sequence[Image | None]) -> list[Image]:
            return [replace(i, name=prefix + i.name) for i in images if i is not None]

        def dots(part: Breakdown) -> list[Image | None]:
            return [
                grouped_dots(
                    f"{part.stem}_{metric.replace('@', '_at_')}",
                    metric, part.by, part.groups, one.results, places, one.synthetic,
                )
                for metric in one.protocol.headlines[:-1]
            ]  # fmt: skip

        with house_style():
            return cls(
                comparison=one,
                places=places,
                curves=named(
                    learning_curves(
                        # Models of single domains learn on scales of their own.
                        [run for run in one.runs if not run.domain] or one.runs,
                        ("loss", *one.protocol.main_metrics),
                        places,
                        one.synthetic,
                    )
                ),
                groups=[(part, named(dots(part))) for part in breakdowns(one)],
                data=named(data_figures(one.stats, one.synthetic)) if one.stats else [],
            )

    @property
    def images(self) -> list[Image]:
        """All figures in the order of the page."""
        grouped = [image for _, images in self.groups for image in images]
        return [*self.curves, *grouped, *self.data]

    def html(self) -> str:
        """Return the section's HTML."""
        parts = [
            self._notes(),
            self._facts(),
            self._results(),
            _figures(
                "Learning curves",
                self._seeds("Thin lines are seeds, thick lines their mean. ")
                + "Dots mark the epoch picked on validation.",
                self.curves,
            ),
            *(self._by_group(part, images) for part, images in self.groups),
            self._open_questions(),
            _figures("The data", "", self.data),
            self._runs(),
        ]
        return "\n".join(part for part in parts if part)

    def _open_questions(self) -> str:
        tables = [one.html() for one in question_tables(self.comparison)]
        return "\n".join(["<h2>Open questions</h2>", *tables]) if tables else ""

    def _notes(self) -> str:
        if not self.comparison.notes:
            return ""
        items = "\n".join(f"<li>{escape(note)}</li>" for note in self.comparison.notes)
        return f'<ul class="notes">\n{items}\n</ul>'

    def _facts(self) -> str:
        summary = self.comparison.summary
        cards = [
            _card(f"{summary[key]:,}", key)
            for key in ("users", "items", "interactions")
            if isinstance(summary.get(key), int)
        ]
        if self.comparison.domains:
            cards.append(_card(str(len(self.comparison.domains)), "domains"))
        if isinstance(summary.get("delta"), float):
            cards.append(_card(f"{summary['delta']:.3f}", "cost ratio delta"))
        return f'<div class="cards">{"".join(cards)}</div>' if cards else ""

    def _results(self) -> str:
        results = self.comparison.results
        if not any(result.metrics for result in results):
            return "<h2>Test metrics</h2>\n<p>No run has read its test yet.</p>"
        columns = [
            (heading(metric, "\u00a0%"), metric) for metric in self.comparison.protocol.metrics
        ]
        return "\n".join(
            [
                "<h2>Test metrics</h2>",
                f'<div class="cards wide">{"".join(self._headlines())}</div>',
                comparison(results, columns, self.places),
                f'<p class="small">{self._reading()}</p>',
                f'<p class="small">{escape(" ".join(self._protocol()))}</p>',
            ]
        )

    def _headlines(self) -> list[str]:
        results = self.comparison.results
        cards = []
        for metric in self.comparison.protocol.headlines:
            cells = compare(results, metric)
            known = [(c.mean, i) for i, c in enumerate(cells) if c.mean is not None]
            if not known:
                continue
            value, best = max(known, key=lambda pair: (pair[0], -pair[1]))
            name = metric_label(metric)
            if len(known) > 1:
                name = f"best {name}: {results[best].variant}"
            difference = cells[best].difference
            if difference is not None:
                name += f", {points(difference)} to {results[0].variant}"
            cards.append(_card(f"{percent(value)} %", name, self.places[results[best].variant]))
        return cards

    def _reading(self) -> str:
        results = self.comparison.results
        words = []
        if len(results) > 1:
            words.append(
                "Best mean in bold; below it the absolute difference to "
                f"<b>{escape(results[0].variant)}</b> in percentage points."
            )
        if any(len(result.seeds) > 1 for result in results):
            words.append("&plusmn; is the sample standard deviation over seeds.")
            if len(results) > 1:
                words.append("Differences no larger than the larger of both spreads are grey.")
        hits = self.comparison.protocol.headlines[0]
        hit, count = results[0].metrics.get(hits), results[0].metrics.get("count")
        if hit is not None and count is not None:
            error = (hit.mean * (1 - hit.mean) / count.mean) ** 0.5
            words.append(
                f"{count.mean:,.0f} test targets: the sampling error of one "
                f"{metric_label(hits)} is about "
                f"{percent(error)} points, whatever the seeds say."
            )
        return " ".join(words)

    def _protocol(self) -> list[str]:
        """Say by which protocol the runs that have read their test were measured."""
        return measured_by([run for run in self.comparison.runs if run.test])

    def _seeds(self, several: str) -> str:
        """Words that only hold where a variant has several seeds."""
        return several if any(len(result.seeds) > 1 for result in self.comparison.results) else ""

    def _by_group(self, part: Breakdown, images: Sequence[Image]) -> str:
        if not images:
            return ""
        drawn = _figures(part.heading, part.words + self._seeds(DOTS), images)
        if part.folded:
            return drawn + "\n".join(
                f"<details><summary>{metric_label(metric)} {part.by} as a table</summary>\n"
                + self._group_table([metric], part.groups[:MAX_TABLE_GROUPS])
                + "</details>"
                for metric in self.comparison.protocol.headlines[:-1]
            )
        return drawn + self._group_table(self.comparison.protocol.headlines, part.groups)

    def _group_table(self, metrics: Sequence[str], groups: Sequence[Group]) -> str:
        columns = []
        for group in groups:
            for metric in metrics:
                several = f"{metric_label(metric)} " if len(metrics) > 1 else ""
                name = group.suffix.strip("[]") if several else group.label
                columns.append((f"{several}{name}\u00a0%", metric + group.suffix))
        return comparison(self.comparison.results, columns, self.places)

    def _runs(self) -> str:
        one = self.comparison
        return "\n".join(
            [
                "<h2>Variants and their cost</h2>",
                variants_table(one.runs, self.places),
                "<h2>Runs</h2>",
                runs_table(one.runs, self.places),
                "<details><summary>Settings that all runs share</summary>\n"
                f"{shared_settings(one.runs)}</details>",
                f"<details><summary>Commands</summary>\n{commands(one.runs)}</details>",
                _domain_table(one.summary.get("domains") or {}),
            ]
        )


def _card(value: str, name: str, place: int | None = None) -> str:
    dot = "" if place is None else swatch(place)
    return f'<div class="card"><b>{escape(value)}</b><span>{dot}{escape(name)}</span></div>'


def _figures(heading: str, words: str, images: Sequence[Image]) -> str:
    if not images:
        return ""
    figures = "\n".join(
        f'<figure aria-label="{escape(image.title)}">{image.svg}'
        f"<figcaption>{escape(image.caption)}</figcaption></figure>"
        for image in images
    )
    text = f"<p>{escape(words)}</p>\n" if words else ""
    # Two or four figures would leave a hole in rows of three.
    look = "figures even" if len(images) in (2, 4) else "figures"
    return f'<h2>{escape(heading)}</h2>\n{text}<div class="{look}">\n{figures}\n</div>'


def _domain_table(domains: Mapping[str, Mapping[str, int]]) -> str:
    if not domains:
        return ""
    keys = ("users", "items", "interactions")
    rows = [
        [escape(name), *(f"{counts[key]:,}" if key in counts else "&ndash;" for key in keys)]
        for name, counts in domains.items()
    ]
    return (
        f"<details><summary>Counts by domain</summary>\n{table(['domain', *keys], rows)}</details>"
    )


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

RETRIEVAL_PROTOCOL = (
    "Where nothing else is said, leave-one-out by time: of every user's history the last event is "
    "the test target, the one before it the validation target; the model reads what lies before "
    "the target.",
    "The epoch is picked on validation and the test is read once.",
    "The domain of the next event is part of the request, so every model is told it; all variants "
    "rank the same candidates.",
    "HR@k is the share of targets ranked at most k, NDCG@k the mean of 1 / log2(rank + 1) over "
    "those (0 for the others), MRR the mean of 1 / rank.",
    "A target follows a switch when its domain differs from that of the event just before it; "
    "otherwise it stays.",
    "Events of a user with the same timestamp are ordered by a hash of user and item, never by "
    "domain, item number or place in the file, which would leak the next domain.",
)
RANKING_PROTOCOL = (
    "A request is a user, a time, a goal and candidates of which some were taken; a model reads "
    "what the user did strictly before that time. The log is cut in time for all users alike.",
    "The epoch is picked on validation and the test is read once; all variants rank the same "
    "candidates.",
    "Differences of log loss and calibration, which are no shares, are told as they are.",
)
SEEDS_PROTOCOL = (
    "Mean and sample standard deviation are taken over seeds; differences are absolute, in "
    "percentage points."
)
PROTOCOLS = {RETRIEVAL: RETRIEVAL_PROTOCOL, RANKING: RANKING_PROTOCOL}


def page(sections: Sequence[Section]) -> str:
    """Write the whole page as HTML that refers to nothing outside itself."""
    runs = [run for section in sections for run in section.comparison.runs]
    places = sections[0].places
    key = "".join(f"<li>{swatch(place)}{escape(v)}</li>" for v, place in places.items())
    synthetic = [section.comparison for section in sections if section.comparison.synthetic]
    kinds = dict.fromkeys(run.kind for run in runs)
    overview = logs_table([section.comparison for section in sections])
    protocol = [*(line for kind in kinds for line in PROTOCOLS[kind]), SEEDS_PROTOCOL]
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        generator=GENERATOR,
        css=_style_sheet(),
        title=escape(_title(sections)),
        banner=_banner([one.data_name for one in synthetic]) if synthetic else "",
        subtitle=f"{_count(len(runs), 'run')}, {_count(len(places), 'variant')}, seeds "
        + escape(", ".join(dict.fromkeys(str(run.seed) for run in runs))),
        key=key,
        sections="\n".join(
            [
                *([f"<section>{overview.html()}</section>"] if overview else []),
                *(_section(section, len(sections) > 1) for section in sections),
            ]
        ),
        protocol="\n".join(f"<li>{escape(line)}</li>" for line in protocol),
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
QUESTIONS = "open_questions.md"


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    force: bool = False,
    allow_mixed_data: bool = False,
    data: Path | None = None,
    lists: bool = True,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> Path:
    """Compare runs in one self-contained HTML page, with every figure beside it as a PNG.

    Args:
        paths: run folders, or folders of run folders; the first run's variant is what the others
            are compared with.
        out: folder to write.
        force: replace an existing report.
        allow_mixed_data: give runs on different data a section each instead of refusing.
        data: the prepared store, if it is no longer where the runs were trained from.
        lists: ask every model for its test users' lists, which the open questions are answered by;
            it costs about as much as measuring their test again.
        allow_imports: to ask models, import the modules that runs name beside this package.
        announce: called with a line before every model that is asked.

    Returns:
        Path of the page.

    Raises:
        InputError: no run at a path, unreadable files, runs on different data, or an existing
            output folder.
    """
    check_output(out, force=force, ours=is_report, kind="report", parts=(PAGE, QUESTIONS, "*.png"))
    groups = group_by_data(read_runs(paths), allow_mixed_data)
    comparisons = [
        compare_runs(group, data, lists=lists, allow_imports=allow_imports, announce=announce)
        for group in groups
    ]
    sections = _draw(comparisons)
    with replaced_folder(out, force=force) as folder:
        for section in sections:
            for image in section.images:
                (folder / f"{image.name}.png").write_bytes(image.png)
        (folder / PAGE).write_text(page(sections), encoding="utf-8")
        if questions := questions_file(comparisons):
            (folder / QUESTIONS).write_text(questions, encoding="utf-8")
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
