"""The protocol of an evaluation: what a model is asked, the same by `evaluate` and `recommend`.

It is a block of settings, ``xd_evaluate.*``, which is recorded with every run and printed with
every table: numbers of two protocols do not compare.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.cuts import TEST_SHARE, VALID_SHARE, TimeCuts, cut_in_time, described_time
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window
from hstu_xd.declaration import check, setting, settings_of
from hstu_xd.errors import InputError

BLOCK = "xd_evaluate"
# What a run is trained for: it has targets among all items, or requests that name candidates.
RETRIEVAL, RANKING = "retrieval", "ranking"
LEAVE_ONE_OUT, GLOBAL = "leave-one-out", "global"
DOMAIN, ALL = "domain", "all"
AGAINST, FAVOUR = "against", "favour"
# The group of targets that training never met, told apart where items have features.
COLD = "cold"


@dataclass(frozen=True)
class Protocol:
    """What ``xd_evaluate.*`` bindings set.

    Attributes:
        exclude_seen: whether items that a user has met are no candidates, in evaluation as in
            recommendation; a target that was met before is then a miss, and counted as such.
        candidates: whom a target is ranked among: "domain" (all items of its domain), "all" (all
            items of all domains), or a number N: metrics are then their exact expectation over N
            random ones of its domain, and nothing is drawn.
        ties: whether items of the target's own score count "against" it, as ranked before it, or
            in its "favour".
        ks: the k of hr@k and ndcg@k, ascending; hr@1 is ndcg@1, which is left out.
        split: what is held out, "leave-one-out" (a user's last event tests, the one before it
            validates) or "global" (the log is cut in time for all users alike: what comes before
            ``valid_from`` trains, and a user's last event of a later period is its target).
        valid_from: when validation begins: a date such as "2020-01-30", a time of the log as a
            whole number, or the share of the events before it; a run records the time.
        test_from: when test begins, told alike.
    """

    exclude_seen: bool = setting(True, also=("filter_seen", "remove_seen", "repeats"))
    candidates: str | int = setting(
        DOMAIN, allowed=(DOMAIN, ALL), at_least=1, also=("catalogue", "sampled", "negatives")
    )
    ties: str = setting(AGAINST, allowed=(AGAINST, FAVOUR))
    ks: tuple[int, ...] = setting((1, 10, 100), at_least=1, also=("cutoffs", "topk"))
    split: str = setting(
        LEAVE_ONE_OUT, allowed=(LEAVE_ONE_OUT, GLOBAL), also=("temporal_split", "time_split")
    )
    valid_from: str | int | float = setting(VALID_SHARE, needs={"split": GLOBAL}, also=("cut",))
    test_from: str | int | float = setting(TEST_SHARE, needs={"split": GLOBAL}, also=("cut",))

    def __post_init__(self) -> None:
        check(self, BLOCK + ".{name} = {value!r}; it must be {needed}")
        if not self.ks or list(self.ks) != sorted(set(self.ks)):
            raise InputError(
                f"{BLOCK}.ks = {self.ks!r}; numbers in ascending order are needed, each once"
            )

    @property
    def sampled(self) -> int:
        """Number of random candidates beside the target; 0: none are drawn, all are ranked."""
        return self.candidates if isinstance(self.candidates, int) else 0

    def cuts(self, store: InteractionStore) -> TimeCuts | None:
        """Find where a store's log is cut in time; None under leave-one-out.

        Raises:
            InputError: what is no date, time or share, or does not cut this log.
        """
        if self.split == LEAVE_ONE_OUT:
            return None
        names = ("valid_from", "test_from")
        told = [f"{BLOCK}.{name} = {getattr(self, name)!r}" for name in names]
        return cut_in_time(
            store.timestamps, self.valid_from, self.test_from, told=(told[0], told[1])
        )

    def on(self, store: InteractionStore) -> "Protocol":
        """Return the protocol with times of a store's log in the place of dates and shares."""
        cuts = self.cuts(store)
        return self if cuts is None else replace(self, **asdict(cuts))

    def sequences(
        self,
        store: InteractionStore,
        split: Split,
        window: Window | int,
        *,
        domain: str = "",
        until: Split = Split.TRAIN,
    ) -> SequenceData:
        """Return the users and targets of a split of a store, or of one domain of it alone.

        Args:
            store: the log.
            split: of it.
            window: which events before a target are read; a number: so many latest ones.
            domain: name of the only one to read; "": all.
            until: the last split whose targets train.

        Raises:
            InputError: an unknown domain, or no user with enough events.
        """
        only = store.catalog.domain_index(domain) if domain else None
        return SequenceData(store, split, window, self.cuts(store), only, until)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics: hr@k of every k, ndcg@k of all but 1, mrr."""
        hits = [f"hr@{k}" for k in self.ks]
        return (*hits, *(f"ndcg@{k}" for k in self.ks if k > 1), "mrr")

    @property
    def headlines(self) -> tuple[str, ...]:
        """Names of those of the largest k, and mrr."""
        k = self.ks[-1]
        return (f"hr@{k}", *([f"ndcg@{k}"] if k > 1 else []), "mrr")

    @property
    def main_metrics(self) -> tuple[str, ...]:
        """Names of those that tell variants apart at a glance."""
        return (*(f"hr@{k}" for k in self.ks[-2:-1]), *self.headlines)

    def columns(self, measured: Collection[str]) -> tuple[str, ...]:
        """Return the names of the columns of a table of variants.

        Args:
            measured: names of what any of them was measured by; cold targets have a column where
                they were told apart.
        """
        hits = self.headlines[0]
        cold = [name for name in (f"{hits}[{COLD}]",) if name in measured]
        return (*self.main_metrics, f"{hits}[switch]", f"{hits}[stay]", *cold)

    @classmethod
    def from_run(cls, facts: Mapping[str, Any]) -> "Protocol":
        """Read what a run's ``run.json`` records; what it does not know has its default."""
        recorded = facts.get("protocol") or {}
        return cls(
            **{
                name: each.typed(recorded[name], f"run.json: protocol.{name} = {recorded[name]!r}")
                for name, each in settings_of(cls).items()
                if name in recorded
            }
        )

    def but(self, **changes: Any) -> "Protocol":
        """Return the protocol with what is given changed; None changes nothing."""
        return replace(self, **{name: v for name, v in changes.items() if v is not None})

    def as_json(self) -> dict[str, Any]:
        """Return the protocol as it is recorded."""
        return asdict(self)

    def sentences(self, until: Split = Split.TRAIN) -> Iterator[str]:
        """Say in words what the numbers of a table mean.

        Args:
            until: the last split whose targets its models were trained on.
        """
        if self.sampled:
            among = (
                f"Metrics are the exact expectation over {self.sampled:,} random candidates of the "
                "target's domain beside the target, or over all where there are no more"
            )
        elif self.candidates == ALL:
            among = "Candidates are all items of all domains"
        else:
            among = "Candidates are all items of the target's domain"
        if self.split == GLOBAL:
            valid, test = _told_cut(self.valid_from), _told_cut(self.test_from)
            trained, held_out = valid, f"from there on and from {test} on"
            targets = "of validation and of test"
            if until is Split.VALID:
                trained, held_out, targets = test, "from there on", "of test"
            yield (
                f"The log is cut in time for all users alike: events before {trained} train, and "
                f"of those {held_out} a user's last one is the target {targets}."
            )
        side = "against the target" if self.ties == AGAINST else "in the target's favour"
        yield f"{among}; ties count {side}."
        if self.exclude_seen:
            yield (
                "Items that the user has met are no candidates (exclude_seen on); a target that "
                "was met before counts as a miss."
            )
        else:
            yield "Items that the user has met are candidates, too (exclude_seen off)."


def _told_cut(cut: str | int | float) -> str:
    if isinstance(cut, float):
        return f"{cut:.4g} of the events"
    return described_time(cut) if isinstance(cut, int) else cut


DEFAULTS = Protocol()
METRICS = DEFAULTS.metrics


def protocol_notes(runs: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> list[str]:
    """Say what the numbers of a table of runs mean.

    Args:
        runs: what each run's ``run.json`` says, of at least one run.
        metrics: of one of them.
    """
    if any("protocol" not in facts for facts in runs):
        return [_UNRECORDED]
    protocols = [Protocol.from_run(facts) for facts in runs]
    names = [f.name for f in fields(Protocol)]
    differing = [n for n in names if len({getattr(p, n) for p in protocols}) > 1]
    if differing:
        told = ", ".join(f"{BLOCK}.{name}" for name in differing)
        return [
            f"These runs were measured by different protocols ({told}), so their rows do not "
            "compare; hstu-xd compare measures them alike."
        ]
    return list(measured_notes(protocols[0], metrics, common_until(runs)))


def measured_notes(
    protocol: Protocol, metrics: Mapping[str, float], until: Split = Split.TRAIN
) -> tuple[str, ...]:
    """Say what numbers by one protocol mean.

    Args:
        protocol: by which all were measured.
        metrics: at least their counts.
        until: the last split whose targets all models were trained on.
    """
    return (*protocol.sentences(until), *count_notes(metrics))


def until_of(facts: Mapping[str, Any]) -> Split:
    """Return the last split whose targets a run was trained on; runs of old do not say so.

    Args:
        facts: what its run.json says.
    """
    return Split((facts.get("train") or {}).get("train_until", Split.TRAIN.value))


def common_until(runs: Iterable[Mapping[str, Any]]) -> Split:
    """Return the last split whose targets all of some runs were trained on.

    Args:
        runs: what each run's run.json says, of at least one run.
    """
    return min(map(until_of, runs), key=tuple(Split).index)


_UNRECORDED = (
    "Candidates are all items of the target's domain that the user has not met; ties count against "
    "the target. Runs of an earlier version are among these: a target that was met before kept its "
    "rank among unseen items there; hstu-xd evaluate and compare measure them as runs of today."
)


def count_notes(metrics: Mapping[str, float]) -> list[str]:
    """Say which targets of a split could not be missed, which not be hit, and who is left out."""
    told = (_unreachable_note(metrics), _trivial_note(metrics), _new_note(metrics))
    return [note for note in told if note]


def _new_note(metrics: Mapping[str, float]) -> str:
    """Say who and what is new after a cut in time; empty where nothing is.

    Args:
        metrics: of a split, with :attr:`hstu_xd.data.batches.SequenceData.counts`.
    """
    users = round(metrics.get("count_without_history", 0))
    items = round(metrics.get("count_new_items", 0))
    told = []
    if users:
        told.append(f"{users:,} users with a target have no earlier event to read and are left out")
    if items:
        told.append(f"{items:,} targets are items without an event that trains")
    return "; ".join(told) + "." if told else ""


def _trivial_note(metrics: Mapping[str, float]) -> str:
    """Say how many targets have no more than k candidates; empty where none has so few."""
    told = [
        f"{name.partition('count_trivial')[2]} {round(number):,}"
        for name, number in metrics.items()
        if name.startswith("count_trivial@")
    ]
    if not told:
        return ""
    return (
        f"Of {round(metrics['count']):,} targets these have no more than k candidates and are hits "
        f"by necessity: {', '.join(told)}; metrics named [nontrivial] leave them out, [macro] is "
        "the mean over domains."
    )


def _unreachable_note(metrics: Mapping[str, float]) -> str:
    """Say how many targets could not be recommended; empty where all could.

    Args:
        metrics: of a split, see :func:`hstu_xd.evaluation.metrics.grouped_metrics`.
    """
    unreachable = round(metrics.get("count_unreachable", 0))
    if not unreachable:
        return ""
    return (
        f"{unreachable:,} of {round(metrics['count']):,} targets are items that the user had met "
        "before, so they cannot be recommended and count as misses; xd_evaluate.exclude_seen = "
        "False (--include-seen) makes met items candidates."
    )
