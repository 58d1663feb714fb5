"""Domain-scoped candidates, and REC's own metrics once more for each group of targets."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.plugins.bridge import target_groups
from hstu_xd.plugins.rec.rec_session import SESSION
from hstu_xd.plugins.rec.settings import as_theirs

_logger = logging.getLogger(__name__)

# Private to REC's DataStruct.
_ENTRIES = "_data_dict"


@dataclass
class _Targets:
    """Groups of the targets evaluated since the last result, one entry a batch.

    Attributes:
        domains: domain of each target.
        last_domains: of the event before each; -1 where there is none.
        seen: targets that the history holds already.
    """

    domains: list[Tensor] = field(default_factory=list)
    last_domains: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def add(self, domains: Tensor, last_domains: Tensor, seen: int) -> None:
        """Take a batch of targets."""
        self.domains.append(domains)
        self.last_domains.append(last_domains)
        self.seen += seen

    def take(self) -> tuple[Tensor, Tensor, int]:
        """Return everything since the last call, and forget it."""
        none = torch.zeros(0, dtype=torch.int64)
        taken = torch.cat([none, *self.domains]), torch.cat([none, *self.last_domains]), self.seen
        self.domains, self.last_domains, self.seen = [], [], 0
        return taken


_TARGETS = _Targets()


def domain_scoped(full_sort_batch_eval: Callable[..., Any]) -> Callable[..., Any]:
    """Let REC's ``Trainer._full_sort_batch_eval`` rank among the items of each target's domain.

    REC removes a user's history from the candidates, a target that is in it included. Items of
    other domains come after all candidates but before those, so that such a target cannot slip
    into the top of a domain with fewer items than the top has places.
    """

    @torch.no_grad()
    def xd_full_sort_batch_eval(self: Any, batched_data: Any) -> Any:
        if SESSION.catalog is None and not SESSION.extends_model:
            with as_theirs(self.config):
                return full_sort_batch_eval(self, batched_data)
        histories, times, _, _, targets, *_ = batched_data
        domains = last = torch.zeros_like(targets)
        if SESSION.catalog is not None:
            domains = SESSION.catalog.item_domains[targets]
            last = SESSION.catalog.item_domains[histories[:, -1]]
        if SESSION.extends_model:
            batched_data = list(batched_data)
            batched_data[1] = with_request(times, domains)
        with as_theirs(self.config):
            scores, positive_u, positive_i = full_sort_batch_eval(self, batched_data)
        if SESSION.catalog is None:
            return scores, positive_u, positive_i
        hidden = torch.isneginf(scores)
        _TARGETS.add(domains, last, int(hidden[positive_u, positive_i].sum()))
        assert SESSION.settings is not None
        if SESSION.settings.candidates == "domain":
            other = _elsewhere(domains.to(scores.device), scores.shape[1])
            scores = scores.masked_fill(other & ~hidden, torch.finfo(scores.dtype).min)
        return scores, positive_u, positive_i

    return xd_full_sort_batch_eval


def _elsewhere(domains: Tensor, columns: int) -> Tensor:
    """(B, columns) bool, items outside each target's domain.

    PerSRec scores the texts of its table, which may be more than the log has items.
    """
    item_domains = SESSION.catalog_on(domains.device).item_domains
    item_domains = pad(item_domains, (0, columns - len(item_domains)), value=-1)
    return item_domains != domains.unsqueeze(1)


def with_request(times: Tensor, domains: Tensor) -> Tensor:
    """Build what ``predict`` of this package's models takes as ``time_seq``.

    Args:
        times: (B, N + 1) int64 of
            :class:`hstu_xd.plugins.rec.rec_datasets.TimedEvalDataset`.
        domains: (B,) int64, the requested domains.

    Returns:
        (B, N + 2) int64: times of the history, time and domain of the request.
    """
    return torch.cat([times, domains.unsqueeze(1)], dim=1)


def with_groups(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Let REC's ``Evaluator.evaluate`` also give ``name[domain]``, ``name[switch]``, ``[stay]``.

    It gives sums over this process's targets, and REC's trainer divides all of them by the number
    of all targets. A group's sums come multiplied by what makes that division by the group's own
    number. Groups without targets are left out.
    """

    def xd_evaluate(self: Any, dataobject: Any) -> Any:
        result = evaluate(self, dataobject)
        if SESSION.catalog is None:
            return result
        domains, last, seen = _TARGETS.take()
        members = target_groups(domains, last, SESSION.catalog.domain_names)
        counts = torch.tensor([len(domains), seen, *(int(rows.sum()) for rows in members.values())])
        if dist.get_world_size() > 1:
            on_device = counts.to(self.config["device"])
            dist.all_reduce(on_device)
            counts = on_device.cpu()
        total, seen, *sizes = counts.tolist()
        _log_counts(total, seen, dict(zip(members, sizes)))
        grouped = OrderedDict(result)
        for (name, rows), size in zip(members.items(), sizes):
            if not size:
                continue
            part = evaluate(self, _rows_of(dataobject, rows)) if bool(rows.any()) else {}
            for metric in result:
                # Of one type in every process, for REC's trainer gathers it as a tensor.
                value = np.float64(part.get(metric, 0))
                grouped[f"{metric}[{name}]"] = value * (total / size)
        return grouped

    return xd_evaluate


def _rows_of(dataobject: Any, rows: Tensor) -> Any:
    """Return REC's ``DataStruct`` with what has one row a target cut to some of the targets."""
    part = type(dataobject)()
    for name, value in getattr(dataobject, _ENTRIES).items():
        has_rows = isinstance(value, Tensor) and value.shape[:1] == rows.shape
        part.set(name, value[rows] if has_rows else value)
    return part


def _log_counts(total: int, seen: int, sizes: dict[str, int]) -> None:
    if dist.get_rank() != 0:
        return
    text = ", ".join(f"{name} {size}" for name, size in sizes.items())
    _logger.info("metrics over %d targets: %s", total, text)
    if seen:
        _logger.warning(
            "%d of %d targets are items the user has met before: REC takes a user's history out of "
            "the candidates, so that they count as missed",
            seen,
            total,
        )
