"""Compare runs on the same held-out events, user by user, with standard errors.

Which users are easy and which are hard is the same for two models, so it cancels in the difference:
its error is below that of two metrics taken apart.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_xd.data.batches import Split
from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import (
    UNREACHABLE,
    Metrics,
    RankedTargets,
    target_groups,
    user_metrics,
)
from hstu_xd.evaluation.protocol import DEFAULTS, Protocol, measured_notes
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.experiments.report.shared_data import group_by_data, variant_notes
from hstu_xd.experiments.report.tables import (
    MISSING,
    escape,
    markdown_lines,
    metric_label,
    points,
)
from hstu_xd.experiments.run_folders import Run, read_runs
from hstu_xd.objectives.objective import Metric
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import open_data
from hstu_xd.training.stored_settings import allowed_imports


@dataclass(frozen=True)
class Difference:
    """Of one metric over one group of targets.

    Attributes:
        mean: difference of the metric, a fraction.
        standard_error: of that mean as a mean over users; None for a single one.
        count: users.
    """

    mean: float
    standard_error: float | None
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than 1.96 standard errors from zero: 95 % confidence."""
        return self.standard_error is not None and abs(self.mean) > 1.96 * self.standard_error


def paired_differences(
    base: Sequence[RankedTargets],
    other: Sequence[RankedTargets],
    domain_names: Sequence[str],
    protocol: Protocol = DEFAULTS,
    more: Metrics | None = None,
) -> dict[str, Difference]:
    """Metrics of one model minus those of another, a user's mean over seeds first.

    The error says how far the difference would move with other users; that of other seeds is not
    in it, but for what they do to each user alone.

    Args:
        base: the users' targets as each seed of one model ranks them.
        other: the same of the other model; as many seeds or not.
        domain_names: names by domain id.
        protocol: which metrics.
        more: further metrics that both models are measured by.

    Returns:
        Names as :func:`hstu_xd.evaluation.metrics.grouped_metrics` has them.
    """
    found, of_base = (_over_seeds(each, protocol, more) for each in (other, base))
    differences = {name: found[name] - of_base[name] for name in found}
    domains, switched = base[0].domains, base[0].switched
    return {
        f"{name}{suffix}": _difference(values[members])
        for suffix, members in target_groups(domains, switched, domain_names).items()
        for name, values in differences.items()
    }


def _over_seeds(
    ranked: Sequence[RankedTargets], protocol: Protocol, more: Metrics | None
) -> dict[str, Tensor]:
    each = [user_metrics(one, protocol, more) for one in ranked]
    return {name: torch.stack([values[name] for values in each]).mean(0) for name in each[0]}


def _difference(values: Tensor) -> Difference:
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else None
    return Difference(float(values.mean()), error, count)


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairedResult:
    """One variant against the first.

    Attributes:
        variant: its name.
        base: name of the first.
        seeds: of its runs.
        differences: by metric, see :func:`hstu_xd.experiments.comparison.paired_differences`.
        protocol: by which all runs were measured.
        notes: what the numbers mean, in sentences.
    """

    variant: str
    base: str
    seeds: tuple[int, ...]
    differences: dict[str, Difference]
    protocol: Protocol = DEFAULTS
    notes: tuple[str, ...] = ()


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
    """Rank a split's targets with the best model of every run, and take differences user by user.

    Args:
        paths: run folders, or folders of run folders; runs of one variant differ in their seed.
            The first variant is what the others are compared with.
        split: "valid" or "test".
        data: the prepared store, if it has moved since training.
        changes: of the protocol by which the runs were measured in training, by name.
        verify: compare the hash of every file of the store with its manifest first.
        allow_imports: import the modules that runs name beside this package.
        announce: called with a line before every run.

    Raises:
        InputError: not a run or an unfinished one, a single variant, runs on different data or
            with different protocols, none of all domains, or an unknown split.
    """
    if split not in (known := [one.value for one in (Split.VALID, Split.TEST)]):
        raise InputError(f"split is {split!r}; one of {', '.join(known)}")
    runs = read_runs(paths)
    variants = _comparable_variants(runs)
    _check_parts(runs, allow_imports=allow_imports)
    protocol = _shared_protocol(runs, changes or {})
    store = open_data(runs[0].path, data, verify=verify, as_trained=True)
    ranked: dict[str, list[RankedTargets]] = {variant: [] for variant in variants}
    alone: dict[tuple[str, int], list[tuple[np.ndarray, RankedTargets]]] = {}
    metrics: dict[str, Metric] = {}
    users, counts = np.empty(0, np.int64), {}
    for run in runs:
        announce(f"{run.variant} seed {run.seed}" + f" {run.domain}" * bool(run.domain))
        length = run.info["max_sequence_length"]
        held_out = protocol.sequences(store, Split(split), length, domain=run.domain)
        trained = load_trained(run.path, allow_imports=allow_imports, one_domain=True)
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
    base, *rest = variants
    notes = measured_notes(protocol, counts)
    return [
        PairedResult(
            variant,
            base,
            tuple(dict.fromkeys(run.seed for run in variants[variant])),
            paired_differences(
                ranked[base], ranked[variant], store.domain_names, protocol, metrics
            ),
            protocol,
            notes,
        )
        for variant in rest
    ]


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
            f"{others[0][0].path} was trained on other data than {runs[0].path} (hashes differ); "
            "their users cannot be paired"
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
    columns = results[0].protocol.main_columns
    heads += [escape(f"{metric_label(name)}, points") for name in columns]
    rows = [
        [
            escape(one.variant),
            str(len(one.seeds)),
            *(_cell(one.differences.get(name)) for name in columns),
        ]
        for one in results
    ]
    return "\n".join([*markdown_lines(heads, rows), "", *results[0].notes]) + "\n"


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    text = points(difference.mean)
    text = f"**{text}**" if difference.is_clear else text
    error = difference.standard_error
    return text if error is None else f"{text} \u00b1 {100 * error:.2f}"
