"""Tables of the page as HTML: variants with their switches and cost, runs, commands.

Every value is escaped here.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hstu_xd.experiments.report.style import PALETTE
from hstu_xd.experiments.report.tables import Cell, compare, shown, shown_difference
from hstu_xd.experiments.run_folders import (
    Run,
    VariantResult,
    differing_settings,
    is_number,
    spread,
)

Column = tuple[str, str]  # heading, metric


def comparison(
    results: Sequence[VariantResult], columns: Sequence[Column], places: dict[str, int]
) -> str:
    """Variants as rows, metrics as columns; best in bold, difference to the first."""
    compared = [(metric, compare(results, metric)) for _, metric in columns]
    rows = [
        [_variant_cell(result, places), *(_cell(metric, cells[i]) for metric, cells in compared)]
        for i, result in enumerate(results)
    ]
    return table(["variant", *(heading for heading, _ in columns)], rows)


def _variant_cell(result: VariantResult, places: dict[str, int]) -> str:
    return f"{swatch(places[result.variant])}{escape(result.variant)}"


def swatch(place: int) -> str:
    """Draw a dot in a variant's colour; a square where the colours begin again."""
    shape = " again" if place >= len(PALETTE) else ""
    return f'<span class="swatch s{place % len(PALETTE)}{shape}"></span>'


def _cell(metric: str, cell: Cell) -> str:
    if cell.mean is None:
        return '<span class="faint">&ndash;</span>'
    text = shown(metric, cell.mean)
    text = f"<b>{text}</b>" if cell.best else text
    if cell.std is not None:
        text += f' <span class="faint">&plusmn; {shown(metric, cell.std)}</span>'
    if cell.difference is not None:
        look = "diff faint" if cell.within_spread else "diff"
        difference = shown_difference(metric, cell.difference).replace("-", "&minus;")
        text += f' <span class="{look}">{difference}</span>'
    return text


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table that scrolls sideways on its own; the first column stays in sight.

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


NOTHING = '<span class="faint">&ndash;</span>'


def variants_table(runs: Sequence[Run], places: Mapping[str, int]) -> str:
    """Switches and mean cost of each variant."""
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    switches = list(dict.fromkeys(key for run in runs for key in run.info.get("switches") or {}))
    rows = []
    for variant, members in by_variant.items():
        first = members[0].info
        set_to = first.get("switches") or {}
        summaries = [run.summary or {} for run in members]
        rows.append(
            [
                f"{swatch(places[variant])}{escape(variant)}",
                *(_switch(set_to.get(key)) for key in switches),
                _number(first.get("parameters"), ",.0f"),
                _number(first.get("max_sequence_length"), ",.0f"),
                _mean([s.get("seconds_per_step") for s in summaries], ".4f"),
                _mean([s.get("events_per_second") for s in summaries], ",.0f"),
                _mean([s.get("attention_pairs") for s in summaries], ",.0f"),
                _mean([s.get("state_bytes") for s in summaries], ",.0f"),
            ]
        )
    heads = ["variant", *(key.replace("_", " ") for key in switches)]
    heads += ["parameters", "longest history", "seconds a step", "events/s"]
    heads += ["attention pairs a user", "state bytes a user"]
    # What no run of this kind has a number of is left out.
    first = 1 + len(switches)
    told = [i for i in range(len(heads)) if i < first or {row[i] for row in rows} != {NOTHING}]
    return table([heads[i] for i in told], [[row[i] for i in told] for row in rows])


def runs_table(runs: Sequence[Run], places: Mapping[str, int]) -> str:
    """One row a run: how it went, which settings tell it from the others, what it ran on."""
    made_with = ("version", "torch", "device", "threads", "created")
    above = {f"encoder.{key}" for run in runs for key in run.info.get("switches") or {}}
    settings = [n for n in differing_settings(runs) if n not in above | {"parameters"}]
    rows = []
    for run in runs:
        rows.append(
            [
                f"{swatch(places[run.variant])}{escape(run.path.name)}",
                escape(run.variant),
                _text(run.seed),
                "finished" if run.summary is not None else "<b>no summary yet</b>",
                _text((run.summary or {}).get("best_epoch")),
                _text(run.valid[-1]["epoch"] if run.valid else None),
                *(_text(run.settings.get(name)) for name in settings),
                *(_text(run.info.get(key)) for key in made_with),
            ]
        )
    heads = ["run", "variant", "seed", "state", "best epoch", "last epoch"]
    names = [name.rpartition(".")[2].replace("_", " ") for name in settings]
    return table([*heads, *names, "hstu-xd", *made_with[1:]], rows)


def shared_settings(runs: Sequence[Run]) -> str:
    """Write the settings that all runs have in common."""
    apart = differing_settings(runs)
    return table(
        ["setting", "value"],
        [
            [escape(name), _text(value)]
            for name, value in runs[0].settings.items()
            if name not in apart
        ],
    )


def commands(runs: Sequence[Run]) -> str:
    """Write the command of every run as it was recorded."""
    blocks = []
    for run in runs:
        command = run.info.get("command")
        words = " ".join(map(str, command)) if isinstance(command, list) else str(command or "-")
        blocks.append(f"<p>{escape(run.path.name)}</p><pre>{escape(words)}</pre>")
    return "\n".join(blocks)


def _switch(value: Any) -> str:
    if value is None or value is False or value == 0:
        return NOTHING
    return "on" if value is True else escape(str(value))


def _number(value: Any, form: str) -> str:
    return format(value, form) if is_number(value) else NOTHING


def _mean(values: Sequence[Any], form: str) -> str:
    numbers = [value for value in values if is_number(value)]
    return format(spread(numbers).mean, form) if numbers else NOTHING


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    return escape(str(value))
