"""``bench train-step --data``: the trainer's own steps on the batches of a prepared store.

A variant is a recipe as in ``hstu-xd ablate``. Variants take turns in one process, all of them with
the same users in a turn. A step is all that the trainer does for a batch: it draws the negatives,
builds the batch, and runs model, loss, backward pass and optimiser with the recipe's own dropout.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu_xd.bench.cases import Case
from hstu_xd.bench.memory import allocated, growth, growth_elsewhere
from hstu_xd.bench.passes import FORWARD_BUDGET, row_error
from hstu_xd.bench.request_steps import measure_on_requests
from hstu_xd.bench.rows import Row, empty_row, time_columns
from hstu_xd.bench.timing import Times, noting_failure, take_turns, torch_threads, unmarked
from hstu_xd.bench.train_step import TrainerSteps, number_zeros
from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.requests import is_requests
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import NO_BASELINE
from hstu_xd.experiments.variants import parse_variants, recipe_of
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.training.distributed import World
from hstu_xd.training.extension import objective_of
from hstu_xd.training.run import new_model
from hstu_xd.training.run_features import features_of
from hstu_xd.training.settings import RunSettings, load_settings
from hstu_xd.training.trainer import Trainer

# The variant that the others' times are compared with.
_RIVAL = "hstu"
_CHECKED_USERS, _CHECKED_EVENTS = 3, 70
# Batches differ in length: memory is the most that so many of them need.
_STEPS_OF_MEMORY = 3


@dataclass(frozen=True)
class StoreSteps:
    """The training of one variant on a store.

    Attributes:
        data: folder of the store.
        files: gin files of the recipe.
        bindings: gin bindings on top of them.
        device: "cpu" or "cuda".
        threads: threads of PyTorch.
    """

    data: str
    files: Sequence[str]
    bindings: Sequence[str]
    device: str
    threads: int

    @property
    def settings(self) -> RunSettings:
        """Settings of the model and the training."""
        return load_settings([Path(file) for file in self.files], self.bindings)

    def trainer(self, store: InteractionStore) -> Trainer:
        """Return a trainer that has not taken a step."""
        settings = self.settings
        torch.manual_seed(settings.train.random_seed)
        model = new_model(store.catalog, settings, features_of(store, settings))
        here = World(0, 1, torch.device(self.device))
        trainer = Trainer(model.to(here.device), store, settings.train, Path(), here)
        model.train()
        return trainer


def measure_on_store(
    data: Path,
    variants: str,
    recipe: tuple[Sequence[Path], Sequence[str]],
    sizes: Iterable[Sequence[str]],
    *,
    device: str,
    threads: int,
    repeats: int,
) -> Iterator[Row]:
    """Yield the rows of :func:`measure` for variants of one recipe.

    Args:
        data: folder of the store, or of requests.
        variants: names of :data:`hstu_xd.experiments.variants.VARIANTS` and gin files, separated
            by commas.
        recipe: gin files and bindings that the variants share.
        sizes: further bindings; the variants take turns under each of them.
        device: "cpu" or "cuda".
        threads: threads of PyTorch.
        repeats: timed steps of each variant.
    """
    shared_files, shared_bindings = recipe
    for some in sizes:
        if is_requests(data):
            if device != "cpu":
                raise InputError(f"--device {device}: rankers are trained on the CPU")
            shared = shared_files, [*shared_bindings, *some]
            yield from measure_on_requests(data, variants, shared, threads=threads, repeats=repeats)
            continue
        steps = {}
        for name in parse_variants(variants):
            files, bindings = recipe_of(name, shared_files, [*shared_bindings, *some])
            if load_settings(files, bindings).train.baseline != NO_BASELINE:
                raise InputError(f"variant {name}: a baseline has no training step to measure")
            steps[name] = StoreSteps(
                str(data), [str(file) for file in files], bindings, device, threads
            )
        yield from measure(steps, repeats=repeats)


def measure(variants: Mapping[str, StoreSteps], *, repeats: int) -> list[Row]:
    """Measure whole steps of variants on one store and return a row for each.

    ``times_hstu`` is the time of a variant's step over that of "hstu" with the same users: the
    median over turns. ``ms_batch``, ``ms_forward`` and ``ms_backward`` are parts of the step, and
    the optimiser is what is left.

    Args:
        variants: trainings by name, alike in store, device and threads.
        repeats: timed steps of each.
    """
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    runs, users = {}, {}
    first = next(iter(variants.values()))
    store = InteractionStore.open(Path(first.data))
    with torch_threads(first.threads):
        for name, steps in variants.items():
            with noting_failure(name, failed):
                trainer = steps.trainer(store)
                users[name] = trainer.users_per_step
                errors[name] = _error(steps, store)
                if errors[name] <= 1:
                    runs[name] = TrainerSteps(trainer).run
        times = take_turns(runs, failed, device=first.device, repeats=repeats)
    rows = []
    for name, steps in variants.items():
        case = _case(steps, store, users.get(name, 1))
        row = empty_row(name, case, threads=steps.threads, repeats=repeats)
        row |= {"variant": name, "data": steps.data, "skew": None, "interleaving": None}
        row |= {"delta": store.manifest["delta"], "failed": failed.get(name), "times_hstu": None}
        if name in errors:
            row |= {"correct": errors[name] <= 1, "error_of_budget": errors[name]}
        if name in times:
            row |= time_columns(times[name]) | _times_rival(times, name)
            row["peak_bytes"] = peak_bytes(name, steps)
        rows.append(row)
    return rows


def _case(steps: StoreSteps, store: InteractionStore, users: int) -> Case:
    """Return the sizes of a training; a step's users have at most ``seq_len`` events each."""
    settings = steps.settings
    encoder, train = settings.encoder_settings(store.num_domains), settings.train
    return Case(
        "train-step",
        train.window.size(store.num_domains),
        store.num_domains,
        batch_size=users,
        heads=encoder.num_heads,
        dqk=encoder.dqk,
        dv=encoder.dv,
        width=encoder.embedding_dim,
        layers=encoder.num_blocks,
        device=steps.device,
    )


def _times_rival(times: Mapping[str, Times], name: str) -> Row:
    if _RIVAL not in times:
        return {}
    ratios = np.divide(times[name]["total"], times[_RIVAL]["total"])
    return {f"times_{_RIVAL}": float(np.median(ratios))}


def _error(steps: StoreSteps, store: InteractionStore) -> float:
    """Return the largest error of user vectors and loss on a few short histories.

    The truth is the definition of all operators in float64; there is no dropout.

    Returns:
        A fraction of the budget; above 1 the variant is wrong.
    """
    trainer = steps.trainer(store)
    model, train = trainer.model, trainer.settings
    number_zeros(model)
    definition = replace(model.settings, impl="reference")
    truth = CrossDomainHSTU(store.catalog, definition, features=model.item_features)
    truth = truth.to(steps.device).double()
    truth.load_state_dict(model.state_dict())
    window = replace(train.window, latest=min(_CHECKED_EVENTS, train.max_sequence_length))
    data = SequenceData(store, Split.TRAIN, window)
    batch, targets = data.batch(trainer.batches(0)[0][:_CHECKED_USERS])
    batch, targets = batch.to(trainer.world.device), targets.to(trainer.world.device)
    objective = objective_of(train)

    def outputs(of: CrossDomainHSTU) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return of(batch), objective.loss(of, batch, targets, generator).reshape(1)

    with torch.no_grad():
        pairs = list(zip(outputs(model.eval()), outputs(truth.eval())))
    return max(row_error(found, right) for found, right in pairs) / FORWARD_BUDGET


def peak_bytes(name: str, steps: StoreSteps) -> int:
    """Return the bytes that steps add to weights and optimiser states at most.

    Args:
        name: name of the variant, for the message of an error.
        steps: its training.

    Raises:
        HstuXdError: the process in which it is measured failed.
    """
    if steps.device != "cpu":
        return _added(steps)
    return growth_elsewhere("hstu_xd.bench.store_steps", name, vars(steps))


def _added(steps: StoreSteps) -> int:
    trainer = steps.trainer(InteractionStore.open(Path(steps.data)))
    trainer.step(trainer.batches(0)[0][:2])  # makes the optimiser's states
    run = TrainerSteps(trainer).run
    count = growth if steps.device == "cpu" else allocated
    with torch_threads(steps.threads):
        return count(lambda: [run(unmarked) for _ in range(_STEPS_OF_MEMORY)])


if __name__ == "__main__":
    print(_added(StoreSteps(**json.loads(sys.argv[1]))))
