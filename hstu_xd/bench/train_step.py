"""``bench train-step``: a whole training step of each model, and how far each reads in equal time.

The step is the stand-alone trainer's: encoder, domain-scoped sampled softmax, backward pass and
AdamW. "dense" is full attention as upstream's research code lays it out, "hstu" the same model on
this package's attention, "mask" and "all" the cross-domain variants of ``hstu-xd ablate``.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch
from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.memory import allocated, growth, growth_elsewhere
from hstu_xd.bench.passes import FORWARD_BUDGET, row_error
from hstu_xd.bench.rows import Row, empty_row, time_columns, times_faster
from hstu_xd.bench.timing import Mark, Pass, noting_failure, take_turns, torch_threads, unmarked
from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.retrieval import Retrieval
from hstu_xd.training.epochs import EpochProgress

_ALL = {"domain_mask": True, "tape": True, "ddsr": True}
# Provider -> switches; under "all" half of the heads also take the target view.
PROVIDERS: dict[str, dict[str, Any]] = {
    "dense": {"impl": "reference"},
    "hstu": {},
    "mask": {"domain_mask": True},
    "all": _ALL,
}
_ITEMS = 20_000
_NEGATIVES = 2048


def measure(
    cases: Sequence[Case],
    names: Iterable[str],
    *,
    threads: int,
    repeats: int,
    against: Sequence[str] = ("dense",),
) -> list[Row]:
    """Measure all cases and return their rows, one for each provider, taking turns.

    ``equal_time_seq_len`` is the longest history that a provider reads in the time that "dense"
    takes at the row's ``seq_len``: interpolated between measured lengths, on logarithmic axes;
    absent where it lies outside them.

    Args:
        cases: the cases to measure.
        names: names of the providers.
        threads: threads of PyTorch.
        repeats: number of timed steps of each provider.
        against: providers that the others' times are compared with.

    Raises:
        InputError: a case has no bias, another dtype than float32, or a plan that is made once.
    """
    for case in cases:
        if (case.dtype, case.biased, case.plan) != ("float32", True, "each"):
            raise InputError(
                "train-step measures float32 with the relative bias and a plan for each batch; "
                f"the case has dtype={case.dtype!r}, biased={case.biased}, plan={case.plan!r}"
            )
    with torch_threads(threads):
        rows = [
            row for case in cases for row in _rows(case, list(names), threads, repeats, against)
        ]
    for row in rows:
        row["equal_time_seq_len"] = _equal_time(row, rows)
    return rows


def _rows(
    case: Case, names: list[str], threads: int, repeats: int, against: Sequence[str]
) -> list[Row]:
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    steps: dict[str, Pass] = {}
    for name in names:
        with noting_failure(name, failed):
            errors[name] = _error(name, case.small)
            if errors[name] <= 1:
                steps[name] = _Step(name, Draw.from_case(case)).run
    times = take_turns(steps, failed, device=case.device, repeats=repeats)
    rows = []
    for name in names:
        row = empty_row(name, case, threads=threads, repeats=repeats)
        row["failed"] = failed.get(name)
        if name in errors:
            row |= {"correct": errors[name] <= 1, "error_of_budget": errors[name]}
        if name in times:
            row |= time_columns(times[name])
            row["peak_bytes"] = peak_bytes(name, case, threads)
            for rival in against:
                row |= times_faster(times, name, rival)
        rows.append(row)
    return rows


class _Step:
    """A model, its optimiser and one batch."""

    def __init__(self, name: str, draw: Draw) -> None:
        self._draw, self._model = draw, _model(name, draw.case)
        self._batch, self._targets = _batch(draw, self._model.catalog)
        self._objective = Retrieval(num_negatives=_NEGATIVES)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), fused=True)

    def make_states(self) -> None:
        """Let the optimiser make its states: with gradients of zero."""
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def run(self, mark: Mark) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        loss = self._objective.loss(self._model, self._batch, self._targets, generator)
        mark("forward")
        self._optimizer.zero_grad(set_to_none=True)
        (loss / len(self._targets)).backward()
        mark("backward")
        self._optimizer.step()
        return {"loss": loss.detach()}


class Trainer(Protocol):
    """A trainer whose steps are measured."""

    @property
    def progress(self) -> EpochProgress:
        """Where it stands."""
        ...

    def batches(self, epoch: int, /) -> list[NDArray]:
        """Return what each batch of an epoch is made of."""
        ...

    def step(self, batch: NDArray, mark: Mark, /) -> object:
        """Take a step on a batch, and tell of its phases."""
        ...


class TrainerSteps:
    """Takes a trainer's steps, one a call: of an epoch but the last batch, which is short."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches = trainer.batches(0)
        self._batches = self._batches[:-1] or self._batches

    def run(self, mark: Mark) -> dict[str, Tensor]:
        """Take the next step."""
        number = self._trainer.progress.step
        self._trainer.step(self._batches[number % len(self._batches)], mark)
        return {}


def _model(name: str, case: Case, **others: Any) -> CrossDomainHSTU:
    switches = PROVIDERS[name] | others
    if name == "all":
        switches["target_view_heads"] = case.heads // 2
    catalog = DomainCatalog(
        torch.arange(_ITEMS + 1) % case.num_domains, [str(d) for d in range(case.num_domains)]
    )
    settings = case.encoder_settings(**switches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CrossDomainHSTU(catalog, settings, dropout_rate=0.0).to(case.device)


def _batch(draw: Draw, catalog: DomainCatalog) -> tuple[JaggedBatch, Tensor]:
    """Return a batch of items of the drawn domains, and the item after each of them."""
    case = draw.case
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(_ITEMS // case.num_domains - 1, draw.domains.shape, generator=generator)
    items = 1 + place.to(case.device) * case.num_domains
    items = items + (draw.domains - catalog.domain_of(items)) % case.num_domains
    # A user's last event is followed by their first.
    following = items.view(case.batch_size, -1).roll(-1, 1).flatten()
    batch = JaggedBatch(
        item_ids=items,
        timestamps=draw.timestamps,
        next_timestamps=draw.next_timestamps,
        target_domains=catalog.domain_of(following),
        offsets=draw.offsets,
    )
    return batch, following


def _error(name: str, case: Case) -> float:
    """Return the largest row error of the user vectors as a share of the budget.

    The truth is the float64 definition of both operators. What starts at zero, as the values of
    DDSR do, gets numbers, or an error behind it would not show.
    """
    model = _model(name, case)
    with torch.no_grad():
        number_zeros(model)
        truth = _model(name, case, impl="reference").double()
        truth.load_state_dict(model.state_dict())
        batch, _ = _batch(Draw.from_case(case), model.catalog)
        return row_error(model(batch), truth(batch)) / FORWARD_BUDGET


@torch.no_grad()
def number_zeros(model: nn.Module) -> None:
    """Give small random numbers to all parameters that are zero, always the same ones."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _equal_time(row: Row, rows: list[Row]) -> int | None:
    def alike(other: Row, provider: str) -> bool:
        keys = ("num_domains", "skew", "interleaving", "batch_size", "device")
        same = all(other[key] == row[key] for key in keys)
        return same and other["provider"] == provider and other["ms_median"] is not None

    dense = [r["ms_median"] for r in rows if alike(r, "dense") and r["seq_len"] == row["seq_len"]]
    curve = sorted((r["ms_median"], r["seq_len"]) for r in rows if alike(r, row["provider"]))
    if not dense or not curve or not curve[0][0] <= dense[0] <= curve[-1][0]:
        return None
    times, lengths = np.log(np.array(curve, float)).T
    return round(float(np.exp(np.interp(np.log(dense[0]), times, lengths))))


def peak_bytes(name: str, case: Case, threads: int) -> int:
    """Return the bytes that a step adds to weights, batch and optimiser states.

    Args:
        name: name of the provider.
        case: case that is measured.
        threads: threads of PyTorch.

    Raises:
        HstuXdError: the process in which it is measured failed.
    """
    if case.device != "cpu":
        return _added(name, case, threads)
    job = {"name": name, "case": asdict(case), "threads": threads}
    return growth_elsewhere("hstu_xd.bench.train_step", name, job)


def _added(name: str, case: Case, threads: int) -> int:
    step = _Step(name, Draw.from_case(case))
    step.make_states()
    count = growth if case.device == "cpu" else allocated
    with torch_threads(threads):
        return count(lambda: step.run(unmarked))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(_added(job["name"], Case(**job["case"]), job["threads"]))
