"""What the models of a report recommend to their test users: ranks, lists, popularity.

Every model is loaded and asked once, in batches; of its lists the counts of items are kept alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import RankedTargets
from hstu_xd.evaluation.paired import Difference, differences_by_group, mean_over_seeds
from hstu_xd.evaluation.popularity import (
    ListTally,
    Tenths,
    percentiles_in_domain,
    tenths_of_targets,
    training_counts,
)
from hstu_xd.evaluation.protocol import Protocol, common_until
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.experiments.run_folders import Run, differing_settings
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.run import load_trained


@dataclass(frozen=True)
class ModelLists:
    """What the models of runs on the same data recommend.

    Attributes:
        ranked: by variant, the first being what others are compared with: the test targets as each
            of its seeds ranks them, the same users in the same order.
        figures: by variant, of each of its seeds, see
            :meth:`hstu_xd.evaluation.popularity.ListTally.figures`.
        tenths: of the test targets by their popularity.
        protocol: by which all were measured.
    """

    ranked: dict[str, list[RankedTargets]]
    figures: dict[str, list[dict[str, float]]]
    tenths: Tenths
    protocol: Protocol

    @property
    def base(self) -> str:
        """Name of the variant that the others are compared with."""
        return next(iter(self.ranked))

    def means(self, variant: str, groups: dict[str, Tensor]) -> dict[str, float]:
        """Take a variant's metrics over groups of targets, the mean over its seeds.

        Args:
            variant: its name.
            groups: (Q,) bool of each suffix.
        """
        found = mean_over_seeds(self.ranked[variant], self.protocol)
        return {
            f"{name}{suffix}": float(values[members].mean())
            for suffix, members in groups.items()
            for name, values in found.items()
        }

    def differences(
        self, base: str, other: str, groups: dict[str, Tensor]
    ) -> dict[str, Difference]:
        """Take paired differences of two variants over groups of targets, other minus base."""
        return differences_by_group(self.ranked[base], self.ranked[other], groups, self.protocol)

    def switches(self) -> dict[str, Tensor]:
        """Return who is among all targets, those after a switch and the others, where any are."""
        switched = self.ranked[self.base][0].switched
        groups = {"": switched | True, "[switch]": switched, "[stay]": ~switched}
        return {suffix: members for suffix, members in groups.items() if bool(members.any())}


def list_models(
    runs: Sequence[Run],
    store: InteractionStore,
    announce: Callable[[str], object] = lambda line: None,
    *,
    allow_imports: bool = False,
) -> tuple[ModelLists | None, list[str]]:
    """Ask the best model of every retrieval run for its test users' lists.

    Runs that cannot be asked are left out, each with a note: those that have not read their test,
    those of one domain alone, those that lack their model or need code of the user's own, and those
    that were measured by another protocol than the first.

    Args:
        runs: on the store.
        store: the data that they were trained on.
        announce: called with a line before every run.
        allow_imports: import the modules that runs name beside this package.

    Returns:
        What was found, None where no run could be asked; and the notes.
    """
    ranked: dict[str, list[RankedTargets]] = {}
    tallies: dict[str, list[ListTally]] = {}
    notes: list[str] = []
    protocol = next((run.protocol for run in runs if not _left_out(run, None)), None)
    if not isinstance(protocol, Protocol):
        return None, [_note(run, _left_out(run, None)) for run in runs]
    for run in runs:
        reason = _left_out(run, protocol)
        if not reason:
            announce(f"lists of {run.path.name} ({run.variant})")
            try:
                found, tally = _ask(run, store, protocol, allow_imports=allow_imports)
            except InputError as error:
                reason = f"cannot be asked: {error}"
            else:
                ranked.setdefault(run.variant, []).append(found)
                tallies.setdefault(run.variant, []).append(tally)
        if reason:
            notes.append(_note(run, reason))
    if not ranked:
        return None, notes
    training = protocol.sequences(
        store, Split.TRAIN, 1, until=common_until(run.info for run in runs)
    )
    counts = training_counts(store.catalog, training)
    percentiles = percentiles_in_domain(counts, store.catalog)
    test = protocol.sequences(store, Split.TEST, 1)
    _, targets = test.batch(test.users)
    figures = {
        variant: [tally.figures(percentiles) for tally in each] for variant, each in tallies.items()
    }
    return ModelLists(ranked, figures, tenths_of_targets(counts[targets]), protocol), notes


def _ask(
    run: Run, store: InteractionStore, protocol: Protocol, *, allow_imports: bool
) -> tuple[RankedTargets, ListTally]:
    """Rank the test targets of a run's model and count its lists, a batch at a time."""
    trained = load_trained(run.path, allow_imports=allow_imports)
    held_out = protocol.sequences(store, Split.TEST, trained.window)
    tally = ListTally(store.catalog, protocol.ks)
    found = rank_targets(
        trained.ranker,
        held_out,
        held_out.users,
        protocol=protocol,
        scorer=trained.scorer,
        listed=tally.add,
    )
    return found, tally


def _left_out(run: Run, protocol: Protocol | None) -> str:
    """Say why a run is not asked before it is loaded; empty where it may be."""
    if not run.until.measured():
        return "was trained on its test targets, and nothing is left to measure it by"
    if not run.test:
        return "has not read its test, and report does not read it in its place"
    if run.domain:
        return "is a model of one domain alone, whose lists do not compare"
    if not (run.path / MODEL_FILE).is_file():
        return f"holds no {MODEL_FILE}; restore it or train again"
    if protocol is not None and run.protocol != protocol:
        return "was measured by another protocol than the first; train it again by the same"
    return ""


def _note(run: Run, reason: str) -> str:
    return f"Run {run.path.name} ({run.variant}) is left out of the open questions: it {reason}."


def tape_pairs(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Yield pairs of variants, without and with TAPE, that have all other settings in common."""
    first = {run.variant: run for run in reversed(runs)}
    ordered = [first[variant] for variant in dict.fromkeys(run.variant for run in runs)]
    for without in ordered:
        for with_tape in ordered:
            values = [run.settings.get("encoder.tape") for run in (without, with_tape)]
            apart = set(differing_settings([without, with_tape]))
            if not values[0] and values[1] and apart <= {"encoder.tape", "parameters"}:
                yield without.variant, with_tape.variant
