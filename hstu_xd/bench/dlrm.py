"""``bench dlrm``: the layers of generative-recommenders' production path, and their batches.

The layers are upstream's own on a CPU. "stock" is upstream's stack over whole histories, "mask" the
stack that this package regroups by user and domain, with candidates of all domains, and
"mask-one-domain" the same with a user's candidates of one domain: the others are not computed.
Batches are read of a prepared store: by upstream's collate of single samples, and whole.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_xd.bench.cases import Case, Draw
from hstu_xd.bench.passes import FORWARD_BUDGET, GRADIENT_BUDGET, row_error
from hstu_xd.bench.rows import Row, empty_row, environment, time_columns, times_faster
from hstu_xd.bench.timing import Mark, noting_failure, take_turns, torch_threads, unmarked
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.plugins.dlrm_v3 import HOST
from hstu_xd.plugins.host import check_version

PROVIDERS = ("stock", "mask", "mask-one-domain")
# The last rows of a user.
CANDIDATES = 10


def check_upstream() -> None:
    """Check that the production path loads.

    Raises:
        InputError: it does not.
    """
    try:
        check_version(HOST)
        import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)
        from generative_recommenders.dlrm_v3.train import train_ranker  # noqa: F401
    except (HstuXdError, ImportError, OSError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise InputError(f"bench dlrm needs {HOST.title}: {told}; see hstu-xd doctor") from error


def measure_stack(
    cases: Sequence[Case], names: Iterable[str], *, threads: int, repeats: int
) -> Iterator[Row]:
    """Time forward and backward passes of the layers, taking turns.

    Args:
        cases: what "dlrm" of which sizes; the last rows of a user are candidates.
        names: of :data:`PROVIDERS`.
        threads: threads of PyTorch.
        repeats: number of timed passes of each provider.

    Yields:
        A row for each case and provider. ``correct``: candidates and gradients are those of the
        stock layers run on every user and domain alone.

    Raises:
        InputError: upstream does not load, or histories are shorter than the candidates.
    """
    check_upstream()
    names = list(names)
    for case in cases:
        if case.seq_len <= CANDIDATES:
            raise InputError(f"seq_len is {case.seq_len}; above {CANDIDATES} candidates is needed")
    with torch_threads(threads):
        for case in cases:
            yield from _rows_of_stack(case, names, threads, repeats)


def _rows_of_stack(case: Case, names: list[str], threads: int, repeats: int) -> Iterator[Row]:
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name in names:
        with noting_failure(name, failed):
            errors[name] = _StackPass(name, case.small).error()
    right = [name for name in names if errors.get(name, 2) <= 1]
    passes = {name: _StackPass(name, case).run for name in right}
    times = take_turns(passes, failed, device="cpu", repeats=repeats)
    for name in names:
        row = empty_row(name, case, threads=threads, repeats=repeats)
        row |= {"failed": failed.get(name), "candidates": CANDIDATES}
        if name in errors:
            row |= {"correct": errors[name] <= 1, "error_of_budget": errors[name]}
        if name in times:
            row |= time_columns(times[name]) | times_faster(times, name, "stock")
        yield row


class _StackPass:
    """A stack of upstream's layers and a batch of one case."""

    def __init__(self, name: str, case: Case) -> None:
        from hstu_xd.plugins.dlrm_v3.domain_groups import RequestLayout

        draw = Draw.from_case(case)
        self._case, self._is_stock = case, name == "stock"
        self._lengths = draw.offsets.diff()
        self._targets = torch.full_like(self._lengths, CANDIDATES)
        layout = RequestLayout.build(self._lengths, self._targets, 0)
        self._is_target = layout.is_target
        if name == "stock":
            self._domains = torch.zeros_like(draw.domains)
        elif name == "mask":
            self._domains = draw.domains
        else:
            first = draw.domains[layout.first_targets][layout.users]
            self._domains = torch.where(layout.is_target, first, draw.domains)
        self._x = draw.normal(draw.num_tokens, case.width, dtype=torch.float32, seed=1)
        self._upstream = draw.normal(
            case.batch_size * CANDIDATES, case.width, dtype=torch.float32, seed=2
        )
        self._stack = _stack(case, is_stock=self._is_stock)

    def run(self, mark: Mark) -> dict[str, Tensor]:
        """Compute the candidates' rows and the gradients of the layers' input."""
        x = self._x.clone().requires_grad_()
        out = (self._whole if self._is_stock else self._grouped)(x)[self._is_target]
        mark("forward")
        self._stack.zero_grad()
        out.backward(self._upstream)
        mark("backward")
        assert x.grad is not None
        return {"out": out.detach(), "x": x.grad}

    def error(self) -> float:
        """Return the largest row error as a share of the budget."""
        found, truth = self.run(unmarked), self._truth()
        return max(
            row_error(found["out"], truth["out"]) / FORWARD_BUDGET,
            row_error(found["x"], truth["x"]) / GRADIENT_BUDGET,
        )

    def _whole(self, x: Tensor) -> Tensor:
        from torch.nn.functional import pad

        return self._stack(
            x=x,
            x_lengths=self._lengths,
            x_offsets=pad(self._lengths.cumsum(0), (1, 0)),
            max_seq_len=self._case.seq_len,
            num_targets=self._targets,
        )

    def _grouped(self, x: Tensor) -> Tensor:
        from hstu_xd.plugins.dlrm_v3.domain_groups import DomainGroups, RequestLayout

        layout = RequestLayout.build(self._lengths, self._targets, 0)
        groups = DomainGroups.build(
            layout, self._domains, self._case.num_domains, shortest_first=True
        )
        grouped = self._stack(
            x=groups.gather(x),
            x_lengths=groups.lengths,
            x_offsets=groups.offsets,
            max_seq_len=self._case.seq_len,
            num_targets=groups.num_targets,
        )
        return groups.spread_targets(grouped)

    def _truth(self) -> dict[str, Tensor]:
        """Run the stock layers on the rows of every user and domain alone."""
        stack = _stack(self._case, is_stock=True)
        stack.load_state_dict(self._stack.state_dict())
        x = self._x.clone().requires_grad_()
        out = torch.zeros_like(x)
        users = torch.arange(self._case.batch_size).repeat_interleave(self._lengths)
        for group in (users * self._case.num_domains + self._domains).unique():
            rows = (users * self._case.num_domains + self._domains == group).nonzero().squeeze(1)
            length = torch.tensor([rows.numel()])
            answer = stack(
                x=x[rows],
                x_lengths=length,
                x_offsets=torch.tensor([0, rows.numel()]),
                max_seq_len=self._case.seq_len,
                num_targets=self._is_target[rows].sum().unsqueeze(0),
            )
            out = out.index_add(0, rows, answer)
        (gradient,) = torch.autograd.grad(out[self._is_target], x, self._upstream)
        return {"out": out[self._is_target].detach(), "x": gradient}


def _stack(case: Case, *, is_stock: bool) -> Any:
    from generative_recommenders.common import HammerKernel
    from generative_recommenders.modules.stu import STULayer, STULayerConfig, STUStack

    from hstu_xd.plugins.dlrm_v3.bucketed_layer import BucketedSTULayer

    config = STULayerConfig(
        embedding_dim=case.width,
        num_heads=case.heads,
        hidden_dim=case.dv,
        attention_dim=case.dqk,
        output_dropout_ratio=0.0,
    )
    kind = STULayer if is_stock else BucketedSTULayer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stack = STUStack([kind(config) for _ in range(case.layers)])
    stack.set_hammer_kernel(HammerKernel.PYTORCH)
    return stack


def measure_batches(
    data: Path, history: int, batch_size: int, repeats: int
) -> list[dict[str, Any]]:
    """Time the batches of a store's requests against upstream's way.

    Args:
        data: prepared store.
        history: longest history of a request.
        batch_size: requests of a batch.
        repeats: timed batches of each provider.

    Returns:
        Rows of "whole"; of "layout", the last step of it, after histories are read and candidates
        drawn; of "samples", which makes a sample of each request from lists that are read and drawn
        already, as upstream's data sets do, and collates them; and of "collate", the last step of
        that.

    Raises:
        InputError: upstream does not load, or the store has too few requests.
    """
    check_upstream()
    from generative_recommenders.dlrm_v3.configs import get_hstu_configs
    from generative_recommenders.dlrm_v3.datasets.dataset import collate_fn

    from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings
    from hstu_xd.plugins.dlrm_v3.store_dataset import StoreDataset, configure, open_requests

    settings = DlrmSettings(max_history=history, num_candidates=CANDIDATES)
    requests = open_requests(data, settings)
    config = configure(get_hstu_configs("debug"), settings)
    dataset = StoreDataset(config, requests, settings)
    # Those of evaluation have the same candidates each time.
    evaluated = len(requests) - requests.num_train
    if batch_size > evaluated:
        raise InputError(f"--batch-size {batch_size}: the store has {evaluated} requests to read")
    rng = np.random.default_rng(0)
    draws = [
        requests.num_train + rng.choice(evaluated, batch_size, replace=False)
        for _ in range(repeats + 1)
    ]
    times: dict[str, list[float]] = {"whole": [], "layout": [], "samples": [], "collate": []}
    correct = True
    with torch_threads(1):
        for numbers in draws:
            batch = requests.batch(numbers)
            ready = _read(batch)
            start = time.perf_counter()
            laid_out = dataset.features(batch)
            times["layout"].append(time.perf_counter() - start)
            start = time.perf_counter()
            samples = [_sample(config, *each) for each in ready]
            middle = time.perf_counter()
            collated = collate_fn(samples)
            end = time.perf_counter()
            whole = dataset.get_samples(numbers.tolist())
            times["whole"].append(time.perf_counter() - end)
            times["samples"].append(end - start)
            times["collate"].append(end - middle)
            correct &= _same(whole, collated) and _same(laid_out, collated)
    return [
        _row_of_batches(name, times, correct, history=history, batch_size=batch_size)
        for name in times
    ]


def _row_of_batches(
    name: str, times: dict[str, list[float]], correct: bool, *, history: int, batch_size: int
) -> dict[str, Any]:
    row = {
        "provider": name,
        "what": "dlrm-batches",
        "seq_len": history,
        "batch_size": batch_size,
        "candidates": CANDIDATES,
        "correct": correct,
        **environment("cpu"),
    }
    if not correct:
        return row
    # The first batch warms up.
    own = np.array(times[name][1:])
    row["ms_median"] = float(np.median(own)) * 1e3
    if name in ("whole", "layout"):
        for rival in ("samples", "collate"):
            ratios = np.array(times[rival][1:]) / own
            row[f"times_faster_than_{rival}"] = float(np.median(ratios))
    return row


def _read(batch: Any) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
    """Take a batch apart, into numbers of the history and of the candidates of every request.

    Reading and drawing cost upstream's way nothing here.
    """
    histories = {"item_id": batch.items, "action_time": batch.times, "uih_domain": batch.domains}
    candidates = {
        "item_candidate_id": batch.candidates,
        "item_query_time": batch.request_times,
        "item_action_weight": batch.labels,
        "item_domain": batch.candidate_domains,
    }
    parts = [
        {name: x.split(lengths.tolist()) for name, x in tensors.items()}
        for tensors, lengths in (
            (histories, batch.history_lengths),
            (candidates, batch.candidate_lengths),
        )
    ]
    own = [
        [{name: x[at].tolist() for name, x in part.items()} for at in range(len(batch.users))]
        for part in parts
    ]
    for user, history in zip(batch.users.tolist(), own[0]):
        history |= {"user_id": [user], "action_weight": [1] * len(history["item_id"])}
    return list(zip(*own))


def _sample(config: Any, history: dict[str, list[int]], candidates: dict[str, list[int]]) -> Any:
    """Make a sample as upstream's data sets do: lists, one after the other, then tensors."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    made = []
    for names, features in (
        (config.hstu_uih_feature_names, history),
        (config.hstu_candidate_feature_names, candidates),
    ):
        values: list[int] = []
        for name in names:
            values.extend(features[name])
        lengths = [len(features[name]) for name in names]
        made.append(
            KeyedJaggedTensor(
                keys=names,
                lengths=torch.tensor(lengths).long(),
                values=torch.tensor(values).long(),
            )
        )
    return tuple(made)


def _same(found: Any, expected: Any) -> bool:
    """Whether two batches have the same features of the same values and lengths."""
    return all(
        ours.keys() == theirs.keys()
        and torch.equal(ours.values(), theirs.values())
        and torch.equal(ours.lengths(), theirs.lengths())
        for ours, theirs in (
            (found.uih_features_kjt, expected.uih_features_kjt),
            (found.candidates_features_kjt, expected.candidates_features_kjt),
        )
    )
