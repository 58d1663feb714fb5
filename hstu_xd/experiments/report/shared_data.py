"""Runs on the same data brought together: what one part of the report is about."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import NO_BASELINE
from hstu_xd.evaluation.protocol import RETRIEVAL, Protocol, protocol_notes
from hstu_xd.evaluation.ranking import RankingProtocol, undefined_notes
from hstu_xd.experiments.report.data_figures import DataStats, measure
from hstu_xd.experiments.report.model_lists import ModelLists, list_models
from hstu_xd.experiments.run_folders import (
    Row,
    Run,
    VariantResult,
    aggregate,
    differing_settings,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Runs whose data has the same hashes.

    Attributes:
        runs: in the order given.
        results: test metrics by variant, the first being what others are compared with.
        summary: counts of the data as in a manifest.
        stats: distributions read from the store, None where it is not at hand.
        synthetic: run.json or the manifest says synthetic.
        notes: what a reader should know before trusting the numbers.
        lists: what the models recommend, None where they were not asked.
    """

    runs: list[Run]
    results: list[VariantResult]
    summary: Row
    stats: DataStats | None
    synthetic: bool
    notes: list[str]
    lists: ModelLists | None = None

    @property
    def data_name(self) -> str:
        """Name of the data folder."""
        return Path(str(self.runs[0].info.get("data", "unknown data"))).name

    @property
    def protocol(self) -> Protocol | RankingProtocol:
        """The protocol of the first run, whose metrics are the columns of tables."""
        return self.runs[0].protocol

    @property
    def domains(self) -> list[str]:
        """Domain names, the largest first."""
        domains = self.summary.get("domains") or {}
        return sorted(domains, key=lambda name: -domains[name].get("interactions", 0))


def group_by_data(runs: Sequence[Run], allow_mixed_data: bool) -> list[list[Run]]:
    """Group runs by kind and the hashes of their data, in order of appearance.

    Raises:
        InputError: several kinds of data and ``allow_mixed_data`` is off.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if not group[0].unlike_data_of(run):
                group.append(run)
                break
        else:
            groups.append([run])
    if len(groups) > 1 and not allow_mixed_data:
        first, other = groups[0][0], groups[1][0]
        raise InputError(
            f"{first.path} and {other.path}: {first.unlike_data_of(other)}, so their numbers do "
            "not compare; report them apart, or add --allow-mixed-data for one section each"
        )
    return groups


def compare_runs(
    runs: list[Run],
    data: Path | None,
    *,
    lists: bool = False,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Aggregate runs on the same data and read their store where it can be found.

    Args:
        runs: at least one.
        data: a prepared store to look at before the one that run.json names.
        lists: ask the models of retrieval runs for their test users' lists.
        allow_imports: for that, import the modules that runs name beside this package.
        announce: called with a line before every model that is asked.
    """
    notes = [f"Run {run.path.name} ({run.variant}) {note}." for run in runs for note in run.notes]
    notes += variant_notes(runs)
    stats, found, synthetic = None, None, any(run.synthetic for run in runs)
    try:
        store = _find_store(runs, data)
        stats = measure(store)
        synthetic = synthetic or bool(store.manifest.get("synthetic"))
        if lists and runs[0].kind == RETRIEVAL:
            found, left_out = list_models(runs, store, announce, allow_imports=allow_imports)
            notes += left_out
    except InputError as error:
        notes.append(
            f"No figures of the data: {error}. Give the prepared folder by --data if it has moved."
        )
    for note in notes:
        logger.warning(note)
    notes += foreign_notes(runs)
    notes += until_notes(runs)
    notes += alone_notes([run.row() for run in runs])
    return Comparison(
        runs=runs,
        results=aggregate(run.row() for run in runs),
        summary=runs[0].data_summary,
        stats=stats,
        synthetic=synthetic,
        notes=notes,
        lists=found,
    )


def _find_store(runs: list[Run], data: Path | None) -> InteractionStore:
    """Open the first place that holds the runs' data.

    Raises:
        InputError: nowhere; the message is about the first place.
    """
    places = dict.fromkeys(Path(str(run.info["data"])) for run in runs if run.info.get("data"))
    failure: InputError | None = None
    for place in [*([data] if data is not None else []), *places]:
        try:
            store = InteractionStore.open(place)
            if store.manifest.get("hashes") != runs[0].info["data_hashes"]:
                raise InputError(f"{place}: now holds other data than the runs were trained on")
            return store
        except InputError as error:
            failure = failure or error
    raise failure or InputError("run.json does not say where the data lies")


def measured_by(done: Sequence[Run]) -> list[str]:
    """Say by which protocol runs of one kind that have read their test were measured."""
    if isinstance(protocol := done[0].protocol, RankingProtocol):
        return [*protocol.sentences(), *undefined_notes(done[0].test)]
    whole = next((run for run in done if not run.domain), done[0])
    return protocol_notes([run.info for run in done], whole.test)


def alone_notes(rows: Sequence[Mapping[str, Any]], split: str = "test") -> list[str]:
    """Say what the numbers of a variant of one model a domain mean; nothing without such rows."""
    notes = []
    for variant in dict.fromkeys(row["variant"] for row in rows if row.get("domain")):
        missed = {}
        for row in rows:
            found = row.get(split) or {}
            if row["variant"] == variant and "count" in found:
                without = found.get("count_without_history", 0)
                missed[row["domain"]] = f"{without:,.0f} of {without + found['count']:,.0f}"
        told = ", ".join(f"{name} {number}" for name, number in missed.items())
        notes.append(
            f"{variant} is one model a domain, each trained on its domain's events alone; a target "
            "of a user without an earlier event of the domain is a miss"
            + (f": {told}." if told else ".")
        )
    return notes


def foreign_notes(runs: Sequence[Run]) -> Iterator[str]:
    """Say of each variant which of its parts are not of this package."""
    for variant, parts in {run.variant: run.info.get("parts") for run in runs}.items():
        if parts:
            named = ", ".join(f"{what} {name}" for what, name in parts.items())
            yield f"{variant} has parts from outside hstu-xd: {named}."


def until_notes(runs: Sequence[Run]) -> Iterator[str]:
    """Say of each variant whether it was trained on more than training targets."""
    by_variant: dict[tuple[str, Split], list[Run]] = {}
    for run in runs:
        by_variant.setdefault((run.variant, run.until), []).append(run)
    for (variant, until), members in by_variant.items():
        if until is Split.TRAIN:
            continue
        whose = "validation targets, too"
        if until is Split.TEST:
            whose = "all targets, those of test, too"
        info, told = members[0].info, ", for all its epochs"
        if found := [run.info["refits"]["run"] for run in members if run.info.get("refits")]:
            ones = "one" if len(found) == 1 else "ones"
            told = f", for as many epochs as the best {ones} of {', '.join(found)} took"
        elif (info["train"].get("baseline") or NO_BASELINE) != NO_BASELINE:
            told = ""
        yield f"{variant} was trained on {whose}{told}."


def variant_notes(runs: Sequence[Run]) -> Iterator[str]:
    """Say what makes a mean over the runs of one variant doubtful."""
    by_variant: dict[str, list[Run]] = {}
    for run in runs:
        by_variant.setdefault(run.variant, []).append(run)
    for variant, members in by_variant.items():
        differing = [name for name in differing_settings(members) if name != "train.domain"]
        if differing:
            yield f"Runs of {variant} differ in {', '.join(differing)}, not only in their seed."
        if len({(str(run.seed), run.domain) for run in members}) < len(members):
            yield f"Runs of {variant} repeat a seed, so their spread is too small."
        if 0 < sum(bool(run.test) for run in members) < len(members):
            yield f"Some runs of {variant} have no test metrics yet; the others make its mean."
