"""Metrics by group where several processes evaluate, each its own targets."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.plugins.rec import rec_metrics
from hstu_xd.plugins.rec.rec_session import SESSION


class Hits:
    """REC's ``DataStruct``: whether each target of a process was hit."""

    def __init__(self, hits: list[bool] | None = None) -> None:
        self._data_dict: dict[str, Any] = {}
        if hits is not None:
            self._data_dict["rec.topk"] = torch.tensor(hits).unsqueeze(1)

    def set(self, name: str, value: Tensor) -> None:
        self._data_dict[name] = value


def sums(_: Any, dataobject: Hits) -> "OrderedDict[str, Any]":
    """REC's metrics before its trainer divides by the number of all targets: numpy's numbers."""
    hits = dataobject._data_dict["rec.topk"].numpy()
    return OrderedDict({"recall@5": hits.astype(np.float64).sum(0)[0], "hit@5": hits.sum(0)[0]})


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one evaluates one target, in domain b, after an event in domain a."""
    monkeypatch.setattr(SESSION, "catalog", DomainCatalog(torch.tensor([0, 0, 1]), ["a", "b"]))
    monkeypatch.setattr(rec_metrics, "_TARGETS", rec_metrics._Targets())
    # All targets, those met before, domain a, domain b, switch, stay.
    others = torch.tensor([1, 0, 0, 1, 1, 0])
    monkeypatch.setattr(rec_metrics.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(rec_metrics.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(rec_metrics.dist, "all_reduce", lambda counts: counts.add_(others))


def test_a_group_of_another_process_alone_is_a_number_of_the_same_type(two_processes: None) -> None:
    stays = torch.zeros(2, dtype=torch.int64)
    rec_metrics._TARGETS.add(stays, stays, 0)
    evaluator = SimpleNamespace(config={"device": "cpu"})
    found = rec_metrics.with_groups(sums)(evaluator, Hits([True, False]))
    assert found["recall@5[a]"] == 1 * 3 / 2
    assert found["recall@5[b]"] == found["recall@5[switch]"] == 0
    # REC's trainer gathers each as a tensor, which all processes must make of the same type.
    types = {name: torch.tensor([value]).dtype for name, value in found.items()}
    for name in ("recall@5", "hit@5"):
        assert types[f"{name}[a]"] == types[f"{name}[b]"] == types[f"{name}[switch]"]
