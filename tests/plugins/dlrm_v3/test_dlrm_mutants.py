"""Mistakes that this plug-in must not make, each made on purpose and found by a check.

Those of who reads and writes domain states stand in ``test_domain_states.py``.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dlrm_runs import Run, process_of
from upstream_dlrm import answers, batch, cross_domain, dense_domain_mask, stock_model, twin_of

from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3 import checkpoints
from hstu_xd.plugins.dlrm_v3.domain_groups import DomainGroups, RequestLayout
from hstu_xd.plugins.dlrm_v3.model import CrossDomainTransducer

Patch = pytest.MonkeyPatch


def the_groups_maximum_is_what_divides(patch: Patch) -> None:
    original = CrossDomainTransducer._hstu_compute

    def compute(self: Any, *, max_seq_len: int, **others: Any) -> Any:
        return original(self, max_seq_len=int(self._groups.lengths.max()), **others)

    patch.setattr(CrossDomainTransducer, "_hstu_compute", compute)


def rebuilding(patch: Patch, change: Callable[..., DomainGroups]) -> None:
    original = DomainGroups.build

    def build(layout: RequestLayout, *others: Any, **options: Any) -> DomainGroups:
        return change(original, layout, *others, **options)

    patch.setattr(DomainGroups, "build", build)


def no_copy_of_the_prefix(patch: Patch) -> None:
    def change(build: Callable[..., DomainGroups], layout: RequestLayout, *others: Any, **options):
        return build(replace(layout, num_context=0), *others, **options)

    rebuilding(patch, change)


def targets_are_counted_by_user(patch: Patch) -> None:
    def change(build: Callable[..., DomainGroups], layout: RequestLayout, *others: Any, **options):
        groups = build(layout, *others, **options)
        of_users = torch.bincount(layout.users[layout.is_target], minlength=layout.num_users)
        asked = of_users[layout.users[groups.rows[groups.offsets[1:] - 1]]]
        return replace(groups, num_targets=torch.minimum(asked, groups.lengths))

    rebuilding(patch, change)


def differs_from_the_dense_mask(in_buckets: bool) -> bool:
    stock = stock_model()
    ours = twin_of(stock, cross_domain(domain_mask=True, in_buckets=in_buckets))
    for seed in range(6):
        features = batch(seed)
        with dense_domain_mask(features, num_context=1):
            expected = answers(stock, features)["predictions"]
        found = answers(ours, features)["predictions"]
        if not torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return True
    return False


@pytest.mark.parametrize("in_buckets", [False, True])
@pytest.mark.parametrize(
    "mutant",
    [the_groups_maximum_is_what_divides, no_copy_of_the_prefix, targets_are_counted_by_user],
)
def test_the_dense_mask_kills_mutants(
    mutant: Callable[[Patch], None], in_buckets: bool, monkeypatch: Patch
) -> None:
    assert not differs_from_the_dense_mask(in_buckets)
    mutant(monkeypatch)
    assert differs_from_the_dense_mask(in_buckets)


def resumed_differs(store: Path, folder: Path) -> bool:
    """Whether a run of three steps, a break and two steps differs from one of five steps."""
    with process_of(store, free_port()):
        run = Run()
        run.train(range(3))
        run.save(folder)
        run.train(range(3, 5))
        resumed = Run()
        resumed.load(folder / "3")
        resumed.train(range(3, 5))
        expected, found = run.parameters(), resumed.parameters()
    return any(not torch.equal(found[name], expected[name]) for name in expected)


def test_a_resumed_run_kills_a_fused_state_that_is_not_restored(
    tiny_store: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not resumed_differs(tiny_store, tmp_path / "whole")
    monkeypatch.setattr(checkpoints.checkpoint, "load", lambda *arguments, **options: None)
    assert resumed_differs(tiny_store, tmp_path / "without")
