"""A trained ranker as one torch.export program, which is given what a search found, and how.

Of towers the program is the user's side alone: the vectors of items are the same for all users.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hstu_xd.errors import InputError
from hstu_xd.export.program import check, check_sizes, known_items, without_paths
from hstu_xd.interest.positions import gap_buckets
from hstu_xd.model.ddsr import attend_states_in_tiles
from hstu_xd.ranking.batches import Histories, RequestBatch
from hstu_xd.ranking.histories import Levels
from hstu_xd.ranking.model import RankingModel
from hstu_xd.ranking.run import ServedRanker
from hstu_xd.ranking.settings import RankingSettings
from hstu_xd.ranking.towers import TowerRanker

# Sizes that a program takes any number of, above 0, and the sizes that it is traced with.
_ANY = {"R": ("requests", 2), "C": ("candidates", 3), "L": ("events", 5)}


@dataclass(frozen=True)
class ProgramInput:
    """An input of a ranker's program.

    Attributes:
        name: its keyword.
        shape: R requests, C candidates, L events, or a fixed size.
        meaning: what it holds.
        dtype: of its numbers.
    """

    name: str
    shape: tuple[str | int, ...]
    meaning: str
    dtype: torch.dtype = torch.int64

    def described(self) -> str:
        """Say shape, dtype and meaning."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(map(str, self.shape)) + "," * (len(self.shape) == 1)
        return f"({sizes}) {dtype}, {self.meaning}"


class RankProgram(nn.Module):
    """What is traced of a ranker: checks of the inputs that a graph can make, then the model.

    Args:
        model: whose encoder, where it has one, can be traced.
        domains: (I + 1,) int64 domain of every item id; -1 of those that no item bears.
        goals: number of goals.
    """

    domains: Tensor

    def __init__(self, model: RankingModel, domains: Tensor, goals: int) -> None:
        super().__init__()
        self.model, self._goals = model, goals
        self.register_buffer("domains", domains, persistent=False)

    def forward(
        self,
        candidates: Tensor,
        goals: Tensor,
        counts: Tensor | None = None,
        events: Tensor | None = None,
        gaps: Tensor | None = None,
        history: Tensor | None = None,
        history_gaps: Tensor | None = None,
        latest: Tensor | None = None,
        latest_gaps: Tensor | None = None,
    ) -> Tensor:
        """Return the chance that each candidate is taken, 0 for padding: (R, C) float64.

        Raises:
            RuntimeError: an unknown item or goal, padding before events, events that are not before
                the request, or histories that are not oldest first.
        """
        requests, width = candidates.shape
        given = (goals, counts, events, gaps, history, history_gaps, latest, latest_gaps)
        check_sizes(*((each.shape[0], requests) for each in given if each is not None))
        by_candidate = (each for each in (counts, events, gaps) if each is not None)
        check_sizes(*((each.shape[1], width) for each in by_candidate if each.ndim > 2))
        self._check_items("candidates", candidates)
        inside = (goals >= 0) & (goals < self._goals)
        check(inside.all(), f"goals: only 0..{self._goals - 1}")
        if events is None or gaps is None:
            events = gaps = candidates.new_zeros(candidates.shape[0], 0)
        else:
            self._check_events("events", events, gaps)
        batch = RequestBatch(
            candidates=candidates,
            labels=torch.zeros_like(candidates, dtype=torch.float32),
            goals=goals,
            counts=torch.zeros(*candidates.shape, 0) if counts is None else counts,
            events=events.flatten(0, -2),
            buckets=gap_buckets(gaps.clamp(min=1)).flatten(0, -2),
            histories=self._histories("history", history, history_gaps),
            latest=self._histories("latest", latest, latest_gaps),
        )
        return self.model(batch).double().sigmoid() * (candidates > 0)

    def _histories(self, name: str, items: Tensor | None, gaps: Tensor | None) -> Histories | None:
        if items is None or gaps is None:
            return None
        check_sizes((gaps.shape[1], items.shape[1]))
        self._check_events(name, items, gaps)
        rises = (gaps > gaps.roll(1, 1)) & (items != 0) & (torch.arange(items.shape[1]) > 0)
        check(~rises.any(), f"{name}_gaps: a row's events oldest first")
        return Histories.with_padding(items, gaps)

    def _check_items(self, name: str, items: Tensor) -> None:
        last = len(self.domains) - 1
        check(known_items(self.domains, items), f"{name}: only 0..{last} that the catalogue has")

    def _check_events(self, name: str, items: Tensor, gaps: Tensor) -> None:
        self._check_items(name, items)
        check_places(name, items, gaps)


class TowerProgram(nn.Module):
    """What is traced of towers: checks of the inputs, then the user's side of the model.

    Args:
        model: the towers.
        domains: (I + 1,) int64 domain of every item id; -1 of those that no item bears.
    """

    domains: Tensor

    def __init__(self, model: TowerRanker, domains: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("domains", domains, persistent=False)

    def forward(self, events: Tensor, gaps: Tensor) -> Tensor:
        """Return the user's vector for every goal: (R, G, d) float32.

        Raises:
            RuntimeError: an unknown item, padding before events, or events that are not before the
                request.
        """
        check_sizes((gaps.shape[0], events.shape[0]))
        last = len(self.domains) - 1
        check(known_items(self.domains, events), f"events: only 0..{last} that the catalogue has")
        check_places("events", events, gaps)
        nobody = events.new_zeros(events.shape[0], 0)
        batch = RequestBatch(
            candidates=nobody,
            labels=nobody.float(),
            goals=events.new_zeros(events.shape[0]),
            counts=nobody.float().unsqueeze(-1),
            events=events,
            buckets=gap_buckets(gaps.clamp(min=1)),
            histories=None,
            latest=None,
        )
        return self.model.user_vectors(batch)


def check_places(name: str, items: Tensor, gaps: Tensor) -> None:
    """Refuse events, (..., N) both, behind padding, or at or after their request."""
    present = items != 0
    column = torch.arange(items.shape[-1])
    in_place = present == (column < present.sum(-1, keepdim=True))
    check(in_place.all(), f"{name}: padding (0) before a row's last item")
    gaps_name = "gaps" if name == "events" else f"{name}_gaps"
    check((~present | (gaps >= 1)).all(), f"{gaps_name}: events at least a second before")


def inputs_of(ranker: ServedRanker) -> list[ProgramInput]:
    """List the inputs of a ranker's program, in order."""
    settings = ranker.settings
    found = _found_events(ranker)
    if settings.interest.kind == "towers":
        return found
    inputs = [
        ProgramInput("candidates", ("R", "C"), "ids of the items to be ranked; 0 pads"),
        ProgramInput("goals", ("R",), "place of the request's goal in this manifest's goals"),
    ]
    if settings.interest.counts:
        width = ranker.levels.counts_width
        meaning = "what the user did with the candidate's node on each level, see finding"
        inputs.append(ProgramInput("counts", ("R", "C", width), meaning, torch.float32))
    inputs += found
    if settings.search.soft != "none":
        inputs += _histories("history", "L", "all events of the user before the request")
    if settings.latest:
        events = f"the latest {settings.latest} events of the user before the request"
        inputs += _histories("latest", settings.latest, events)
    return inputs


def _found_events(ranker: ServedRanker) -> list[ProgramInput]:
    search = ranker.settings.search
    if ranker.settings.interest.kind == "none":
        return []
    shape = ("R", "C", search.k) if search.kind == "hard" else ("R", search.k)
    of = "for each candidate" if search.kind == "hard" else "for all candidates of a request"
    return [
        ProgramInput("events", shape, f"item ids of the events found {of}, see finding; 0 pads"),
        ProgramInput("gaps", shape, "seconds from each event to the request; anything at padding"),
    ]


def _histories(name: str, size: str | int, which: str) -> list[ProgramInput]:
    items = f"item ids of {which}, oldest first, padded with 0 at the end"
    gaps = "seconds from each event to the request; anything at padding"
    return [
        ProgramInput(name, ("R", size), items),
        ProgramInput(f"{name}_gaps", ("R", size), gaps),
    ]


def export_ranker(ranker: ServedRanker) -> ExportedProgram:
    """Trace a ranker, or the user's side of towers.

    The program's call takes :func:`inputs_of` by keyword, for any numbers of requests, candidates
    and, where soft search reads it, events of a history, all at least 1. Soft search holds the
    scores of all events for all candidates at once; the domain branch encodes a history once for
    every domain.

    Args:
        ranker: of a trained run.

    Raises:
        InputError: the encoder cuts histories into segments.
    """
    model = _traceable(ranker)
    domains = torch.from_numpy(ranker.levels.domains)
    if isinstance(model, TowerRanker):
        program: nn.Module = TowerProgram(model, domains)
    else:
        program = RankProgram(model, domains, len(ranker.goals))
    dims = {letter: Dim(name, min=1) for letter, (name, _) in _ANY.items()}
    given, dynamic = {}, {}
    for each in inputs_of(ranker):
        sizes = [_ANY[size][1] if isinstance(size, str) else size for size in each.shape]
        goal = each.name == "goals"
        given[each.name] = (torch.zeros if goal else torch.ones)(sizes, dtype=each.dtype)
        dynamic[each.name] = {
            axis: dims[size] for axis, size in enumerate(each.shape) if isinstance(size, str)
        }
    with torch.no_grad(), _plain_attention():
        traced = torch.export.export(program, (), given, dynamic_shapes=dynamic, strict=False)
    return without_paths(traced)


def _traceable(ranker: ServedRanker) -> RankingModel:
    """Make the model anew, with the dense definition of attention."""
    model, settings = ranker.model, ranker.settings
    if settings.short.events and settings.encoder_settings(num_domains=1).has_segments:
        raise InputError(
            f"the encoder cuts histories into segments by {settings.encoder.segment_by!r}: how "
            "many there are is data, and the sizes of an exported program are not; export a model "
            "trained with xd_encoder.segment_by = 'none'"
        )
    settings = replace(settings, encoder=replace(settings.encoder, impl="reference"))
    made = model.like(ranker.levels, len(ranker.goals), settings)
    attend_states_in_tiles(made)
    made.load_state_dict(model.state_dict())
    return made.eval().requires_grad_(False)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep PyTorch's layers from a kernel that fuses all of one, which few devices have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def how_to_find(settings: RankingSettings, levels: Levels, levels_file: str) -> dict[str, str]:
    """Describe how the inputs of a ranker's program are found in a user's history.

    Args:
        settings: of the run.
        levels: of its items.
        levels_file: has the node of every item on each level, a column a level.
    """
    told = {
        "history": "Only the user's events strictly before the time of the request count. Of two "
        "at the same time the one that stands later in the log is the later one.",
    }
    if settings.interest.kind != "none":
        hard = settings.search.kind == "hard"
        told["events"] = _hard(settings, levels, levels_file) if hard else _recent(settings)
    told["gaps"] = "The time of the request less that of the event, in seconds, so at least 1."
    if settings.interest.counts:
        told["counts"] = _counts(levels, levels_file)
    return told


def _recent(settings: RankingSettings) -> str:
    return f"The latest {settings.search.k} events, the latest first."


def _hard(settings: RankingSettings, levels: Levels, levels_file: str) -> str:
    search, names = settings.search, settings.search.levels or levels.names
    told = [
        f"For each candidate up to {search.k} events. An event matches at the first of the levels "
        f"{', '.join(names)} (columns of {levels_file}, see levels) at which it has the node of "
        "the candidate; -1 is no node and matches nothing. Those of the first level come first, "
        "then those of the next one, and on each level the latest first."
    ]
    if search.skip_recent:
        told.append(f"The latest {search.skip_recent} events of the user are left out of all that.")
    if search.scope == "target_domain":
        last = levels.names[-1]
        told.append(f"So are events whose node of {last!r} is not the candidate's.")
    limits = [f"{most} of {name}" for name, most in zip(names, search.quotas) if most]
    if limits:
        told.append(f"At most {', '.join(limits)} are taken, the latest; its others are left out.")
    if search.fill:
        told.append("Behind them come the latest that match nowhere, until there are as many.")
    return " ".join(told)


def _counts(levels: Levels, levels_file: str) -> str:
    return (
        f"{levels.counts_width} numbers for each candidate. First of each level (columns of "
        f"{levels_file}, see levels) ln(1 + n), where n of the user's events have the candidate's "
        "node. Then of each level max(0, ln(3650 / days) / ln(3650)), where days = seconds / 86400 "
        "since the latest of these events; 0 where there is none."
    )
