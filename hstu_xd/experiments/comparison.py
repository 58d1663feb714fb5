"""Compare runs on the same held-out events or requests, user by user, with standard errors."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hstu_xd.data.batches import Split
from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import UNREACHABLE, RankedTargets
from hstu_xd.evaluation.paired import (
    Difference,
    paired_differences,
    paired_ranking_differences,
)
from hstu_xd.evaluation.protocol import (
    DEFAULTS,
    RANKING,
    Protocol,
    common_until,
    measured_notes,
)
from hstu_xd.evaluation.ranking import Grouping, RankingProtocol, ScoredRows
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.experiments.report.shared_data import group_by_data, until_notes, variant_notes
from hstu_xd.experiments.report.tables import (
    MISSING,
    escape,
    heading,
    markdown_lines,
    shown,
    shown_difference,
)
from hstu_xd.experiments.run_folders import Run, read_runs
from hstu_xd.objectives.objective import Metric
from hstu_xd.ranking.run import load_ranker
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import check_measurable, open_data
from hstu_xd.training.stored_settings import allowed_imports

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairedResult:
    """One variant against the first.

    Attributes:
        variant: its name.
        base: name of the first.
        seeds: of its runs.
        differences: by metric, see :mod:`hstu_xd.evaluation.paired`.
        protocol: by which all runs were measured.
        notes: what the numbers mean, in sentences.
    """

    variant: str
    base: str
    seeds: tuple[int, ...]
    differences: dict[str, Difference]
    protocol: Protocol | RankingProtocol = DEFAULTS
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Measured:
    """Runs that were measured alike.

    Attributes:
        differences: gives those of a second variant to a first, by their names.
        protocol: by which they were measured.
        notes: what the numbers mean.
    """

    differences: Callable[[str, str], dict[str, Difference]]
    protocol: Protocol | RankingProtocol
    notes: tuple[str, ...]


def pair_runs(
    paths: Sequence[Path],
    *,
    split: str = "test",
    data: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    verify: bool = False,
    allow_imports: bool = False,
    announce: Callable[[str], object] = lambda line: None,
) -> list[PairedResult]:
    """Measure the best model of every run on a split, and take differences user by user.

    Args:
        paths: folders of runs of one kind, or folders of run folders; runs of one variant differ
            in their seed. The first variant is what the others are compared with.
        split: "valid" or "test".
        data: the prepared store, or of ranking runs the requests, if it has moved since training.
        changes: of the protocol by which retrieval runs were measured in training, by name.
        verify: compare the hash of every file of the store with its manifest first.
        allow_imports: import the modules that retrieval runs name beside this package.
        announce: called with a line before every run.

    Raises:
        InputError: not a run or an unfinished one, a single variant, runs of different kinds, on
            different data or with different protocols, none of all domains, an unknown split, or
            what has no meaning for ranking runs.
    """
    if split not in (known := [one.value for one in (Split.VALID, Split.TEST)]):
        raise InputError(f"split is {split!r}; one of {', '.join(known)}")
    runs = read_runs(paths)
    variants = _comparable_variants(runs)
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    if runs[0].kind == RANKING:
        _refuse_options(runs[0], given | {"allow_imports": True} if allow_imports else given)
        measured = _measure_ranking(runs, Split(split), data, verify, announce)
    else:
        measured = _measure_retrieval(
            runs, Split(split), data, given, verify, allow_imports, announce
        )
    base, *rest = variants
    return [
        PairedResult(
            variant,
            base,
            tuple(dict.fromkeys(run.seed for run in variants[variant])),
            measured.differences(base, variant),
            measured.protocol,
            measured.notes,
        )
        for variant in rest
    ]


def _refuse_options(run: Run, given: Mapping[str, Any]) -> None:
    if given:
        told = ", ".join(f"{name} = {value!r}" for name, value in given.items())
        raise InputError(
            f"{run.path} is a ranking run, of candidates that its requests name: {told} has no "
            "meaning there; leave it out"
        )


def _measure_ranking(
    runs: Sequence[Run],
    split: Split,
    data: Path | None,
    verify: bool,
    announce: Callable[[str], object],
) -> _Measured:
    """Score the candidates of a split by every run."""
    scored: dict[str, list[ScoredRows]] = {}
    groups: list[Grouping] = []
    for run in runs:
        announce(f"{run.variant} seed {run.seed}")
        trained = load_ranker(run.path, data, verify=verify)
        scored.setdefault(run.variant, []).append(trained.task.scored(trained.model, split))
        groups = groups or trained.task.groups(split)
        verify = False  # the store is the same
    protocol = RankingProtocol()
    return _Measured(
        lambda base, other: paired_ranking_differences(scored[base], scored[other], groups),
        protocol,
        tuple(protocol.sentences()),
    )


def _measure_retrieval(
    runs: Sequence[Run],
    split: Split,
    data: Path | None,
    changes: Mapping[str, Any],
    verify: bool,
    allow_imports: bool,
    announce: Callable[[str], object],
) -> _Measured:
    """Rank the targets of a split by every run."""
    for run in runs:
        check_measurable(run.path, run.info, split)
    _check_parts(runs, allow_imports=allow_imports)
    protocol = _shared_protocol(runs, changes)
    store = open_data(runs[0].path, data, verify=verify, as_trained=True)
    ranked: dict[str, list[RankedTargets]] = {run.variant: [] for run in runs}
    alone: dict[tuple[str, int], list[tuple[np.ndarray, RankedTargets]]] = {}
    metrics: dict[str, Metric] = {}
    users, counts = np.empty(0, np.int64), {}
    until = common_until(run.info for run in runs)
    for run in runs:
        announce(f"{run.variant} seed {run.seed}" + f" {run.domain}" * bool(run.domain))
        trained = load_trained(run.path, allow_imports=allow_imports, one_domain=True)
        held_out = protocol.sequences(store, split, trained.window, domain=run.domain, until=until)
        # Every model is measured by what any of them is measured by.
        metrics |= trained.metrics
        found = rank_targets(
            trained.ranker, held_out, held_out.users, protocol=protocol, scorer=trained.scorer
        )
        if run.domain:
            alone.setdefault((run.variant, run.seed), []).append((held_out.users, found))
        else:
            ranked[run.variant].append(found)
            users, counts = held_out.users, found.counts(protocol) | held_out.counts
    whole = [found for each in ranked.values() for found in each]
    for (variant, _), parts in alone.items():
        ranked[variant].append(_joined(parts, users, whole[0]))
    return _Measured(
        lambda base, other: paired_differences(
            ranked[base], ranked[other], store.domain_names, protocol, metrics
        ),
        protocol,
        (*measured_notes(protocol, counts, until), *until_notes(runs)),
    )


def _joined(
    parts: Sequence[tuple[np.ndarray, RankedTargets]], users: np.ndarray, whole: RankedTargets
) -> RankedTargets:
    """Join what models of one domain each rank; a target that none is asked for is a miss.

    Args:
        parts: the users of each domain, and their targets.
        users: (Q,) of all domains.
        whole: their targets, by a model of all domains.
    """
    ranks = torch.full_like(whole.ranks, UNREACHABLE)
    for some, found in parts:
        ranks[torch.from_numpy(np.searchsorted(users, some))] = found.ranks
    return replace(whole, ranks=ranks)


def _shared_protocol(runs: Sequence[Run], changes: Mapping[str, Any]) -> Protocol:
    """Return the protocol that all runs have once what is given is changed."""
    protocols = [Protocol.from_run(run.info).but(**changes) for run in runs]
    for run, protocol in zip(runs, protocols):
        if protocol != protocols[0]:
            raise InputError(
                f"{run.path} is evaluated by {protocol}, {runs[0].path} by {protocols[0]}; say "
                "which by options, such as --exclude-seen"
            )
    return protocols[0]


def _comparable_variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by variant, refusing what cannot be paired and warning of what is doubtful."""
    _, *others = group_by_data(runs, allow_mixed_data=True)
    if others:
        raise InputError(
            f"{others[0][0].path} cannot be paired with {runs[0].path}: "
            f"{others[0][0].unlike_data_of(runs[0])}"
        )
    variants: dict[str, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
        if run.summary is None:
            raise InputError(f"{run.path}: {run.notes[0]}; finish it, or leave it out")
    for note in variant_notes(runs):
        _logger.warning(note)
    if all(run.domain for run in runs):
        raise InputError(
            f"{runs[0].path} was trained on one domain alone, as all runs here; give runs of all "
            "domains to compare them with"
        )
    if len(variants) == 1:
        raise InputError(
            f"only {runs[0].variant!r} is there; give runs of another variant to compare it with"
        )
    return variants


def _check_parts(runs: Sequence[Run], *, allow_imports: bool) -> None:
    """Refuse runs that may not be loaded, or that call two metrics by one name, before any is."""
    known: dict[str, str] = {}
    for run in runs:
        allowed_imports(run.path, allow_imports=allow_imports)
        for what, name in (run.info.get("parts") or {}).items():
            if what.startswith("metric ") and known.setdefault(what, name) != name:
                raise InputError(
                    f"{run.path}: its {what} is {name}, that of another run {known[what]}; compare "
                    "runs that are measured alike"
                )


def paired_table(results: Sequence[PairedResult]) -> str:
    """Write differences in points and their standard errors as Markdown, clear ones in bold."""
    heads = [f"minus {escape(results[0].base)}", "seeds"]
    columns = results[0].protocol.columns({name for one in results for name in one.differences})
    heads += [escape(heading(name, ", points")) for name in columns]
    rows = [
        [
            escape(one.variant),
            str(len(one.seeds)),
            *(_cell(name, one.differences.get(name)) for name in columns),
        ]
        for one in results
    ]
    return "\n".join([*markdown_lines(heads, rows), "", *results[0].notes]) + "\n"


def _cell(name: str, difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    text = shown_difference(name, difference.mean)
    text = f"**{text}**" if difference.is_clear else text
    error = difference.standard_error
    return text if error is None else f"{text} \u00b1 {shown(name, error)}"
