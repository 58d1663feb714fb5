"""``bench train-step --data`` of requests: the steps of rankers over long histories.

A variant is a gin file, as in ``hstu-xd ablate``. Variants take turns in one process, with the same
requests in a turn. A step is all that the trainer does for a batch: it finds the events and lays
them out ("batch"), and runs model, loss, backward pass and optimiser.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_xd.bench.memory import growth, growth_elsewhere
from hstu_xd.bench.passes import FORWARD_BUDGET, row_error
from hstu_xd.bench.rows import Row, environment, time_columns
from hstu_xd.bench.timing import Times, noting_failure, take_turns, torch_threads, unmarked
from hstu_xd.bench.train_step import TrainerSteps, number_zeros
from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet, read_manifest
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.experiments.variants import parse_variants, recipe_of, variant_file
from hstu_xd.ranking.batches import RequestBatch
from hstu_xd.ranking.histories import HistoryIndex, Levels, Questions
from hstu_xd.ranking.settings import RankingSettings, load_ranking_settings
from hstu_xd.ranking.task import RankingTask, training_events
from hstu_xd.ranking.trainer import RankTrainer

_CHECKED_REQUESTS = 4
_STEPS_OF_MEMORY = 3


@dataclass(frozen=True)
class RequestSteps:
    """The training of one ranker.

    Attributes:
        data: folder of the requests.
        files: gin files of the recipe.
        bindings: gin bindings on top of them.
        threads: threads of PyTorch.
    """

    data: str
    files: Sequence[str]
    bindings: Sequence[str]
    threads: int

    @property
    def settings(self) -> RankingSettings:
        """Settings of the model and the training."""
        return load_ranking_settings([Path(file) for file in self.files], self.bindings)

    def open(self) -> tuple[InteractionStore, RequestSet]:
        """Open the requests and the log that they are of."""
        store = InteractionStore.open(Path(read_manifest(Path(self.data))["data"]))
        return store, RequestSet.open(Path(self.data), store)

    def trainer(self, store: InteractionStore, requests: RequestSet) -> RankTrainer:
        """Return a trainer that has not taken a step."""
        trained = training_events(store, requests.manifest["cuts"]["valid_from"])
        trainer = RankTrainer(RankingTask(store, requests, self.settings, trained), Path())
        trainer.model.train()
        return trainer


def measure_on_requests(
    data: Path,
    variants: str,
    recipe: tuple[Sequence[Path], Sequence[str]],
    *,
    threads: int,
    repeats: int,
) -> Iterator[Row]:
    """Yield a row for each variant.

    ``times_faster_than_<variant>`` compares a step with the first variant's of the same requests:
    the median over turns. ``search_share`` is the part of a step that finding and laying out the
    events takes; soft search finds them in the forward pass and is no part of it. ``peak_bytes`` is
    what log, index, model and some steps add to a process.

    Args:
        data: folder of the requests.
        variants: gin files, separated by commas; the others are compared with the first.
        recipe: gin files and bindings that they share.
        threads: threads of PyTorch.
        repeats: timed steps of each.

    Raises:
        InputError: a variant that is none of rankers.
    """
    steps = {}
    for name in parse_variants(variants):
        if variant_file(name) is None:
            raise InputError(
                f"variant {name!r} is one of hstu-xd train, and {data} holds requests to rank for; "
                "name gin files, such as gin/standalone/rank_tin.gin"
            )
        files, bindings = recipe_of(name, *recipe)
        steps[name] = RequestSteps(str(data), [str(file) for file in files], bindings, threads)
    yield from _measure(steps, repeats)


def _measure(variants: Mapping[str, RequestSteps], repeats: int) -> Iterator[Row]:
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    trainers, runs = {}, {}
    rival, first = next(iter(variants.items()))
    store, requests = first.open()
    with torch_threads(first.threads):
        for name, steps in variants.items():
            with noting_failure(name, failed):
                trainers[name] = steps.trainer(store, requests)
                errors[name] = _error(trainers[name])
                if errors[name] <= 1:
                    runs[name] = TrainerSteps(trainers[name]).run
        times = take_turns(runs, failed, device="cpu", repeats=repeats)
    for name, steps in variants.items():
        row = _sizes(name, steps, store, requests) | {"repeats": repeats}
        row |= {"failed": failed.get(name), "ms_median": None, "correct": None}
        if name in errors:
            row |= {"correct": errors[name] <= 1, "error_of_budget": errors[name]}
        if name in times:
            row |= time_columns(times[name]) | _shares(times, name, rival)
            row["peak_bytes"] = peak_bytes(name, steps)
        yield row


def _sizes(name: str, steps: RequestSteps, store: InteractionStore, requests: RequestSet) -> Row:
    """Return what a row says of the sizes of a training."""
    settings, chosen = steps.settings, requests.of_split(Split.TRAIN)
    index = HistoryIndex.of(store)
    users, times = requests.users[chosen], requests.times[chosen]
    lengths = index.lengths(Questions(users, np.zeros_like(users), times))
    return {
        "provider": Path(name).stem,
        "variant": name,
        "what": "train-step",
        "data": steps.data,
        "seq_len": round(float(lengths.mean())),
        "candidates": float(np.diff(requests.offsets)[chosen].mean()),
        "k": settings.search.k,
        "batch_size": settings.rank.batch_requests,
        "threads": steps.threads,
        **environment("cpu"),
    }


def _shares(times: Mapping[str, Times], name: str, rival: str) -> Row:
    own = times[name]
    found = {"search_share": float(np.median(np.divide(own["batch"], own["total"])))}
    if rival in times and rival != name:
        ratios = np.divide(times[rival]["total"], own["total"])
        found[f"times_faster_than_{Path(rival).stem}"] = float(np.median(ratios))
    return found


def _error(trainer: RankTrainer) -> float:
    """Return the largest error of the scores of one of a few requests, as a share of the budget.

    The truth is the same model in float64.

    Returns:
        A fraction of the budget; above 1 the variant is wrong. Infinity where other events were
        found than a sort of the whole history puts first.
    """
    task, chosen = trainer.task, trainer.batches(0)[0][:_CHECKED_REQUESTS]
    batch = task.data.batch(chosen)
    if not _finds_right(task, chosen, batch):
        return float("inf")
    model = deepcopy(trainer.model).eval()
    number_zeros(model)
    truth = deepcopy(model).double()
    exact = replace(batch, counts=batch.counts.double())
    with torch.no_grad():
        found, right = (each.where(batch.mask, 0) for each in (model(batch), truth(exact)))
    return row_error(found, right) / FORWARD_BUDGET


def _finds_right(task: RankingTask, chosen: NDArray[np.int64], batch: RequestBatch) -> bool:
    """Whether a batch has the events that a sort puts first; quotas and the like are not judged."""
    search = task.settings.search
    if not batch.events.shape[1] or search.quotas or search.skip_recent or search.scope != "all":
        return True
    levels, store = Levels.of(task.store), task.store
    places, _ = levels.searched(search.levels, ())
    candidates = batch.candidates.numpy()
    for row, request in enumerate(chosen):
        items, times = store.history(int(task.requests.users[request]))
        items = items[: np.searchsorted(times, task.requests.times[request])][::-1]
        if search.kind == "recent":
            if not _same(batch.events[row], items):
                return False
            continue
        paths = levels.paths[items][:, places]
        for column, item in enumerate(candidates[row][candidates[row] > 0]):
            own = levels.paths[item][places]
            matches = np.column_stack([(paths == own) & (own >= 0), np.ones(len(items), bool)])
            nearest = matches.argmax(axis=1)
            order = nearest.argsort(kind="stable")
            if not search.fill:
                order = order[nearest[order] < len(places)]
            if not _same(batch.events[row * candidates.shape[1] + column], items[order]):
                return False
    return True


def _same(found: Tensor, items: NDArray) -> bool:
    expected = np.zeros(len(found), np.int64)
    expected[: len(items)] = items[: len(found)]
    return np.array_equal(found.numpy(), expected)


def peak_bytes(name: str, steps: RequestSteps) -> int:
    """Return the bytes that log, index, model and steps add to a process at most.

    Args:
        name: name of the variant, for the message of an error.
        steps: its training.

    Raises:
        HstuXdError: the process in which it is measured failed.
    """
    return growth_elsewhere("hstu_xd.bench.request_steps", name, vars(steps))


def _added(steps: RequestSteps) -> int:
    def work() -> None:
        run = TrainerSteps(steps.trainer(*steps.open())).run
        for _ in range(_STEPS_OF_MEMORY):
            run(unmarked)

    with torch_threads(steps.threads):
        return growth(work)


if __name__ == "__main__":
    print(_added(RequestSteps(**json.loads(sys.argv[1]))))
